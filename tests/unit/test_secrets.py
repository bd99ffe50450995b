"""Keys, passwords and prompts leave a process by no side door: not by a log, a traceback, an argument, the environment or a core file."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from gpumarket.core import keystore
from gpumarket.core.terms import keccak256

SECRET = bytes(keccak256(b"a canary key"))
PASSWORD = "canary password 4711"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keystore.create(tmp_path / "keys" / "key.json", PASSWORD, SECRET)
    password = tmp_path / "password"
    password.touch(mode=0o600)
    password.write_text(PASSWORD + "\n")
    (tmp_path / "config.toml").write_text(
        f'[client]\nstate = "{tmp_path / "state"}"\nkey_file = "{tmp_path / "keys" / "key.json"}"\npassword_file = "{password}"\n'
    )
    return tmp_path


def hits(text: bytes) -> list[bytes]:
    forms = [PASSWORD.encode(), SECRET, SECRET.hex().encode(), SECRET.hex().upper().encode(), str(int.from_bytes(SECRET, "big")).encode()]
    forms += [repr(SECRET).encode()[2:-1]]
    return [form for form in forms if form in text]


def python(code: str, *arguments: str, cwd: Path, cores: bool = False) -> subprocess.CompletedProcess[bytes]:
    def unlimited() -> None:
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))

    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, timeout=60, preexec_fn=unlimited if cores else None)


CRASHES = """
import sys
from gpumarket.cli.main import run
from gpumarket.core import keystore
whole = keystore.open_document

def crash(path, document, password, *rest):
    key = whole(path, document, password, *rest)
    secret = key.secret
    raise RuntimeError("something unexpected, with the key and its password in the frames above")

keystore.open_document = crash
sys.exit(run(["wallet", "export", "out.json", "-v", "--config", "config.toml", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("output", [[], ["-o", "json"]])
def test_traceback_of_a_crash_with_an_open_key_shows_no_secret(folder: Path, output: list[str]) -> None:
    done = python(CRASHES, *output, cwd=folder)
    assert done.returncode == 1
    assert b"something unexpected" in done.stdout + done.stderr
    assert hits(done.stdout + done.stderr) == []


def test_core_file_of_a_process_with_a_key_is_not_written(folder: Path) -> None:
    opens = "import sys; from pathlib import Path; from gpumarket.core import keystore\n"
    opens += f"key = keystore.load(Path(sys.argv[1]), {PASSWORD!r})\n"
    dying = "import os; os.abort()"
    done = python(opens + dying, str(folder / "keys" / "key.json"), cwd=folder, cores=True)
    assert done.returncode == -6
    cores = [file for file in folder.iterdir() if file.name.startswith("core")]
    assert cores == [], "a core file was written"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can go on as another user")
def test_concealed_process_is_closed_to_its_own_user() -> None:
    """What the kernel hides of a process that is not dumpable (proc(5)), seen by another process of the same user."""
    code = """if True:
        import ctypes, os, subprocess
        from gpumarket.core.concealment import conceal
        os.setgid(65534)
        os.setuid(65534)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
        look = lambda: subprocess.run(["cat", f"/proc/{os.getpid()}/environ"], capture_output=True).returncode
        before = look()
        conceal()
        print(before, look())"""
    done = python(code, cwd=Path("/"))
    assert done.stdout.split() == [b"0", b"1"], done.stderr.decode()


def test_log_masks_values_under_secret_names_however_deep(folder: Path) -> None:
    code = """if True:
        import structlog
        from gpumarket.core.daemon import configure_logging
        configure_logging("provider")
        log = structlog.get_logger()
        log.info("told", password="pw-canary", request={"prompt": "prompt-canary", "units": 3}, kept="visible")
        log.info("deep", jobs=[{"salt": "salt-canary", "tokens": [1, 2]}, {"inner": {"output": "out-canary"}}])"""
    done = python(code, cwd=folder)
    assert b"canary" not in done.stderr
    first, second = (json.loads(line) for line in done.stderr.splitlines())
    assert (first["password"], first["request"], first["kept"]) == ("***", "***", "visible")
    assert second["jobs"] == [{"salt": "***", "tokens": "***"}, {"inner": {"output": "***"}}]


def test_command_line_takes_no_secret_by_flag_or_variable() -> None:
    """No option and no setting holds a key or a password: only paths to them."""
    from gpumarket.node.settings import ProviderSettings
    from gpumarket.scheduler.settings import SchedulerSettings
    from gpumarket.sdk.settings import ClientSettings

    for settings in (ClientSettings, ProviderSettings, SchedulerSettings):
        named = {name: str(field.annotation) for name, field in settings.model_fields.items() if "password" in name or "key" in name}
        assert named
        assert all("Path" in kind for kind in named.values()), named
    done = subprocess.run(
        [sys.executable, "-m", "gpumarket.cli.main", "wallet", "create", "--password", "x"], capture_output=True, timeout=60
    )
    assert done.returncode == 2

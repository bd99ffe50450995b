"""The local chain as a child: it answers, keeps its state, dies with its parent, and says clearly why it cannot start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpumarket.core.errors import ChainError, ConfigError, PortInUse, Unreachable
from gpumarket.testnet import anvil_install
from gpumarket.testnet.anvil import Anvil, ensure_anvil

SOMEBODY = "0x" + "11" * 20


def program(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def test_anvil_answers_on_loopback_with_the_chain_id_it_was_given() -> None:
    with Anvil.start(block_time=None, chain_id=4242, funded=[SOMEBODY]) as anvil:
        assert anvil.url.startswith("http://127.0.0.1:")
        assert int(anvil.rpc("eth_chainId"), 16) == 4242
        assert int(anvil.rpc("eth_getBalance", SOMEBODY, "latest"), 16) > 0
        pid = anvil.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_anvil_stopped_and_restarted_has_its_state_and_its_port(tmp_path: Path) -> None:
    with Anvil.start(block_time=None, state=tmp_path / "new" / "state.json") as anvil:
        anvil.rpc("anvil_setBalance", SOMEBODY, hex(7))
        anvil.rpc("evm_mine")
        url, block = anvil.url, anvil.rpc("eth_blockNumber")
        anvil.restart()
        assert (anvil.url, anvil.rpc("eth_blockNumber")) == (url, block)
        assert int(anvil.rpc("eth_getBalance", SOMEBODY, "latest"), 16) == 7


def test_anvil_that_was_killed_says_so_and_starts_again() -> None:
    with Anvil.start(block_time=None) as anvil:
        anvil.kill()
        with pytest.raises(ChainError, match="does not run"):
            _ = anvil.pid
        with pytest.raises(ChainError, match="does not answer"):
            anvil.rpc("eth_chainId")
        anvil.restart()
        assert anvil.rpc("eth_chainId")


def test_anvil_dies_with_the_process_that_started_it() -> None:
    code = (
        "import os, signal\nfrom gpumarket.testnet.anvil import Anvil\na = Anvil.start(block_time=None)\n"
        "print(a.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    try:
        waited = os.pidfd_open(pid)
    except ProcessLookupError:
        return  # gone already
    import select

    assert select.select([waited], [], [], 30)[0], "it outlived its parent by 30 s"


def test_anvil_on_a_taken_port_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(PortInUse):
            Anvil.start(port=other.getsockname()[1])


def test_anvil_on_a_public_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="keys are public"):
        Anvil.start(host="0.0.0.0")


def test_anvil_with_a_broken_state_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{half")
    with pytest.raises(ConfigError, match="refuses its state file"):
        Anvil.start(state=tmp_path / "state.json")


def test_anvil_that_ends_at_once_gives_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ChainError, match=r"exit code 3.*no luck"):
        Anvil.start(binary=program(tmp_path / "anvil", "echo no luck >&2; exit 3"))


def test_anvil_rpc_of_an_unknown_method_raises_the_chains_message() -> None:
    with Anvil.start(block_time=None) as anvil, pytest.raises(ChainError, match="eth_nonsense"):
        anvil.rpc("eth_nonsense")


def test_install_without_npm_says_what_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(ConfigError, match="no npm") as caught:
        ensure_anvil(env={"XDG_CACHE_HOME": str(tmp_path), "PATH": str(tmp_path)})
    assert "gpumarket[testnet]" in caught.value.hint


def test_install_that_npm_cannot_fetch_gives_its_reason_and_leaves_nothing(tmp_path: Path) -> None:
    program(tmp_path / "npm", "echo 'npm error network is down' >&2; exit 1")
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    with pytest.raises(Unreachable, match="network is down"):
        ensure_anvil(env=env)
    assert [path.name for path in (tmp_path / "cache" / "gpumarket").iterdir()] == [f"anvil-{anvil_install.ANVIL_VERSION}.lock"]


def test_install_that_brings_no_binary_is_refused(tmp_path: Path) -> None:
    program(tmp_path / "npm", "exit 0")
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    with pytest.raises(ConfigError, match="npm brought no anvil"):
        ensure_anvil(env=env)


def test_install_happens_once_and_says_so(tmp_path: Path) -> None:
    binary = tmp_path / "cache" / "gpumarket" / f"anvil-{anvil_install.ANVIL_VERSION}" / anvil_install._binary_name()
    relative = anvil_install._binary_name()
    program(tmp_path / "npm", f"echo run >> {tmp_path}/runs; test -f package-lock.json && mkdir -p {relative.parent} && : > {relative}")
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    said: list[str] = []
    assert ensure_anvil(progress=said.append, env=env) == binary
    assert ensure_anvil(progress=said.append, env=env) == binary
    assert (tmp_path / "runs").read_text() == "run\n"
    assert len(said) == 1


def test_install_takes_the_binary_that_the_user_names_or_refuses_it(tmp_path: Path) -> None:
    mine = program(tmp_path / "mine", "exit 0")
    assert ensure_anvil(env={"GPUMARKET_ANVIL": str(mine)}) == mine
    with pytest.raises(ConfigError, match="GPUMARKET_ANVIL"):
        ensure_anvil(env={"GPUMARKET_ANVIL": str(tmp_path / "none")})

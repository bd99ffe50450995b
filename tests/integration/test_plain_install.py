"""`pip install gpumarket` without extras: the SDK and the command line work, and neither torch nor libp2p is there.

The plain environment is put together from this one: the wheel, and of all packages only those that the wheel's metadata leads to. So a
package that is used and not declared is missing here. One slow test lets pip do it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
ABSENT = (
    "torch",
    "libp2p",
    "trio",
    "alembic",
    "psycopg",
    "transformers",
    "safetensors",
    "psutil",
    "pytest",
    "prometheus_client",
    "opentelemetry",
)


@dataclass(frozen=True)
class Install:
    """An environment and a home of its own."""

    python: Path
    home: Path

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": os.environ["PATH"], "HOME": str(self.home)}
        return subprocess.run([str(self.python), *words], env=env, cwd=self.home, capture_output=True, text=True, timeout=120)

    def gpumarket(self, *words: str) -> tuple[int, Any]:
        done = self.call("-m", "gpumarket.cli.main", *words, "-o", "json")
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def plain(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Install:
    folder = tmp_path_factory.mktemp("plain")
    venv.create(folder / "env", symlinks=True)
    packages = next((folder / "env" / "lib").glob("python*")) / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (info,) = packages.glob("gpumarket-*.dist-info")
    for distribution in reached(metadata.Distribution.at(info).requires or []):
        for path in tops(distribution):
            if not (packages / path.name).exists():
                (packages / path.name).symlink_to(path)
    (folder / "home").mkdir()
    return Install(folder / "env" / "bin" / "python", folder / "home")


def reached(lines: list[str]) -> Iterator[metadata.Distribution]:
    """The distributions that these requirements lead to, each once; what an unasked extra wants is none of it."""
    todo, seen = [(line, "") for line in lines], set()
    while todo:
        line, extra = todo.pop()
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        found = metadata.distribution(wanted.name)
        for asked in ("", *wanted.extras):
            if (wanted.name, asked) not in seen:
                seen.add((wanted.name, asked))
                todo += [(inner, asked) for inner in found.requires or []]
                yield found


def tops(distribution: metadata.Distribution) -> set[Path]:
    """What a distribution puts into site-packages."""
    names = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
    return {Path(str(distribution.locate_file(name))) for name in names}


def test_plain_install_imports_the_sdk_and_holds_nothing_of_the_extras(plain: Install) -> None:
    done = plain.call("-c", "from gpumarket.sdk import Client, ClientSettings; print(ClientSettings().state)")
    assert done.returncode == 0, done.stderr
    for package in ABSENT:
        assert plain.call("-c", f"import {package}").returncode == 1, f"{package} is there"


def test_plain_install_makes_a_wallet_and_tells_its_address(plain: Install) -> None:
    password = plain.home / "password"
    password.touch(mode=0o600)
    password.write_text("a password of some length\n")
    code, made = plain.gpumarket("wallet", "create", "--key-file", "key.json", "--password-file", str(password))
    assert code == 0, made
    code, shown = plain.gpumarket("wallet", "address", "--key-file", "key.json")
    assert code == 0 and shown["address"] == made["address"]


def test_plain_install_answers_help_of_every_noun(plain: Install) -> None:
    code = "import sys; from gpumarket.cli import main; sys.exit(max(main.run([noun, '--help']) for noun in main.NOUNS))"
    done = plain.call("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "extra"),
    [("provider start", "provider"), ("scheduler start", "scheduler"), ("testnet up", "testnet"), ("demo", "testnet")],
)
def test_plain_install_names_the_extra_that_a_noun_needs(plain: Install, words: str, extra: str) -> None:
    code, document = plain.gpumarket(*words.split())
    assert code == 3
    assert (document["error"]["code"], document["error"]["hint"]) == ("missing_extra", f"pip install 'gpumarket[{extra}]'")


def test_plain_install_lets_doctor_tell_which_extras_are_missing(plain: Install) -> None:
    _, findings = plain.gpumarket("doctor")
    told = " ".join(finding["next"] for finding in findings)
    assert all(f"gpumarket[{extra}]" in told for extra in ("p2p", "provider", "scheduler", "testnet")), findings


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pip_install_without_extras_works_and_brings_no_torch_and_no_libp2p(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True, symlinks=True)
    install = Install(tmp_path / "env" / "bin" / "python", tmp_path)
    command = [str(install.python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)  # with the caller's own index settings
    assert done.returncode == 0, done.stderr
    test_plain_install_imports_the_sdk_and_holds_nothing_of_the_extras(install)
    test_plain_install_makes_a_wallet_and_tells_its_address(install)
    assert (tmp_path / "env" / "bin" / "gpumarket").exists()

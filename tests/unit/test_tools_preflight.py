"""tools/preflight.sh: what pip cannot install is found missing before a long build fails, and the packages are named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "preflight.sh"
PYTHON = str(Path(sys.executable).resolve())


def preflight(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", str(SCRIPT), *words], env={**os.environ, **env}, capture_output=True, text=True, timeout=60)


def program(folder: Path, name: str, text: str) -> str:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


@pytest.fixture
def compiler(tmp_path: Path) -> str:
    """One that has every header but what $WITHOUT names."""
    return program(tmp_path, "some-cc", 'source=$(cat)\ncase $source in *"$WITHOUT"*) exit 1 ;; esac')


def test_preflight_with_everything_prints_the_interpreter_alone(compiler: str) -> None:
    done = preflight(PYTHON, CC=compiler, WITHOUT="nothing.h")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, PYTHON, "")


@pytest.mark.parametrize(("header", "package"), [("gmp.h", "libgmp-dev"), ("Python.h", "python3-dev")])
def test_preflight_without_a_header_names_it_and_its_package(compiler: str, header: str, package: str) -> None:
    done = preflight(PYTHON, CC=compiler, WITHOUT=header)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"({header})" in done.stderr and package in done.stderr
    assert done.stderr.count("  - ") == 1, "nothing else is missing"


def test_preflight_without_a_compiler_says_so() -> None:
    done = preflight(PYTHON, CC="no-such-compiler")
    assert (done.returncode, done.stdout) == (1, "")
    assert "a C compiler (no-such-compiler)" in done.stderr and "gcc" in done.stderr


@pytest.mark.parametrize("version", ["3.10", "3.14"])
def test_preflight_with_another_python_says_which_it_takes(tmp_path: Path, compiler: str, version: str) -> None:
    """A python that runs the script's own question as if it were of that version."""
    pretend = f"\"import sys; sys.version_info = tuple(map(int, '{version}.0'.split('.'))); $2\""
    other = program(tmp_path, f"python{version}", f"exec {PYTHON} -c {pretend}")
    done = preflight(other, CC=compiler, WITHOUT="nothing.h")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"Python 3.11, 3.12 or 3.13 ({other} is not one" in done.stderr


def test_preflight_finds_a_python_by_itself(tmp_path: Path, compiler: str) -> None:
    for name in ("sh", "cat"):
        os.symlink(str(shutil.which(name)), tmp_path / name)
    (tmp_path / "python3").symlink_to("/nowhere")
    program(tmp_path, "python3.12", f'exec {PYTHON} "$@"')
    done = preflight(CC=compiler, WITHOUT="nothing.h", PATH=str(tmp_path))
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "python3.12"))

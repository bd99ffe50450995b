"""The peer's own key: an ed25519 seed in a file that only its owner can read.

This is no wallet key: whoever steals it can speak as this peer id, not sign an offer. Invariant: the file is created with mode 0600
and refused when anyone else could read or replace its content. The seed is never logged.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from gpumarket.core.errors import ConfigError, KeyFileExposed

_SEED_BYTES = 32


def load_or_create_seed(path: Path, fresh_seed: bytes) -> bytes:
    """The 32-byte seed in `path` (64 hex digits); written from `fresh_seed` when there is no file yet.

    Raises KeyFileExposed when group or others have any right on the file or it belongs to another user, ConfigError when it is not a
    regular file or does not hold a seed.
    """
    if len(fresh_seed) != _SEED_BYTES:
        raise ValueError(f"a seed has {_SEED_BYTES} bytes, got {len(fresh_seed)}")
    try:
        return _load(path)
    except FileNotFoundError:
        _create(path, fresh_seed)
        return _load(path)
    except OSError as error:
        raise ConfigError(f"cannot read the p2p identity {path}: {error.strerror}", hint=f"ls -l {path}") from error


def _load(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        _refuse_exposed(path, os.fstat(file.fileno()))
        text = file.read(2 * _SEED_BYTES + 2)
    try:
        seed = bytes.fromhex(text.decode("ascii").strip())
    except ValueError:
        seed = b""
    if len(seed) != _SEED_BYTES:
        raise ConfigError(
            f"{path} is not a p2p identity (64 hex digits)",
            hint="restore it from a backup, or move it away to start under a new peer id",
        )
    return seed


def _refuse_exposed(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"the p2p identity {path} is not a regular file", hint="name a file in the daemon's state folder")
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077 or status.st_uid != os.getuid():
        raise KeyFileExposed(f"the p2p identity {path} has mode {mode:04o}: others can use it", hint=f"chmod 600 {path}")


def _create(path: Path, seed: bytes) -> None:
    """Whole or not at all: written beside, then linked under its name, which fails when another process was first."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(seed.hex().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return  # another process created it first: its seed is the identity
    finally:
        os.unlink(draft)

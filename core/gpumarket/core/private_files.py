"""Files that only their owner may read: keys and passwords. Refused like ssh refuses them, with the command that mends it.

What is judged is what is read: the file is opened first, without following a link, and its descriptor is looked at. Invariant: what
`create` wrote is mode 0600 under folders of mode 0700, whole or not there at all, and replaced nothing. Never: a mode changed for the user.
"""

from __future__ import annotations

import errno
import os
import secrets
import shlex
import stat
from pathlib import Path

from gpumarket.core.errors import KeyFileExposed, WalletError

SIZE_MAX = 1 << 20
"""No key or password file is larger, in bytes."""


def read(path: Path, *, missing_hint: str = "") -> bytes:
    """The content of a private file. Raises WalletError (missing, unreadable, too large) or KeyFileExposed (others can use it)."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise WalletError(f"{path} does not exist", hint=missing_hint) from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise KeyFileExposed(f"{path} is a symbolic link", hint=f"name the file itself: {path.resolve()}") from None
        raise WalletError(f"cannot read {path}: {error.strerror}", hint=f"ls -l {shlex.quote(str(path))}") from error
    with os.fdopen(handle, "rb") as file:
        _require_own(path, os.fstat(handle))
        require_safe_folder(path.parent)
        content = file.read(SIZE_MAX + 1)
    if len(content) > SIZE_MAX:
        raise WalletError(f"{path} is larger than {SIZE_MAX} bytes: no key or password is")
    return content


def create(path: Path, content: bytes, *, anywhere: bool = False) -> None:
    """Write a new private file: a draft (O_EXCL, 0600), synced, linked to its name, the folder synced.

    Raises WalletError when there is something at `path` already, KeyFileExposed when others can write to its folder (unless `anywhere`:
    for files whose content proves itself).
    """
    refuse_existing(path)
    _make_folders(path.parent)
    if not anywhere:
        require_safe_folder(path.parent)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o600)  # whatever the umask took away
            file.write(content)
            file.flush()
            os.fsync(handle)
        os.link(draft, path)  # unlike a rename it refuses to replace
    except FileExistsError:
        refuse_existing(path)
        raise
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def refuse_existing(path: Path) -> None:
    """Raises WalletError when there is something at `path`, a link to nowhere included."""
    if path.is_symlink() or path.exists():
        raise WalletError(f"{path} exists; such a file is never overwritten", hint="give another file, or move this one away")


def require_safe_folder(folder: Path) -> None:
    """Raises KeyFileExposed when others could replace what lies in `folder`: it, or a folder above it, is theirs to write."""
    real = folder.resolve()
    for place in (real, *real.parents):
        info = place.stat()
        if info.st_mode & stat.S_ISVTX:
            continue  # sticky: entries are replaced by their owners only
        if info.st_mode & 0o002 or (place == real and info.st_mode & 0o020):
            mode, bits = stat.S_IMODE(info.st_mode), "go-w" if place == real else "o-w"
            raise KeyFileExposed(
                f"others can write to the folder {place} (mode {mode:04o})", hint=f"chmod {bits} {shlex.quote(str(place))}"
            )
    if real.stat().st_uid not in (0, os.geteuid()):
        raise KeyFileExposed(f"the folder {real} belongs to another user", hint=f"chown {os.geteuid()} {shlex.quote(str(real))}")


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _require_own(path: Path, info: os.stat_result) -> None:
    name = shlex.quote(str(path))
    if not stat.S_ISREG(info.st_mode):
        raise KeyFileExposed(f"{path} is not a regular file", hint="keep keys and passwords in plain files")
    if info.st_uid != os.geteuid():
        raise KeyFileExposed(f"{path} belongs to another user", hint=f"chown {os.geteuid()} {name}")
    if info.st_mode & 0o077:
        raise KeyFileExposed(f"{path} can be used by others (mode {stat.S_IMODE(info.st_mode):04o})", hint=f"chmod 600 {name}")


def _make_folders(folder: Path) -> None:
    """Every folder that is missing, each with mode 0700 (`Path.mkdir` gives the ones above the default mode)."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(mode=0o700, exist_ok=True)

"""Files by the SHA-256 of their content.

Invariant: a file under its final name has the content that the name says; it got there by one rename, after it was written, hashed and
synced. Adding what is there already costs one read of the source, so an interrupted import continues where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from gpumarket.core.errors import ConfigError, UnknownModel
from gpumarket.core.units import Hash

CHUNK_BYTES: Final = 1 << 20


class BlobStore:
    """Blobs below `root`, in 256 folders."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, sha256: Hash) -> Path:
        """Where a blob is or would be."""
        return self._root / sha256.hex()[:2] / sha256.hex()

    def add(self, source: Path, progress: Callable[[int], None], *, link: bool) -> tuple[Hash, int]:
        """Take a file in; its hash and size. `progress` is told the bytes read so far.

        `link` makes a hard link instead of a copy where the file system can: no space, but whoever edits the source in place edits the
        blob, which `verify` finds. Raises ConfigError when the file changes while it is read.
        """
        sha256, size = hash_file(source, progress)
        target = self.path(sha256)
        if target.exists() and target.stat().st_size == size:
            return sha256, size
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (link and _linked(source, target)):
            self._copy(source, target, sha256)
        _sync_folder(target.parent)
        return sha256, size

    def put(self, content: bytes) -> Hash:
        """Take a small file in; its hash."""
        sha256 = Hash(hashlib.sha256(content).digest())
        if not self.path(sha256).exists():
            write_atomically(self.path(sha256), content)
            self.path(sha256).chmod(0o444)
        return sha256

    def verify(self, sha256: Hash, size: int) -> None:
        """Raise ConfigError unless the blob is there with that size and its content has that hash."""
        target = self.path(sha256)
        if not target.exists():
            raise ConfigError(f"blob {sha256.hex()[:12]} is missing from the model store", hint="gpumarket model add the model again")
        if target.stat().st_size != size or hash_file(target, lambda _: None)[0] != sha256:
            raise ConfigError(f"blob {sha256.hex()[:12]} of the model store was changed", hint="remove it and gpumarket model add again")

    def read(self, sha256: Hash, limit: int) -> bytes:
        """A whole blob. UnknownModel when it is not here, ConfigError when it is over `limit` bytes or damaged."""
        target = self.path(sha256)
        if not target.exists():
            raise UnknownModel(f"there is no blob {sha256.hex()[:12]} here", hint="ask another provider of this model")
        if target.stat().st_size > limit:
            raise ConfigError(f"blob {sha256.hex()[:12]} is over {limit} bytes", hint="read it in pieces from its path")
        content = target.read_bytes()
        if hashlib.sha256(content).digest() != sha256:
            raise ConfigError(f"blob {sha256.hex()[:12]} of the model store was changed", hint="remove it and gpumarket model add again")
        return content

    def _copy(self, source: Path, target: Path, sha256: Hash) -> None:
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".partial-", delete=False) as draft:
            try:
                with source.open("rb") as file:
                    while chunk := file.read(CHUNK_BYTES):
                        digest.update(chunk)
                        draft.write(chunk)
                if digest.digest() != sha256:
                    raise ConfigError(f"{source.name} changed while it was read", hint="try again when nobody writes to it")
                draft.flush()
                os.fchmod(draft.fileno(), 0o444)
                os.fsync(draft.fileno())
                os.replace(draft.name, target)
            except BaseException:
                Path(draft.name).unlink(missing_ok=True)
                raise


def hash_file(path: Path, progress: Callable[[int], None]) -> tuple[Hash, int]:
    """SHA-256 and size of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            progress(size)
    return Hash(digest.digest()), size


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a small file: after a crash it has the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".partial-", delete=False) as draft:
        try:
            draft.write(content)
            draft.flush()
            os.fsync(draft.fileno())
            os.replace(draft.name, path)
        except BaseException:
            Path(draft.name).unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


def _linked(source: Path, target: Path) -> bool:
    """Whether a hard link could be made; not across file systems, and not where the owner forbids it."""
    try:
        os.link(source, target)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

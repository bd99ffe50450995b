"""The seal beside a SQLite journal (`journal.db.seal`): a checksum of every page of its file, and whether the journal is in use.

SQLite notices a page that it cannot parse; an amount with a flipped bit, an older copy of the file, a log that was deleted or cut short
look fine to it. So each page has a CRC-32 here, renewed after every checkpoint (in WAL mode nothing else changes the file), and a page
that differs must lie in the write-ahead log, which has checksums of its own. What cannot be explained so is refused.
Before SQLite lets go of the file, and writes its log into it, the seal is told what the file will then be (CLOSING): whoever finds it
killed halfway, or closed after a failure, holds the file against that, and does not believe the very disk that failed.
Invariant: in state OPEN the log exists and is not empty. Never: a file repaired, a damaged one believed; nor the database or its shared
memory closed here while SQLite has them open: closing any descriptor of a file drops all POSIX locks that the process has on it, SQLite's
too, and another process would then take the journal for abandoned. So what is read in use is held open until SQLite has let go (`release`).
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from gpumarket.core.errors import JournalError
from gpumarket.settlement.wal import Due, Log, due_pages, frames_in_use, read_log

OPEN, CLOSING, CLOSED = b"O", b"X", b"C"
"""In use, or killed while it was; being closed (the log goes into the file) or closed after a failure; closed in good order."""
SUFFIX = ".seal"
_MAGIC = b"gpumarket journal seal 1\n"
_HEAD = struct.Struct(">III")  # page size, pages, CRC-32 of both and of the sums
_DUE = struct.Struct(">III")  # pages of the file once the log is in it, how many of them change, CRC-32 of both and of the changes
_CHANGE = struct.Struct(">II")  # page, its CRC-32 then
_RESERVE_BYTES = 65_536
"""Written in advance behind the sums: on a full disk, too, there is room for what changes when the journal is closed."""
_NEW = 0o600


class Seal:
    """The seal of one database file. `examine` before SQLite opens it, `open` after, then `renew`, `closing`, `close` in their turn."""

    def __init__(self, database: Path) -> None:
        self.database = database
        self.file = database.with_name(database.name + SUFFIX)
        self.log = database.with_name(database.name + "-wal")
        self._state, self._page_size, self._sums = b"", 0, array("I")
        self._held: list[int] = []

    @property
    def shared(self) -> int:
        """Descriptor of the shared memory of the open journal."""
        return self._held[1]

    def examine(self) -> None:
        """As `inspect`; then make the file where there is none, and all of them readable by their owner only."""
        self.inspect()
        self._make_private()

    def inspect(self) -> None:
        """Compare file and log with the seal. Changes nothing.

        Raises JournalError for a file that is missing, empty, damaged, cut short or older than its seal, and for a log that is.
        """
        found = self._read()
        present = self.database.exists() and self.database.stat().st_size > 0
        if found is not None and not present:
            self._refuse("is " + ("empty" if self.database.exists() else "gone") + ", and it held money")
        if found is None:
            return
        log = read_log(self.log)
        if found == CLOSING and log is not None and log.broken:
            log = None  # right once everything that it held is in the file; `_compare` tells
        if found == OPEN and log is None:
            self._refuse("was in use when its process ended, and its write-ahead log is gone: the newest entries would be missing")
        if found == OPEN and log is not None and log.broken:
            self._refuse(f"has a damaged write-ahead log: {log.broken}")
        self._compare(log)

    def open(self) -> None:
        """Seal what is there, as in use: SQLite has it open, and the log holds at least one commit by now."""
        self._hold()
        self._sums = array("I")
        self._sum(())
        self._write(OPEN)

    def renew(self, pages: Iterable[int]) -> None:
        """After a checkpoint that may have written these pages (numbers from 1); pages that are new to the file are found."""
        self._sum(pages)
        self._write(OPEN)

    def closing(self) -> None:
        """SQLite is about to write its log into the file: note what the file will be. In place where there is room: a disk may be full.

        To be called while SQLite has the file open and nobody writes; without a log in use there is nothing to note.
        """
        if not self.file.exists() or not self._shared_file.exists():
            return
        self._hold()
        due = due_pages(self.log, frames_in_use(self.log, self.shared))
        block, at = _due_block(due), len(_MAGIC) + 1 + _HEAD.size + 4 * len(self._sums)
        if self._state == OPEN and len(block) <= _RESERVE_BYTES:
            with self.file.open("r+b") as file:
                for place, data in ((at, block), (len(_MAGIC), CLOSING)):
                    file.seek(place)
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        else:
            self._write(CLOSING, block)
        self._state = CLOSING
        self._apply(due)

    def release(self) -> None:
        """SQLite has closed its last connection: let go of the files, too."""
        while self._held:
            os.close(self._held.pop())

    def close(self) -> None:
        """Seal what must be there now, as closed. After `closing` and `release`."""
        self._write(CLOSED)

    # --- inside --------------------------------------------------------------------------------------------------------------

    def _read(self) -> bytes | None:
        """State of the seal, None where there is no seal yet. Raises JournalError for one that is damaged."""
        try:
            raw = self.file.read_bytes()
        except FileNotFoundError:
            return None
        state, rest = raw[len(_MAGIC) : len(_MAGIC) + 1], raw[len(_MAGIC) + 1 :]
        if not raw.startswith(_MAGIC) or state not in (OPEN, CLOSING, CLOSED) or len(rest) < _HEAD.size:
            self._refuse("has a damaged seal")
        self._state = state
        self._page_size, count, crc = _HEAD.unpack_from(rest)
        body, due = rest[_HEAD.size : _HEAD.size + 4 * count], rest[_HEAD.size + 4 * count :]
        if len(body) != 4 * count or crc != _crc(self._page_size, count, body):
            self._refuse("has a damaged seal")
        self._sums = array("I")
        self._sums.frombytes(body)
        if state == CLOSING:
            self._apply(self._due(due))
        return state

    def _due(self, data: bytes) -> Due:
        """What `_due_block` wrote. Raises JournalError for one that is damaged."""
        if len(data) >= _DUE.size:
            count, many, crc = _DUE.unpack_from(data)
            changes = data[_DUE.size : _DUE.size + _CHANGE.size * many]
            if len(changes) == _CHANGE.size * many and crc == _crc(count, many, changes):
                return Due(dict(_CHANGE.iter_unpack(changes)), count)
        self._refuse("has a damaged seal")

    def _apply(self, due: Due) -> None:
        """The sums once the log is in the file; a page that no frame ever wrote is a hole."""
        if not due.count:
            return
        del self._sums[due.count :]
        self._sums.extend([zlib.crc32(bytes(self._page_size))] * (due.count - len(self._sums)))
        for page, crc in due.sums.items():
            if page <= due.count:
                self._sums[page - 1] = crc

    @property
    def _shared_file(self) -> Path:
        return self.database.with_name(self.database.name + "-shm")

    def _hold(self) -> None:
        if not self._held:
            for file in (self.database, self._shared_file):
                self._held.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))

    def _sum(self, pages: Iterable[int]) -> None:
        handle = self._held[0] if self._held else os.open(self.database, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._page_size = self._page_size or _page_size(os.pread(handle, 18, 0))
            count = os.fstat(handle).st_size // self._page_size
            fresh = range(len(self._sums) + 1, count + 1)
            self._sums.extend([0] * len(fresh))
            for page in (*pages, *fresh):
                if page <= count:
                    self._sums[page - 1] = zlib.crc32(os.pread(handle, self._page_size, (page - 1) * self._page_size))
        finally:
            if not self._held:
                os.close(handle)

    def _write(self, state: bytes, more: bytes = b"") -> None:
        body, count = self._sums.tobytes(), len(self._sums)
        draft = self.file.with_name(self.file.name + ".new")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _NEW)
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + state + _HEAD.pack(self._page_size, count, _crc(self._page_size, count, body)) + body)
            file.write(bytes(_RESERVE_BYTES) if state == OPEN else more)
            file.flush()
            os.fsync(handle)
        draft.rename(self.file)
        _sync(self.file.parent)
        self._state = state

    def _compare(self, log: Log | None) -> None:
        logged = log.pages if log is not None else frozenset[int]()
        different = []
        with self.database.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            count = -(-size // self._page_size)
            for page in range(1, max(count, len(self._sums)) + 1):
                data = file.read(self._page_size)
                known = page <= len(self._sums) and zlib.crc32(data) == self._sums[page - 1]
                if not known and page not in logged:
                    different.append(page)
        if different:
            some = ", ".join(str(page) for page in different[:5])
            self._refuse(
                f"is not the file that was last in use here: {len(different)} of {len(self._sums)} pages differ (page {some}). "
                "It is damaged, or an older copy"
            )

    def _make_private(self) -> None:
        """The database exists and only its owner reads it; SQLite gives its log and shared memory the same mode."""
        folder = self.database.parent
        if not self.database.exists():
            try:
                os.close(os.open(self.database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _NEW))
            except OSError as error:
                raise JournalError(
                    f"the journal {self.database} cannot be opened: {error.strerror}",
                    hint="check that the folder exists, is writable and has space; never delete a journal that holds money",
                ) from error
            _sync(folder)
        for name in ("", "-wal", "-shm", SUFFIX):
            file = self.database.with_name(self.database.name + name)
            if file.exists() and stat.S_IMODE(file.stat().st_mode) & 0o077:
                file.chmod(_NEW)

    def _refuse(self, what: str) -> NoReturn:
        raise JournalError(
            f"the journal {self.database} {what}",
            hint=f"gpumarket doctor rescue {self.database.parent} shows what can be read of it. Bring the right file back; or, if you mean "
            f"to go on with what is there, remove {self.file}: what peers and the chain know is asked before anything is signed",
        )


def _page_size(header: bytes) -> int:
    """From the database's header (sqlite.org/fileformat2.html#page_size); 1 stands for 65,536."""
    size = int.from_bytes(header[16:18], "big")
    return 65_536 if size == 1 else size


def _crc(page_size: int, count: int, body: bytes) -> int:
    return zlib.crc32(struct.pack(">II", page_size, count) + body)


def _due_block(due: Due) -> bytes:
    changes = b"".join(_CHANGE.pack(page, crc) for page, crc in due.sums.items())
    return _DUE.pack(due.count, len(due.sums), _crc(due.count, len(due.sums), changes)) + changes


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

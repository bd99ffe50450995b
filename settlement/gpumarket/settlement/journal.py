"""The journal: every change of money is committed here before anybody hears of it (I2).

One writer thread; submissions that wait while a commit is under way share the next one (group commit), each in its own SAVEPOINT, so one
that fails takes nothing else with it. SQLite in WAL mode with synchronous=FULL and a seal beside the file (`seal`), or PostgreSQL by URL
(`postgres`): there one session writes, holds the database against every other process, and is looked at while nothing is written.
When a commit fails, or that session ends, what is durable is unknown: from then on the journal refuses everything (I10) until the process
starts again and reads what is there.
Never: an answer before the commit, a write outside the writer thread.
"""

from __future__ import annotations

import asyncio
import errno
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    Connection,
    Dialect,
    Engine,
    MetaData,
    String,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.types import TypeDecorator, TypeEngine

from gpumarket.core.errors import GpumarketError, JournalError
from gpumarket.core.units import MONEY_MAX, Money
from gpumarket.settlement.database import check_version, claim, engine_of, quick_check, shown
from gpumarket.settlement.seal import Seal
from gpumarket.settlement.space import Space, free_bytes
from gpumarket.settlement.wal import frames_in_use, logged_pages

T = TypeVar("T")
BATCH_MAX = 512
CHECKPOINT_FRAMES = 1_000
"""Frames of the write-ahead log (about 4 MB) after which they are written into the database's file."""
CHECKPOINT_BATCHES = 16
"""How often its length is looked at."""
WATCH_SECONDS = 2.0
"""How often an idle session of a server is looked at: what was lost with it is noticed before somebody asks for a signature."""
_DIGITS = len(str(MONEY_MAX))
_MEND = "stop the process, free or mend the disk, start again: what is committed is read back"
_MEND_OPENING = "check that the folder exists, is writable and has space; never delete a journal that holds money"
MEND_SERVER = "check that the database server runs and lets this user in, then start again: what is committed is read back"


class MoneyType(TypeDecorator[Money]):
    """uint96 as decimal text of fixed width: exact on every database, and its text order is the order of the amounts."""

    impl = String(_DIGITS)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Text, in the order of its bytes whatever the language of the database."""
        if dialect.name == "postgresql":
            return dialect.type_descriptor(String(_DIGITS, collation="C"))
        return dialect.type_descriptor(String(_DIGITS))

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value <= MONEY_MAX:
            raise ValueError(f"{value!r} does not fit uint96")
        return f"{value:0{_DIGITS}d}"

    def process_result_value(self, value: Any, dialect: Dialect) -> Money | None:
        return None if value is None else Money(int(value))


@dataclass(slots=True)
class _Submission:
    work: Callable[[Connection], Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    result: Any = None
    error: BaseException | None = None


class Journal:
    """`open` it, `await transact(...)` for every change, `await close()`.

    `metadata` are the tables of the role; `metadata.info["version"]` (default 1) is their version. `committed` counts submissions that are
    durable, `batches` the commits that they took.
    """

    def __init__(self, url: str, metadata: MetaData) -> None:
        self.url, self.metadata = url, metadata
        self.committed = 0
        self.batches = 0
        self._seal = seal_of(url)
        self._space = Space(self._seal.database) if self._seal is not None else None
        self._checkpointed = 0
        self._writer: Engine | None = None
        self._reader: Engine | None = None
        self._connection: Connection | None = None
        self._reading: Connection | None = None
        """Kept for the reads of the thread that opened a SQLite journal: taking one from the pool costs more than most of them."""
        self._read_by = 0
        self._queue: queue.SimpleQueue[_Submission | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: str = ""
        self._closed = False

    def open(self) -> None:
        """Check the database, create what is missing, start the writer. Raises JournalError when it is damaged or of another version."""
        self._writer, self._reader = engine_of(self.url, read_only=False), engine_of(self.url, read_only=True)
        begun = False
        try:
            if self._seal is not None:
                self._seal.examine()
            self._connection = self._writer.connect()  # the writer's own for all its life: taking one for each commit costs as much again
            claim(self._connection)
            with self._connection.begin():
                begun = True
                quick_check(self._connection)
                check_version(self._connection, self.metadata)
            if self._seal is not None:
                self._seal.open()
                self._reading, self._read_by = self._reader.connect(), threading.get_ident()
        except BaseException as error:
            if begun and self._seal is not None:
                with suppress(OSError):  # where the disk takes nothing, SQLite leaves its log, too, and the seal stays right
                    self._seal.closing()
            self._dispose()
            if not isinstance(error, SQLAlchemyError | OSError):
                raise
            raise JournalError(
                f"the journal {shown(self.url)} cannot be opened: {_reason(error)}",
                hint=_MEND_OPENING if self._seal is not None else MEND_SERVER,
            ) from error
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    async def transact(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in the writer thread and return its result once the transaction that holds it is durably committed.

        An exception of `work` rolls back its own changes only and is raised here. Raises JournalError when the commit failed, now or
        before. A cancelled caller's work is committed all the same: whoever must act on the result runs in a task that is not cancelled.
        """
        self._refuse_broken()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._queue.put(_Submission(work, future, loop))
        return await future

    def require_whole(self) -> None:
        """Raises JournalError once it has failed, also when nobody submits anything."""
        if self._failure:
            raise JournalError(self._failure, hint=self._mend)

    def require_space(self) -> None:
        """Before new paid work: raises Busy while the disk has little room for what would have to be written about it."""
        if self._space is not None:
            self._space.require()

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` on a read-only connection in the calling thread; it sees what is committed."""
        if self._reader is None:
            raise JournalError("the journal is not open")
        kept = self._reading
        if kept is not None and threading.get_ident() == self._read_by and not kept.in_transaction():
            with kept.begin():
                return work(kept)
        with self._reader.connect() as connection, connection.begin():  # one view for all that is read
            return work(connection)

    async def close(self) -> None:
        """Commit what is submitted, then stop. Idempotent."""
        if self._closed or self._thread is None:
            return
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        try:
            if self._seal is not None:
                self._seal.closing()
            self._dispose()
            if self._seal is not None and not self._failure:
                self._seal.close()
        except OSError as error:
            if not self._failure:  # which has been told already, and is why
                raise JournalError(
                    f"the journal {shown(self.url)} could not be closed in good order: {_reason(error)}", hint=_MEND
                ) from error

    def _dispose(self) -> None:
        for connection in (self._connection, self._reading):
            if connection is not None:
                connection.close()
        self._connection = self._reading = None
        for engine in (self._reader, self._writer):
            if engine is not None:
                engine.dispose()
        if self._seal is not None:
            self._seal.release()

    @property
    def _mend(self) -> str:
        return _MEND if self._seal is not None else MEND_SERVER

    def _refuse_broken(self) -> None:
        self.require_whole()
        if self._closed or self._thread is None:
            raise JournalError("the journal is not open")

    # --- writer thread -----------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        running = True
        while running:
            try:
                batch, running = self._next_batch()
            except queue.Empty:
                self._watch()
                continue
            if not batch:
                continue
            if self._failure:
                self._fail(batch)
            else:
                self._commit(batch)
            _answer(batch)

    def _next_batch(self) -> tuple[list[_Submission], bool]:
        first = self._queue.get(timeout=WATCH_SECONDS if self._seal is None and not self._failure else None)
        if first is None:
            return [], False
        batch = [first]
        while len(batch) < BATCH_MAX:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is None:
                return batch, False
            batch.append(item)
        return batch, True

    def _commit(self, batch: list[_Submission]) -> None:
        assert self._connection is not None
        try:
            if len(batch) == 1 and self._seal is not None:
                _run_alone(self._connection, batch[0])
            else:
                with self._connection.begin():
                    for item in batch:
                        _run(self._connection, item)
        except Exception as error:
            self._break("failed to commit", error)
            self._fail(batch)
        else:
            self.batches += 1
            self.committed += sum(item.error is None for item in batch)
            self._checkpoint()

    def _watch(self) -> None:
        """Look whether the session still lives, and with it our hold on the database."""
        assert self._connection is not None
        try:
            with self._connection.begin():
                self._connection.exec_driver_sql("SELECT 1")
        except Exception as error:
            self._break("lost its database", error)

    def _checkpoint(self) -> None:
        """Write the log into the file when it is long, and seal what was written. The batch is durable before and whatever happens here.
        Put off while no file can be opened: the log only grows. Any other failure ends the journal for good."""
        if self._seal is None or self._connection is None or self.batches % CHECKPOINT_BATCHES:
            return
        try:
            frames = frames_in_use(self._seal.log, self._seal.shared)
            self._checkpointed = min(self._checkpointed, frames)  # a log that was all written begins anew
            if frames - self._checkpointed < CHECKPOINT_FRAMES:
                return
            pages = logged_pages(self._seal.log)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                self._break("failed at a checkpoint", error)
            return
        try:
            self._connection.connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)")  # between transactions
            self._seal.renew(pages)
            self._checkpointed = frames
        except Exception as error:
            self._break("failed at a checkpoint", error)

    def _break(self, what: str, error: Exception) -> None:
        room = f"; {free_bytes(self._seal.database.parent)} bytes are free there" if self._seal is not None else ""
        self._failure = f"the journal {shown(self.url)} {what}: {_reason(error)}{room}; nothing more is signed or released"

    def _fail(self, batch: list[_Submission]) -> None:
        for item in batch:
            item.error = JournalError(self._failure, hint=self._mend)


class _Undone(Exception):
    """A lone submission failed: its transaction is rolled back, and the journal goes on."""


def _run_alone(connection: Connection, item: _Submission) -> None:
    """A lone submission needs no savepoint, for which SQLite would copy every page that it changes. PostgreSQL needs one: it answers the
    commit of a transaction in which a statement failed, whoever swallowed that, with a rollback and no error."""
    try:
        with connection.begin():
            try:
                item.result = item.work(connection)
            except Exception as error:
                item.error = error
                raise _Undone from error
    except _Undone:
        return


def _run(connection: Connection, item: _Submission) -> None:
    """One submission in its savepoint. Raw SAVEPOINT statements: SQLAlchemy's nested transactions cost several times as much."""
    cursor = connection.connection.cursor()
    cursor.execute("SAVEPOINT submission")
    try:
        item.result = item.work(connection)
    except Exception as error:
        if isinstance(error, OperationalError):
            raise  # the disk or the server, not the work: whatever shares this commit fails with it
        cursor.execute("ROLLBACK TO SAVEPOINT submission")  # fails when the database gave the whole transaction up: then all of it fails
        item.error = error
    cursor.execute("RELEASE SAVEPOINT submission")
    cursor.close()


def _answer(batch: list[_Submission]) -> None:
    """Hand results to their loops, one wake-up per loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Submission]] = {}
    for item in batch:
        by_loop.setdefault(item.loop, []).append(item)
    for loop, items in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_resolve, items)


def _resolve(items: list[_Submission]) -> None:
    for item in items:
        if item.future.done():
            continue
        if item.error is None:
            item.future.set_result(item.result)
        else:
            item.future.set_exception(item.error)


def seal_of(url: str) -> Seal | None:
    """The seal of a SQLite journal's file; None for other databases, which see to their own files."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        return None
    return Seal(Path(str(parsed.database)))


def _reason(error: Exception) -> str:
    if isinstance(error, GpumarketError):
        return error.message
    return " ".join(str(getattr(error, "orig", None) or error).split())  # a server's word has lines

"""The journal: every change of money is committed here before anybody hears of it (I2).

One writer thread; submissions that wait while a commit is under way share the next one (group commit), each in its own SAVEPOINT, so one
that fails takes nothing else with it. SQLite in WAL mode with synchronous=FULL, or any other database by URL.
When a commit fails, what is durable is unknown: from then on the journal refuses everything (I10) until the process starts again and reads
what is there. Never: an answer before the commit, a write outside the writer thread.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Column, Connection, Dialect, Engine, Integer, MetaData, String, Table, create_engine, event, insert, inspect, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.types import TypeDecorator

from gpumarket.core.errors import GpumarketError, JournalError
from gpumarket.core.units import MONEY_MAX, Money

T = TypeVar("T")
BATCH_MAX = 512
_DIGITS = len(str(MONEY_MAX))
_own = MetaData()
_version = Table("journal_version", _own, Column("id", Integer, primary_key=True), Column("version", Integer, nullable=False))


class MoneyType(TypeDecorator[Money]):
    """uint96 as decimal text of fixed width: exact on every database, and its text order is the order of the amounts."""

    impl = String(_DIGITS)
    cache_ok = True

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
        self._writer: Engine | None = None
        self._reader: Engine | None = None
        self._queue: queue.SimpleQueue[_Submission | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: str = ""
        self._closed = False

    def open(self) -> None:
        """Check the database, create what is missing, start the writer. Raises JournalError when it is damaged or of another version."""
        try:
            self._writer = _engine(self.url, read_only=False)
            with self._writer.begin() as connection:
                _quick_check(connection)
                _check_version(connection, self.metadata)
            self._reader = _engine(self.url, read_only=True)
        except SQLAlchemyError as error:
            raise JournalError(
                f"the journal {_shown(self.url)} cannot be opened: {_reason(error)}",
                hint="check that the folder exists, is writable and has space; never delete a journal that holds money",
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

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` on a read-only connection in the calling thread; it sees what is committed."""
        if self._reader is None:
            raise JournalError("the journal is not open")
        with self._reader.connect() as connection:
            return work(connection)

    async def close(self) -> None:
        """Commit what is submitted, then stop. Idempotent."""
        if self._closed or self._thread is None:
            return
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        for engine in (self._writer, self._reader):
            if engine is not None:
                engine.dispose()

    def _refuse_broken(self) -> None:
        if self._failure:
            raise JournalError(self._failure, hint="stop the process, mend the disk, start again: what is committed is read back")
        if self._closed or self._thread is None:
            raise JournalError("the journal is not open")

    # --- writer thread -----------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        assert self._writer is not None
        running = True
        while running:
            batch, running = self._next_batch()
            if not batch:
                continue
            if self._failure:
                self._fail(batch, self._failure)
            else:
                self._commit(batch)
            _answer(batch)

    def _next_batch(self) -> tuple[list[_Submission], bool]:
        first = self._queue.get()
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
        assert self._writer is not None
        try:
            with self._writer.begin() as connection:
                for item in batch:
                    _run(connection, item)
        except Exception as error:
            self._failure = f"the journal {_shown(self.url)} failed to commit: {_reason(error)}; nothing more is signed or released"
            self._fail(batch, self._failure)
        else:
            self.batches += 1
            self.committed += sum(item.error is None for item in batch)

    def _fail(self, batch: list[_Submission], reason: str) -> None:
        for item in batch:
            item.error = JournalError(reason)


def _run(connection: Connection, item: _Submission) -> None:
    """One submission in its savepoint. Raw SAVEPOINT statements: SQLAlchemy's nested transactions cost several times as much."""
    cursor = connection.connection.cursor()
    cursor.execute("SAVEPOINT submission")
    try:
        item.result = item.work(connection)
    except Exception as error:
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


# --- opening -------------------------------------------------------------------------------------------------------------------


def _engine(url: str, *, read_only: bool) -> Engine:
    engine = create_engine(url)
    if engine.dialect.name != "sqlite":
        return engine
    if engine.url.database in (None, "", ":memory:"):
        raise JournalError("a journal in memory would survive nothing", hint="give a file: sqlite:////path/journal.db")

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves: the driver would not open a transaction before SAVEPOINT
        for pragma in ("busy_timeout=5000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")
        if read_only:
            connection.execute("PRAGMA query_only=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def _quick_check(connection: Connection) -> None:
    if connection.dialect.name != "sqlite":
        return
    found = connection.exec_driver_sql("PRAGMA quick_check").scalar_one()
    if found != "ok":
        raise JournalError(f"the journal is damaged: {found}", hint="stop, copy the files away, restore the newest backup")
    if connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() != "wal":
        raise JournalError("the journal's file system does not allow SQLite's WAL mode", hint="put the state folder on a local disk")


def _check_version(connection: Connection, metadata: MetaData) -> None:
    wanted = int(metadata.info.get("version", 1))
    _own.create_all(connection)
    found = connection.execute(select(_version.c.version)).scalar_one_or_none()
    if found is None:
        connection.execute(insert(_version), {"id": 1, "version": wanted})
    elif found != wanted:
        raise JournalError(
            f"the journal has version {found}, this program wants {wanted}",
            hint="run the program version that wrote it, or its migration",
        )
    metadata.create_all(connection)
    inspector = inspect(connection)
    for table in metadata.sorted_tables:
        missing = set(table.columns.keys()) - {column["name"] for column in inspector.get_columns(table.name)}
        if missing:
            raise JournalError(
                f"the journal's table {table.name} has no column {', '.join(sorted(missing))}: another version wrote it",
                hint="run the program version that wrote it, or its migration",
            )


def _shown(url: str) -> str:
    """The URL without a password."""
    head, separator, tail = url.partition("://")
    return f"{head}{separator}{tail.rpartition('@')[2]}"


def _reason(error: Exception) -> str:
    if isinstance(error, GpumarketError):
        return error.message
    return str(getattr(error, "orig", None) or error)

"""A role's disk: a SQLite database that outlives its process, and the journal that a process opens on it.

The journal has the interface of `settlement.journal.Journal`. A submission is committed a moment later and answered a moment after that, so
that a crash can fall before the commit, between commit and answer, or after both; `arm` puts it exactly at one of the next commits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from simulation.virtual import Process
from sqlalchemy import Connection, MetaData, create_engine, event
from sqlalchemy.pool import StaticPool

from gpumarket.core.errors import JournalError
from gpumarket.settlement.journal import Journal

T = TypeVar("T")


class Medium:
    """One role's database. Kept over many simulations: `wipe` empties it (making tables and compiling statements is the dear part)."""

    def __init__(self, metadata: MetaData) -> None:
        self.metadata = metadata
        engine = create_engine("sqlite://", poolclass=StaticPool)
        event.listen(engine, "connect", _manual)
        event.listen(engine, "begin", _begin)
        with engine.begin() as connection:
            metadata.create_all(connection)
        self.connection: Connection = engine.connect()
        self._crash_in, self._after, self._on_crash = 0, False, _nothing
        self.commits = 0
        self.seconds = 0.004
        """What a commit takes, and its answer as long again: a slow disk widens every race."""

    def wipe(self) -> None:
        """An empty disk."""
        self.commits, self._crash_in, self.seconds = 0, 0, 0.004
        with self.connection.begin():
            for table in self.metadata.sorted_tables:
                self.connection.exec_driver_sql(f'DELETE FROM "{table.name}"')

    def arm(self, commits: int, *, after: bool, on_crash: Callable[[], None]) -> None:
        """Crash at the n-th commit from now: just before it, or just after it (before its answer)."""
        self._crash_in, self._after, self._on_crash = commits, after, on_crash

    def disarm(self) -> None:
        self._crash_in = 0

    def read(self, work: Callable[[Connection], T]) -> T:
        """What is committed."""
        try:
            return work(self.connection)
        finally:
            self.connection.rollback()

    def commit(self, work: Callable[[Connection], Any]) -> Any:
        """Run one submission in its transaction. Returns `Crashed` when the machine went down with it."""
        dying = self._crash_in == 1
        self._crash_in = max(0, self._crash_in - 1)
        if dying and not self._after:
            self._on_crash()
            return Crashed
        with self.connection.begin():
            result = work(self.connection)
        self.commits += 1
        if dying:
            self._on_crash()
            return Crashed
        return result


class Crashed:
    """The process died at its commit."""


class SimJournal(Journal):
    """`settlement.journal.Journal` of one process on a `Medium`: no thread, no file, no seal."""

    def __init__(self, medium: Medium, process: Process) -> None:
        super().__init__("sqlite://", medium.metadata)
        self._medium, self._process = medium, process

    def open(self) -> None:
        """Nothing to check: the medium is whole."""

    async def close(self) -> None:
        """Nothing to wait for."""

    def require_space(self) -> None:
        """A medium has no end."""

    async def transact(self, work: Callable[[Connection], T]) -> T:
        self._refuse_dead()
        future: asyncio.Future[T] = self._process.loop.create_future()
        self._process.timeline.after(self._medium.seconds, lambda: self._write_down(work, future))
        return await future

    def read(self, work: Callable[[Connection], T]) -> T:
        self._refuse_dead()
        return self._medium.read(work)

    def _write_down(self, work: Callable[[Connection], T], future: asyncio.Future[T]) -> None:
        if not self._process.alive:
            return
        error: Exception | None = None
        result: Any = None
        try:
            result = self._medium.commit(work)
        except Exception as cause:
            error = cause
        if result is Crashed:
            return
        self.committed += error is None
        self._process.timeline.after(self._medium.seconds, lambda: self._process.call(lambda: _resolve(future, result, error)))

    def _refuse_dead(self) -> None:
        if not self._process.alive:
            raise JournalError("the process was killed")


def _resolve(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _manual(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # as the product's journal: BEGIN is ours
    connection.execute("PRAGMA synchronous=OFF")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _nothing() -> None:
    """Not armed."""

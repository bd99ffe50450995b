"""The journal: durable before it is acknowledged, closed when it cannot be. (Killed and without power: tests/fault/test_storage_*.)"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Column, Connection, Integer, MetaData, Table, func, insert, select

from gpumarket.core.errors import Busy, JournalError
from gpumarket.core.units import MONEY_MAX, Hash
from gpumarket.settlement import guard, seal, space
from gpumarket.settlement import journal as journal_module
from gpumarket.settlement.journal import Journal, MoneyType

CHANNEL = Hash(b"\x07" * 32)


def make(place: Path | str, version: int = 1, *extra: Column[Any]) -> tuple[Journal, Table]:
    """A journal in a SQLite file, or at a URL."""
    metadata = MetaData(info={"version": version})
    guard.guard_table(metadata)
    table = Table("entries", metadata, Column("n", Integer, primary_key=True), Column("amount", MoneyType()), *extra)
    return Journal(place if isinstance(place, str) else f"sqlite:///{place}", metadata), table


@pytest.fixture
async def opened(database: str) -> AsyncIterator[tuple[Journal, Table]]:
    """On SQLite and on PostgreSQL."""
    journal, table = make(database)
    journal.open()
    yield journal, table
    await journal.close()


@pytest.fixture
async def on_file(tmp_path: Path) -> AsyncIterator[tuple[Journal, Table]]:
    """On SQLite: for what only a file has."""
    journal, table = make(tmp_path / "journal.db")
    journal.open()
    yield journal, table
    await journal.close()


def put(connection: Connection, table: Table, n: int, amount: int = 0) -> int:
    connection.execute(insert(table), {"n": n, "amount": amount})
    return n


def count(connection: Connection, table: Table) -> int:
    return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


# --- group commit --------------------------------------------------------------------------------------------------------------


async def test_journal_many_waiting_submissions_share_commits(opened: tuple[Journal, Table]) -> None:
    journal, table = opened
    gate = threading.Event()
    first = asyncio.create_task(journal.transact(lambda c: gate.wait(30)))
    await asyncio.sleep(0)
    rest = [asyncio.create_task(journal.transact(partial(put, table=table, n=n))) for n in range(200)]
    await asyncio.sleep(0)
    gate.set()
    await first
    assert await asyncio.gather(*rest) == list(range(200))
    assert journal.committed == 201
    assert journal.batches <= 3
    assert journal.read(partial(count, table=table)) == 200


async def test_journal_failing_submission_takes_only_itself_back(opened: tuple[Journal, Table]) -> None:
    journal, table = opened

    def bad(connection: Connection) -> None:
        put(connection, table, 100)
        raise KeyError("mine")

    results = await asyncio.gather(
        journal.transact(partial(put, table=table, n=1)),
        journal.transact(bad),
        journal.transact(partial(put, table=table, n=1)),  # breaks the primary key
        journal.transact(partial(put, table=table, n=2)),
        return_exceptions=True,
    )
    assert results[0] == 1 and results[3] == 2
    assert isinstance(results[1], KeyError) and "unique" in str(results[2]).lower()
    assert journal.read(partial(count, table=table)) == 2
    assert journal.committed == 2


async def test_journal_read_sees_only_what_is_committed_and_cannot_write(opened: tuple[Journal, Table]) -> None:
    journal, table = opened
    inside, go = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        put(connection, table, 1)
        inside.set()
        go.wait(30)

    task = asyncio.create_task(journal.transact(slow))
    await asyncio.to_thread(inside.wait, 30)
    assert journal.read(partial(count, table=table)) == 0
    go.set()
    await task
    assert journal.read(partial(count, table=table)) == 1
    with pytest.raises(Exception, match=r"read-?only"):
        journal.read(partial(put, table=table, n=2))


async def test_journal_cancelled_caller_has_its_work_committed(opened: tuple[Journal, Table]) -> None:
    journal, table = opened
    gate = threading.Event()
    blocker = asyncio.create_task(journal.transact(lambda c: gate.wait(30)))
    task = asyncio.create_task(journal.transact(partial(put, table=table, n=1)))
    await asyncio.sleep(0)
    task.cancel()
    gate.set()
    await blocker
    await journal.transact(lambda c: None)
    assert journal.read(partial(count, table=table)) == 1


async def test_journal_close_commits_what_was_submitted(database: str) -> None:
    journal, table = make(database)
    journal.open()
    tasks = [asyncio.create_task(journal.transact(partial(put, table=table, n=n))) for n in range(50)]
    await asyncio.sleep(0)
    await journal.close()
    await asyncio.gather(*tasks)
    with pytest.raises(JournalError, match="not open"):
        await journal.transact(lambda c: None)
    journal, table = make(database)
    journal.open()
    assert journal.read(partial(count, table=table)) == 50
    await journal.close()
    await journal.close()


OPEN_AND_DIE = """
import os, signal, sys
from sqlalchemy import MetaData
from gpumarket.settlement import guard
from gpumarket.settlement.journal import Journal
metadata = MetaData(info={"version": 1})
guard.guard_table(metadata)
Journal(f"sqlite:///{sys.argv[1]}", metadata).open()
os.kill(os.getpid(), signal.SIGKILL)
"""


async def test_journal_closed_well_then_killed_before_its_first_commit_opens_again(tmp_path: Path) -> None:
    file = tmp_path / "journal.db"
    for _ in range(2):
        journal, table = make(file)
        journal.open()
        await journal.transact(partial(put, table=table, n=journal.read(partial(count, table=table))))
        await journal.close()
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", OPEN_AND_DIE, str(file))
    assert await killed.wait() == -signal.SIGKILL
    journal, table = make(file)
    journal.open()
    assert journal.read(partial(count, table=table)) == 2
    await journal.close()


async def test_journal_in_use_keeps_its_locks_through_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever closes a descriptor of a locked file loses the locks; another process would then truncate the shared memory under us."""
    monkeypatch.setattr(journal_module, "CHECKPOINT_BATCHES", 1)
    monkeypatch.setattr(journal_module, "CHECKPOINT_FRAMES", 1)
    journal, table = make(tmp_path / "journal.db")
    journal.open()
    for n in range(5):
        await journal.transact(partial(put, table=table, n=n))
    dead_man_switch = (
        "import fcntl, sys; file = open(sys.argv[1], 'r+b')\n"
        "try: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 128)\n"
        "except BlockingIOError: sys.exit(7)"
    )
    taken = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", dead_man_switch, str(tmp_path / "journal.db-shm")], check=False)
    assert taken.returncode == 7, "SQLite's lock on the shared memory is gone"
    await journal.close()


# --- failing closed ------------------------------------------------------------------------------------------------------------


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """This process keeps what it has open, and opens nothing more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open(os.devnull, os.O_RDONLY)  # the lowest number that is free
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_journal_without_file_descriptors_goes_on_and_checkpoints_when_it_has_some(
    on_file: tuple[Journal, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, table = on_file
    monkeypatch.setattr(journal_module, "CHECKPOINT_BATCHES", 1)
    monkeypatch.setattr(journal_module, "CHECKPOINT_FRAMES", 1)
    await journal.transact(partial(put, table=table, n=0))
    assert journal._seal is not None
    sealed = journal._seal.file.stat().st_mtime_ns
    with no_more_descriptors():
        for n in range(1, 4):
            async with asyncio.timeout(10):
                await journal.transact(partial(put, table=table, n=n))
    assert journal._seal.file.stat().st_mtime_ns == sealed, "the limit did not bite"
    for n in range(4, 20):
        await journal.transact(partial(put, table=table, n=n))
    assert journal._seal.file.stat().st_mtime_ns > sealed
    assert journal.read(partial(count, table=table)) == 20


async def test_journal_whose_log_cannot_be_read_at_a_checkpoint_stops_for_good(
    on_file: tuple[Journal, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, table = on_file

    def fails(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(journal_module, "CHECKPOINT_BATCHES", 1)
    monkeypatch.setattr(journal_module, "frames_in_use", fails)
    await journal.transact(partial(put, table=table, n=1))  # is durable
    async with asyncio.timeout(10):
        with pytest.raises(JournalError, match=r"failed at a checkpoint: .*Input/output error") as caught:
            await journal.transact(partial(put, table=table, n=2))
    assert "start again" in caught.value.hint


async def test_journal_failed_commit_refuses_everything_from_then_on(on_file: tuple[Journal, Table]) -> None:
    journal, table = on_file

    def doomed(connection: Connection) -> None:
        put(connection, table, 1)
        connection.exec_driver_sql("PRAGMA defer_foreign_keys=ON")
        connection.exec_driver_sql("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
        connection.exec_driver_sql("CREATE TABLE child (id INTEGER REFERENCES parent(id))")
        connection.exec_driver_sql("INSERT INTO child VALUES (7)")  # the commit itself fails on this

    results = await asyncio.gather(journal.transact(doomed), journal.transact(partial(put, table=table, n=2)), return_exceptions=True)
    assert all(isinstance(r, JournalError) and "failed to commit" in str(r) for r in results)
    with pytest.raises(JournalError, match="failed to commit") as caught:
        await journal.transact(partial(put, table=table, n=3))
    assert "start again" in caught.value.hint
    assert journal.read(partial(count, table=table)) == 0
    assert journal.committed == 0


async def test_journal_transaction_given_up_by_the_database_fails_the_whole_batch(opened: tuple[Journal, Table]) -> None:
    """A full disk makes SQLite roll back everything, not only the statement: nobody of the batch may be told that it is durable."""
    journal, table = opened

    def disk_full(connection: Connection) -> None:
        put(connection, table, 1)
        connection.exec_driver_sql("ROLLBACK")
        raise OSError("database or disk is full")

    begun, held = threading.Event(), threading.Event()

    def hold(_: Connection) -> None:
        begun.set()
        held.wait()

    first = asyncio.ensure_future(journal.transact(hold))  # so that the other two wait, and share a commit
    await asyncio.to_thread(begun.wait)
    both = asyncio.gather(journal.transact(disk_full), journal.transact(partial(put, table=table, n=2)), return_exceptions=True)
    await asyncio.sleep(0)
    held.set()
    await first
    assert all(isinstance(r, JournalError) for r in await both)
    assert journal.read(partial(count, table=table)) == 0


async def broken_at_a_checkpoint(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal whose disk failed once, when commits were durable; then it is closed, and its log goes into the file."""
    monkeypatch.setattr(journal_module, "CHECKPOINT_FRAMES", 1)
    monkeypatch.setattr(journal_module, "CHECKPOINT_BATCHES", 20)

    def fails(*_: object) -> None:
        raise OSError("disk failed")

    monkeypatch.setattr(seal.Seal, "renew", fails)
    journal, table = make(file)
    journal.open()
    for n in range(20):
        await journal.transact(partial(put, table=table, n=n))
    with pytest.raises(JournalError, match="failed at a checkpoint"):
        await journal.transact(partial(put, table=table, n=21))
    await journal.close()
    monkeypatch.undo()


async def test_journal_closed_after_a_failure_is_checked_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "journal.db"
    await broken_at_a_checkpoint(file, monkeypatch)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1  # within an amount, where SQLite sees nothing
    file.write_bytes(data)
    journal, _ = make(file)
    with pytest.raises(JournalError, match="pages differ"):
        journal.open()


async def test_journal_closed_after_a_failure_goes_on_with_what_was_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "journal.db"
    await broken_at_a_checkpoint(file, monkeypatch)
    journal, table = make(file)
    journal.open()
    assert journal.read(partial(count, table=table)) == 20
    await journal.close()


async def test_journal_that_was_not_opened_leaves_a_file_that_its_seal_explains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "journal.db"
    journal, table = make(file)
    journal.open()
    await journal.transact(partial(put, table=table, n=1))
    await journal.close()
    with monkeypatch.context() as failing:
        failing.setattr(seal.Seal, "open", lambda _: (_ for _ in ()).throw(OSError("disk failed")))
        with pytest.raises(JournalError, match="disk failed"):
            make(file)[0].open()
    journal, table = make(file)
    journal.open()
    assert journal.read(partial(count, table=table)) == 1
    await journal.close()


async def test_journal_damaged_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "journal.db"
    journal, table = make(file)
    journal.open()
    await journal.transact(lambda c: [put(c, table, n, n) for n in range(2000)])
    await journal.close()
    data = bytearray(file.read_bytes())
    data[4096 * 2 : 4096 * 3] = bytes(4096)
    file.write_bytes(data)
    with pytest.raises(JournalError, match=r"damaged|cannot be opened"):
        make(file)[0].open()


def test_journal_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"hello" * 1000)
    with pytest.raises(JournalError, match="cannot be opened"):
        make(tmp_path / "journal.db")[0].open()


def test_journal_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="absent") as caught:
        make(tmp_path / "absent" / "journal.db")[0].open()
    assert "never delete" in caught.value.hint


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_journal_in_memory_is_refused(url: str) -> None:
    with pytest.raises(JournalError, match="memory"):
        Journal(url, MetaData()).open()


async def test_journal_of_another_version_is_refused(database: str) -> None:
    journal, _ = make(database, 1)
    journal.open()
    await journal.close()
    with pytest.raises(JournalError, match="version 1, this program wants 2"):
        make(database, 2)[0].open()
    with pytest.raises(JournalError, match="no column extra"):
        make(database, 1, Column("extra", Integer))[0].open()
    journal, _ = make(database, 1)
    journal.open()
    await journal.close()


async def test_journal_url_with_a_password_is_not_shown(tmp_path: Path) -> None:
    journal = Journal(f"sqlite://someone:hunter2@/{tmp_path}/x/y.db", MetaData())
    with pytest.raises(Exception) as caught:
        journal.open()
    assert "hunter2" not in str(caught.value)


async def test_journal_not_open_is_refused(database: str) -> None:
    journal, _ = make(database)
    with pytest.raises(JournalError, match="not open"):
        await journal.transact(lambda c: None)
    with pytest.raises(JournalError, match="not open"):
        journal.read(lambda c: None)


async def test_journal_syncs_fully_in_wal_mode(on_file: tuple[Journal, Table]) -> None:
    journal, _ = on_file
    mode = await journal.transact(lambda c: [c.exec_driver_sql(f"PRAGMA {p}").scalar_one() for p in ("journal_mode", "synchronous")])
    assert mode == ["wal", 2]


def test_journal_with_little_room_takes_no_new_work_until_there_is_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, _ = make(tmp_path / "journal.db")
    journal.require_space()
    monkeypatch.setattr(space, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(space, "BYTES_MIN", space.free_bytes(tmp_path) * 2)
    with pytest.raises(Busy, match=r"\d+ bytes are free") as caught:
        journal.require_space()
    assert str(tmp_path) in caught.value.message and "by itself" in caught.value.hint
    monkeypatch.setattr(space, "BYTES_MIN", 0)
    journal.require_space()


# --- money ---------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, MONEY_MAX), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_money_type_text_keeps_the_order_and_the_value(amounts: list[int]) -> None:
    kind, dialect = MoneyType(), Any
    texts = [kind.process_bind_param(a, dialect) for a in amounts]  # type: ignore[arg-type]
    assert [kind.process_result_value(t, dialect) for t in texts] == amounts  # type: ignore[arg-type]
    assert sorted(str(t) for t in texts) == [kind.process_bind_param(a, dialect) for a in sorted(amounts)]  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1, MONEY_MAX + 1, 1.5, "7"])
async def test_money_type_refuses_what_is_no_amount(opened: tuple[Journal, Table], value: Any) -> None:
    journal, table = opened
    with pytest.raises(Exception, match="uint96"):
        await journal.transact(partial(put, table=table, n=1, amount=value))


async def test_money_type_largest_amount_compares_in_sql(opened: tuple[Journal, Table]) -> None:
    journal, table = opened
    await journal.transact(lambda c: [put(c, table, 1, MONEY_MAX), put(c, table, 2, 9), put(c, table, 3, 10)])
    found = journal.read(lambda c: c.execute(select(table.c.n).where(table.c.amount > 9).order_by(table.c.amount)).scalars().all())
    assert found == [3, 1]


# --- guard ---------------------------------------------------------------------------------------------------------------------


async def test_guard_only_ever_rises(opened: tuple[Journal, Table]) -> None:
    journal, _ = opened
    await journal.transact(partial(guard.admit, channel=CHANNEL))
    for amount in (5, 6, MONEY_MAX - 1):
        await journal.transact(partial(guard.advance, channel=CHANNEL, cumulative=amount))
    for amount in (MONEY_MAX - 1, 6, 0):
        with pytest.raises(JournalError, match="was signed before"):
            await journal.transact(partial(guard.advance, channel=CHANNEL, cumulative=amount))
    assert journal.read(partial(guard.guarded, channel=CHANNEL)) == MONEY_MAX - 1


async def test_guard_missing_refuses_to_sign(opened: tuple[Journal, Table]) -> None:
    journal, _ = opened
    with pytest.raises(JournalError, match="holds no guard") as caught:
        await journal.transact(partial(guard.advance, channel=CHANNEL, cumulative=1))
    assert "open another" in caught.value.hint


@pytest.mark.parametrize("amount", [-1, MONEY_MAX + 1])
async def test_guard_outside_uint96_refuses(opened: tuple[Journal, Table], amount: int) -> None:
    journal, _ = opened
    await journal.transact(partial(guard.admit, channel=CHANNEL))
    with pytest.raises(JournalError, match="uint96"):
        await journal.transact(partial(guard.advance, channel=CHANNEL, cumulative=amount))


async def test_guard_admitted_twice_is_refused(opened: tuple[Journal, Table]) -> None:
    journal, _ = opened
    await journal.transact(partial(guard.admit, channel=CHANNEL, cumulative=9))
    with pytest.raises(JournalError, match="already"):
        await journal.transact(partial(guard.admit, channel=CHANNEL))
    assert journal.read(partial(guard.guarded, channel=CHANNEL)) == 9


async def test_guard_of_a_failed_entry_is_not_advanced(opened: tuple[Journal, Table]) -> None:
    journal, table = opened
    await journal.transact(partial(guard.admit, channel=CHANNEL))
    await journal.transact(partial(put, table=table, n=1))

    def entry(connection: Connection) -> None:
        guard.advance(connection, CHANNEL, 5)
        put(connection, table, 1)  # the ledger refuses

    with pytest.raises(Exception, match=r"(?i)unique"):
        await journal.transact(entry)
    assert journal.read(partial(guard.guarded, channel=CHANNEL)) == 0

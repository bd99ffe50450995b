"""The journal: durable before it is acknowledged, at every point where a process can die."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Column, Connection, Integer, MetaData, Table, func, insert, select

from gpumarket.core.errors import JournalError
from gpumarket.core.units import MONEY_MAX, Hash
from gpumarket.settlement import guard
from gpumarket.settlement.journal import Journal, MoneyType

SWEEP = Path(__file__).parents[1] / "journal_kill"
CHANNEL = Hash(b"\x07" * 32)


def make(file: Path, version: int = 1, *extra: Column[Any]) -> tuple[Journal, Table]:
    metadata = MetaData(info={"version": version})
    guard.guard_table(metadata)
    table = Table("entries", metadata, Column("n", Integer, primary_key=True), Column("amount", MoneyType()), *extra)
    return Journal(f"sqlite:///{file}", metadata), table


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[tuple[Journal, Table]]:
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
    assert isinstance(results[1], KeyError) and "UNIQUE" in str(results[2])
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
    with pytest.raises(Exception, match="readonly"):
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


async def test_journal_close_commits_what_was_submitted(tmp_path: Path) -> None:
    journal, table = make(tmp_path / "journal.db")
    journal.open()
    tasks = [asyncio.create_task(journal.transact(partial(put, table=table, n=n))) for n in range(50)]
    await asyncio.sleep(0)
    await journal.close()
    await asyncio.gather(*tasks)
    with pytest.raises(JournalError, match="not open"):
        await journal.transact(lambda c: None)
    journal, table = make(tmp_path / "journal.db")
    journal.open()
    assert journal.read(partial(count, table=table)) == 50
    await journal.close()
    await journal.close()


# --- failing closed ------------------------------------------------------------------------------------------------------------


async def test_journal_failed_commit_refuses_everything_from_then_on(opened: tuple[Journal, Table]) -> None:
    journal, table = opened

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

    results = await asyncio.gather(journal.transact(disk_full), journal.transact(partial(put, table=table, n=2)), return_exceptions=True)
    assert all(isinstance(r, JournalError) for r in results)
    assert journal.read(partial(count, table=table)) == 0


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


async def test_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    journal, _ = make(tmp_path / "journal.db", 1)
    journal.open()
    await journal.close()
    with pytest.raises(JournalError, match="version 1, this program wants 2"):
        make(tmp_path / "journal.db", 2)[0].open()
    with pytest.raises(JournalError, match="no column extra"):
        make(tmp_path / "journal.db", 1, Column("extra", Integer))[0].open()
    make(tmp_path / "journal.db", 1)[0].open()


async def test_journal_url_with_a_password_is_not_shown(tmp_path: Path) -> None:
    journal = Journal(f"sqlite://someone:hunter2@/{tmp_path}/x/y.db", MetaData())
    with pytest.raises(Exception) as caught:
        journal.open()
    assert "hunter2" not in str(caught.value)


async def test_journal_not_open_is_refused(tmp_path: Path) -> None:
    journal, _ = make(tmp_path / "journal.db")
    with pytest.raises(JournalError, match="not open"):
        await journal.transact(lambda c: None)
    with pytest.raises(JournalError, match="not open"):
        journal.read(lambda c: None)


async def test_journal_syncs_fully_in_wal_mode(opened: tuple[Journal, Table]) -> None:
    journal, _ = opened
    mode = await journal.transact(lambda c: [c.exec_driver_sql(f"PRAGMA {p}").scalar_one() for p in ("journal_mode", "synchronous")])
    assert mode == ["wal", 2]


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

    with pytest.raises(Exception, match="UNIQUE"):
        await journal.transact(entry)
    assert journal.read(partial(guard.guarded, channel=CHANNEL)) == 0


# --- killed anywhere -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that forks children, each to be killed at a given durable call."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs a C compiler and LD_PRELOAD (Linux)")
    folder = tmp_path_factory.mktemp("kill")
    shim = folder / "kill.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(shim), str(SWEEP / "kill.c"), "-ldl"], check=True)
    argv = [sys.executable, str(SWEEP / "victim.py"), str(folder)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"LD_PRELOAD": str(shim)}) as process:
        yield process, folder
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


def die_at(process: subprocess.Popen[str], n: int) -> tuple[list[int], int, bool]:
    """(acknowledged entries, durable calls of a whole run or 0, whether it was killed)"""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{n}\n")
    process.stdin.flush()
    acks, calls, killed = process.stdout.readline().rstrip("\n").split("|")
    return [int(a) for a in acks.split()], int(calls or 0), killed == "1"


def test_journal_killed_at_any_durable_call_keeps_every_acknowledged_entry(victim: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = victim
    acks, calls, killed = die_at(process, 1_000_000)
    assert (len(acks), killed) == (24, False) and calls > 20
    kills = partial_runs = 0
    for n in range(1, calls + 1):
        acks, _, killed = die_at(process, n)
        kills += killed
        partial_runs += 0 < len(acks) < 24
        file = folder / f"{n}.db"
        if not file.exists():
            assert not acks
            continue
        with sqlite3.connect(file) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            has_tables = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'entries'").fetchone()[0]
            rows = [r[0] for r in connection.execute("SELECT n FROM entries ORDER BY n")] if has_tables else []
            guards = [int(r[0]) for r in connection.execute("SELECT cumulative FROM voucher_guard")] if has_tables else []
        connection.close()
        assert set(acks) <= set(rows), f"kill {n}: acknowledged {set(acks) - set(rows)} lost"
        assert 1_000_000 not in rows, f"kill {n}: a refused submission left its write"
        assert max(rows, default=0) == max(guards, default=0), f"kill {n}: entry and guard apart"
    assert kills >= calls - 2  # the number of durable calls wobbles by how submissions fall into commits
    assert partial_runs > 5  # the sweep did hit the middle of the work

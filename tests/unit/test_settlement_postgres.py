"""A journal on PostgreSQL: what must hold of the server and the session, and what happens when either goes. (Killed under load:
tests/fault/test_postgres_*.)"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from postgres_server import PASSWORD, Server
from settlement_chain import until
from sqlalchemy import Column, Connection, Integer, MetaData, Table, func, insert, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError

from gpumarket.core.errors import ConfigError, JournalError, StateLocked
from gpumarket.core.units import Hash
from gpumarket.scheduler import migrations, tables
from gpumarket.settlement import guard, journal, postgres
from gpumarket.settlement.chain import outbox
from gpumarket.settlement.chain.outbox import Outgoing, sender_tables
from gpumarket.settlement.database import shown
from gpumarket.settlement.journal import Journal

METADATA = MetaData()
ENTRIES = Table("entries", METADATA, Column("n", Integer, primary_key=True))
guard.guard_table(METADATA)
CHANNEL = Hash(b"\x07" * 32)


@pytest.fixture
def url(postgres: Server) -> Iterator[str]:
    with postgres.database() as url:
        yield url


@pytest.fixture
async def opened(url: str) -> AsyncIterator[Journal]:
    made = Journal(url, METADATA)
    made.open()
    yield made
    await made.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "LOCK_WAIT_SECONDS", 0.2)


def put(connection: Connection, n: int) -> None:
    connection.execute(insert(ENTRIES), {"n": n})


def count(made: Journal) -> int:
    return int(made.read(lambda c: c.execute(select(func.count()).select_from(ENTRIES)).scalar_one()))


def writer_pid(made: Journal) -> int:
    assert made._connection is not None
    connection: Any = made._connection.connection.dbapi_connection
    return int(connection.info.backend_pid)


def end_session(server: Server, pid: int) -> None:
    assert server.sql(f"SELECT pg_terminate_backend({pid}, 10000)") == [(True,)]


@contextmanager
def server_setting(server: Server, name: str, value: str) -> Iterator[None]:
    """A setting of the running server, taken back afterwards."""
    try:
        server.sql(f"ALTER SYSTEM SET {name} = '{value}'")
        server.sql("SELECT pg_reload_conf()")
        yield
    finally:
        server.sql(f"ALTER SYSTEM RESET {name}")
        server.sql("SELECT pg_reload_conf()")


# --- opening -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fsync", "full_page_writes"])
def test_journal_on_a_server_that_may_lose_commits_is_refused(postgres: Server, url: str, name: str) -> None:
    with server_setting(postgres, name, "off"):
        while postgres.sql(f"SHOW {name}") != [("off",)]:  # a reload takes a moment
            pass
        with pytest.raises(JournalError, match=f"{name}=off") as caught:
            Journal(url, METADATA).open()
    assert "postgresql.conf" in caught.value.hint


@pytest.mark.parametrize(("given", "used"), [("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")])
async def test_journal_session_waits_for_the_disk_whatever_the_database_says(postgres: Server, url: str, given: str, used: str) -> None:
    name = make_url(url).database
    postgres.sql(f"ALTER DATABASE {name} SET synchronous_commit = {given}")
    made = Journal(url, METADATA)
    made.open()
    assert await made.transact(lambda c: c.exec_driver_sql("SHOW synchronous_commit").scalar_one()) == used
    await made.close()
    postgres.sql(f"ALTER DATABASE {name} RESET synchronous_commit")


@pytest.mark.parametrize("bad", ["postgresql+psycopg://someone:hunter2@127.0.0.1/ledger", "postgresql+psycopg:///x?password=hunter2"])
def test_journal_url_with_a_password_is_refused_and_not_told(bad: str) -> None:
    for opening in (Journal(bad, METADATA).open, partial(migrations.upgrade, bad)):
        with pytest.raises(ConfigError) as caught:
            opening()
        assert "hunter2" not in str(caught.value) and "PGPASSFILE" in caught.value.hint
    assert "hunter2" not in shown(bad) and "someone" not in shown(bad)


@pytest.mark.parametrize(
    "bad", ["postgresql://me@127.0.0.1/ledger", "postgresql+asyncpg://me@127.0.0.1/ledger", "mysql://me@127.0.0.1/ledger"]
)
def test_journal_with_another_driver_is_refused_and_names_the_right_one(bad: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Journal(bad, METADATA).open()
    assert "postgresql+psycopg://" in caught.value.hint


async def test_journal_password_comes_from_the_file_that_libpq_reads(
    postgres: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(make_url(url).database)
    monkeypatch.setenv("PGPASSFILE", os.devnull)
    with pytest.raises(JournalError, match="password"):
        Journal(postgres.loopback_url(name), METADATA).open()
    file = tmp_path / "pgpass"
    file.touch(mode=0o600)
    file.write_text(f"127.0.0.1:{postgres.port}:{name}:tester:{PASSWORD}\n")
    monkeypatch.setenv("PGPASSFILE", str(file))
    made = Journal(postgres.loopback_url(name), METADATA)
    made.open()
    await made.close()


@pytest.mark.parametrize("opening", ["journal", "migrations"])
def test_journal_without_its_server_says_where_it_looked_and_what_to_do(tmp_path: Path, opening: str) -> None:
    url = f"postgresql+psycopg://me@/ledger?host={tmp_path}"
    with pytest.raises(JournalError, match=r"postgresql\+psycopg:///ledger cannot be opened: .*failed") as caught:
        Journal(url, METADATA).open() if opening == "journal" else migrations.upgrade(url)
    assert "me@" not in caught.value.message
    assert "server runs" in caught.value.hint


# --- one process at a time -----------------------------------------------------------------------------------------------------


async def test_journal_that_another_process_has_open_is_refused_by_name_until_it_is_closed(opened: Journal, url: str) -> None:
    with pytest.raises(StateLocked, match="another process works on the database ledger"):
        Journal(url, METADATA).open()
    await opened.transact(partial(put, n=1))  # whoever is refused harms nobody
    await opened.close()
    second = Journal(url, METADATA)
    second.open()
    assert count(second) == 1
    await second.close()


async def test_ledger_that_a_process_works_on_is_not_migrated(url: str) -> None:
    migrations.upgrade(url, "0002")
    made = Journal(url, METADATA)
    made.open()
    with pytest.raises(StateLocked, match="another process works"):
        migrations.upgrade(url)
    await made.close()
    migrations.upgrade(url)
    assert made._failure == ""


async def test_journal_whose_session_ended_never_writes_again_and_another_process_goes_on(
    postgres: Server, opened: Journal, url: str
) -> None:
    """The lock ends with the session, and so does the only way to commit."""
    await opened.transact(partial(guard.admit, channel=CHANNEL, cumulative=5))
    end_session(postgres, writer_pid(opened))
    second = Journal(url, METADATA)
    second.open()
    await second.transact(partial(guard.advance, channel=CHANNEL, cumulative=6))
    for _ in range(3):
        with pytest.raises(JournalError, match=r"failed to commit|lost its database"):
            await opened.transact(partial(guard.advance, channel=CHANNEL, cumulative=7))
    assert second.read(partial(guard.guarded, channel=CHANNEL)) == 6
    await second.close()


async def test_journal_that_is_idle_notices_that_its_session_ended(postgres: Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "WATCH_SECONDS", 0.05)
    made = Journal(url, METADATA)
    made.open()
    made.require_whole()
    end_session(postgres, writer_pid(made))
    await until(lambda: bool(made._failure))
    with pytest.raises(JournalError, match="lost its database"):
        made.require_whole()
    await made.close()


# --- commits -------------------------------------------------------------------------------------------------------------------


async def test_journal_commit_that_fails_refuses_everything_from_then_on(opened: Journal) -> None:
    def doomed(connection: Connection) -> None:
        put(connection, 1)
        connection.exec_driver_sql("CREATE TABLE child (id INTEGER REFERENCES entries DEFERRABLE INITIALLY DEFERRED)")
        connection.exec_driver_sql("INSERT INTO child VALUES (7)")  # the commit itself fails on this

    results = await asyncio.gather(opened.transact(doomed), opened.transact(partial(put, n=2)), return_exceptions=True)
    assert all(isinstance(r, JournalError) and "failed to commit" in str(r) for r in results)
    with pytest.raises(JournalError, match="failed to commit") as caught:
        await opened.transact(partial(put, n=3))
    assert "start again" in caught.value.hint
    assert count(opened) == opened.committed == 0


async def test_journal_transaction_that_the_server_gave_up_is_not_acknowledged(opened: Journal) -> None:
    """PostgreSQL answers COMMIT with a rollback, and no error, where a statement failed and its error was swallowed."""
    await opened.transact(partial(put, n=1))

    def swallows(connection: Connection) -> str:
        put(connection, 2)
        with suppress(IntegrityError):
            put(connection, 1)
        return "done"

    with pytest.raises(JournalError, match="failed to commit"):
        await opened.transact(swallows)
    assert count(opened) == 1


async def test_journal_session_ended_within_a_commit_acknowledges_nothing_and_what_landed_is_read_back(
    postgres: Server, opened: Journal, url: str
) -> None:
    """The commit is on the disk, its answer never comes: whoever waits is told of a failure, and a restart finds it."""
    with server_setting(postgres, "synchronous_standby_names", "nobody"):
        while postgres.sql("SHOW synchronous_standby_names") != [("nobody",)]:
            pass
        waiting = asyncio.ensure_future(opened.transact(partial(put, n=1)))
        pid = writer_pid(opened)
        await until(lambda: postgres.sql(f"SELECT wait_event FROM pg_stat_activity WHERE pid = {pid}") == [("SyncRep",)])
        end_session(postgres, pid)
        with pytest.raises(JournalError, match="failed to commit"):
            await waiting
    again = Journal(url, METADATA)
    again.open()
    assert count(again) == 1 and opened.committed == 0
    await again.close()


async def test_journal_after_its_server_came_back_stays_closed_until_it_is_opened_again(
    postgres: Server, opened: Journal, url: str
) -> None:
    await opened.transact(partial(put, n=1))
    postgres.restart("immediate")
    with pytest.raises(JournalError, match="nothing more is signed or released"):
        await opened.transact(partial(put, n=2))
    with pytest.raises(JournalError):
        await opened.transact(partial(put, n=3))
    again = Journal(url, METADATA)
    again.open()
    assert count(again) == 1
    await again.close()


# --- widths --------------------------------------------------------------------------------------------------------------------


async def test_outbox_takes_blocks_gas_and_nonces_beyond_32_bits(database: str) -> None:
    metadata = MetaData()
    sender_tables(metadata)
    made = Journal(database, metadata)
    made.open()
    wide = Outgoing(0, 2**40, "wide", Hash(b"h" * 32), b"raw", b"r" * 20, b"\x00data", 2**41, 2**96 - 1, 2**95)
    stored = await made.transact(partial(outbox.add, transaction=wide))
    await made.transact(partial(outbox.settle, transaction=stored, state=outbox.MINED, block=2**42, gas_used=2**43))
    (found,) = made.read(lambda c: outbox.in_state(c, outbox.MINED))
    assert (found.nonce, found.gas, found.block, found.gas_used, found.max_fee) == (2**40, 2**41, 2**42, 2**43, 2**96 - 1)
    assert (found.data, found.raw, found.tx_hash) == (b"\x00data", b"raw", b"h" * 32)
    assert made.read(outbox.next_nonce) == 2**40 + 1
    await made.close()


def test_ledger_tables_have_no_text_that_a_database_could_cut() -> None:
    """Only what this program writes itself is of bounded length: PostgreSQL refuses longer text where SQLite takes it."""
    bounded = {
        f"{table.name}.{column.name}"
        for table in tables.metadata.sorted_tables
        for column in table.columns
        if str(column.type) == "VARCHAR(200)"
    }
    assert bounded == {"attempts.reason", "chain_transactions.label"}

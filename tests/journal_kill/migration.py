"""A ledger of the first version brought to this one, under a killer: migrated or untouched, never halfway."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from sqlite3 import connect

from journal_kill.facts import Fact, Lost, Say

from gpumarket.scheduler import migrations, tables
from gpumarket.settlement.journal import Journal

FILE = "ledger.db"
GUARD = (b"\x07" * 32, f"{12_345:029d}")


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder / FILE}"


async def work(folder: Path, say: Say, turn: int = 0) -> None:
    migrations.upgrade(url_of(folder), "0001")
    with closing(connect(folder / FILE)) as connection, connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("INSERT INTO voucher_guard VALUES (?, ?)", GUARD)
    say({"kind": "written"})
    migrations.upgrade(url_of(folder))
    say({"kind": "migrated"})
    journal = Journal(url_of(folder), tables.metadata)
    journal.open()
    await journal.close()


async def verify(folder: Path, said: Sequence[Fact]) -> None:
    migrations.upgrade(url_of(folder))
    journal = Journal(url_of(folder), tables.metadata)
    journal.open()
    try:
        rows = journal.read(lambda c: [tuple(r) for r in c.exec_driver_sql("SELECT channel, cumulative FROM voucher_guard")])
        if said and rows != [GUARD]:
            raise Lost(f"the guard: {rows}")
    finally:
        await journal.close()

"""The process that is killed: forks a child per kill point, so that the imports are paid once.

    victim.py FOLDER        reads lines "N" on stdin; for each runs a child that dies at its N-th durable call, then answers with
                            "acks ... | calls K | killed 0/1" where acks are the entries that were acknowledged
The child makes `ENTRIES` submissions in groups, each of a ledger entry and its guard, and says so on a pipe only after transact returned.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from functools import partial
from pathlib import Path

from sqlalchemy import Column, Connection, Integer, MetaData, Table

from gpumarket.core.units import Hash
from gpumarket.settlement import guard
from gpumarket.settlement.journal import Journal, MoneyType

ENTRIES = 24
GROUP = 4
CHANNEL = Hash(b"\x07" * 32)


def tables() -> tuple[MetaData, Table]:
    metadata = MetaData()
    guard.guard_table(metadata)
    entries = Table("entries", metadata, Column("n", Integer, primary_key=True), Column("amount", MoneyType(), nullable=False))
    return metadata, entries


def entry(connection: Connection, entries: Table, n: int) -> int:
    """One ledger entry and the guard of what it owes, in one submission."""
    guard.advance(connection, CHANNEL, n)
    connection.execute(entries.insert(), {"n": n, "amount": n * 10})
    return n


def refused(connection: Connection, entries: Table) -> None:
    """Writes, then fails: none of it may be seen."""
    connection.execute(entries.insert(), {"n": 1_000_000, "amount": 1})
    raise ValueError("refused")


async def work(file: Path, pipe: int) -> None:
    metadata, entries = tables()
    journal = Journal(f"sqlite:///{file}", metadata)
    journal.open()
    await journal.transact(partial(guard.admit, channel=CHANNEL))

    async def one(n: int) -> None:
        done = await journal.transact(partial(entry, entries=entries, n=n))
        os.write(pipe, f"{done} ".encode())

    for start in range(1, ENTRIES + 1, GROUP):
        bad = journal.transact(partial(refused, entries=entries))
        await asyncio.gather(*(one(n) for n in range(start, start + GROUP)), bad, return_exceptions=True)
    await journal.close()


def child(file: Path, pipe: int, kill_at: int) -> None:
    shim = ctypes.CDLL(None)
    shim.kill_count.restype = ctypes.c_long
    shim.kill_arm(ctypes.c_long(kill_at))
    asyncio.run(work(file, pipe))
    os.write(pipe, f"| {shim.kill_count()}".encode())


def main() -> None:
    folder = Path(sys.argv[1])
    for line in sys.stdin:
        kill_at = int(line)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            try:
                child(folder / f"{kill_at}.db", writer, kill_at)
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            said = pipe.read()
        _, status = os.waitpid(pid, 0)
        print(f"{said.partition('|')[0].strip()}|{said.partition('|')[2].strip()}|{int(os.WIFSIGNALED(status))}", flush=True)


if __name__ == "__main__":
    main()

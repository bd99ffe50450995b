"""A process that signs for one channel from the database at a URL, for as long as it holds it, and opens it again whenever it has lost it.

    python -m postgres_signer URL lock|no-lock

Prints one JSON object a line: {"event": "open" | "locked" | "lost"} or {"event": "signed", "cumulative": n, "signature": hex}. With
`no-lock` it claims nothing: what a database would have to stand if its locks did not hold. Ends when its input does.
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial

from scheduler_world import CHANNELS, SCHEDULER
from sqlalchemy import Connection, MetaData

from gpumarket.core.errors import JournalError, StateLocked
from gpumarket.core.units import Hash
from gpumarket.settlement import guard, postgres
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.vouchers import sign_voucher

CHANNEL = Hash(b"\x07" * 32)
METADATA = MetaData()
guard.guard_table(METADATA)


def say(event: str, **facts: object) -> None:
    print(json.dumps({"event": event} | facts), flush=True)


def admit(connection: Connection) -> None:
    if guard.guarded(connection, CHANNEL) is None:
        guard.admit(connection, CHANNEL)


async def life(url: str, ended: asyncio.Event) -> None:
    """From one opening to the loss of it."""
    held = Journal(url, METADATA)
    held.open()
    say("open")
    try:
        await held.transact(admit)
        cumulative = held.read(partial(guard.guarded, channel=CHANNEL)) or 0
        while not ended.is_set():
            cumulative += 1
            try:
                await held.transact(partial(guard.advance, channel=CHANNEL, cumulative=cumulative))
            except JournalError as error:
                if "was signed before" not in error.message:
                    raise
                continue  # somebody else has signed it: go on above
            say("signed", cumulative=cumulative, signature=sign_voucher(SCHEDULER, CHANNELS, CHANNEL, cumulative).hex())
    finally:
        await held.close()


async def main(url: str, mode: str) -> None:
    ended = asyncio.Event()
    if mode == "no-lock":
        postgres.claim = lambda connection: None
    postgres.LOCK_WAIT_SECONDS = 0.05
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    while not ended.is_set():
        try:
            await life(url, ended)
        except StateLocked:
            say("locked")
        except JournalError:
            say("lost")
        await asyncio.sleep(0.01)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

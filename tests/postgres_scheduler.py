"""A scheduler's ledger on PostgreSQL, busy until its database goes: orders, claims, checks, retries, rejections, several lanes at once.

    python -m postgres_scheduler URL LIFE

Prints what it tells its clients and providers, one JSON object a line (`journal_kill.facts`), as soon as it may, and at last
{"kind": "ended", "why": ...}. LIFE numbers its jobs. Ends with its database, or when its input does.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from itertools import count
from typing import Any

from journal_kill.scheduler import SPOKE, live, opened

from gpumarket.core.errors import GpumarketError
from gpumarket.scheduler.ledger import Ledger

LANES, TURNS_MAX = 4, 10_000


def say(fact: Mapping[str, Any]) -> None:
    print(json.dumps(fact), flush=True)


async def lane(ledger: Ledger, first: int) -> None:
    for turn in count(first):
        await live(ledger, say, turn)


async def main(url: str, life: int) -> None:
    ledger, journal = await opened(url)
    if SPOKE in ledger.spokes:
        ledger.confirm(SPOKE)  # its provider has shown what it holds
    first = life * TURNS_MAX * LANES
    await live(ledger, say, first)
    asyncio.get_running_loop().add_reader(sys.stdin, sys.exit)
    try:
        await asyncio.gather(*(lane(ledger, first + 1 + number * TURNS_MAX) for number in range(LANES)))
    except GpumarketError as error:
        say({"kind": "ended", "why": f"{error.code}: {error.message} | {error.hint}"})
    finally:
        await ledger.close()
        await journal.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))

"""Many streams at once on one gateway: what an open one holds, and what excess does to those that were admitted.

The market is scripted (tests/sdk_market.py) and a process of its own, so that a provider can keep answers open and has room for all.
Memory is what the gateway's process alone has (USS), before and while streams are open whose answer waits in the middle. For the p99, as
many streams as the gateway takes come at once and are read to their end; then a thousand come at once, of which it admits at least as
many and turns away the rest with 429 and Retry-After (AssertionError when one hangs, fails, or is refused in any other way). Rounds
alternate; medians of the p99s are compared.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from bench_gateway import row
from scripted_gateway import Scripted, scripted

ADMITTED = 128
AT_ONCE = 1_000
TOKENS = 32
ROUNDS = 5
HANG_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Stream:
    """One request: its status, and how long its whole answer took."""

    status: int
    again_seconds: str
    whole: bool
    seconds: float


def run() -> list[dict[str, object]]:
    """Rows (name, value, unit, compared_with)."""
    return asyncio.run(_run())


async def _run() -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        async with scripted(Path(folder), ADMITTED) as served:
            await _at_once(served, 8)  # opens the channel, loads what is loaded late
            memory = await _memory(served)
            alone, crowded = [], []
            for _ in range(ROUNDS):
                alone.append(_p99(await _at_once(served, ADMITTED)))
                crowded.append(_p99(await _at_once(served, AT_ONCE)))
    ratio = statistics.median(crowded) / statistics.median(alone)
    told = f"{ADMITTED} streams and no excess, p99 {statistics.median(alone):.2f} s"
    return [
        row("gateway_stream_memory_kib", memory, "KiB/stream", f"{ADMITTED} streams open in the middle of their answers, USS"),
        row("gateway_excess_p99_ratio", ratio, "ratio", f"{told}; {AT_ONCE} at once, {AT_ONCE - ADMITTED} hear 429"),
    ]


async def _memory(served: Scripted) -> float:
    """KiB of the gateway's process an open stream."""
    process = psutil.Process(served.pid)
    before = process.memory_full_info().uss
    await served.hold()
    open_ones = asyncio.create_task(_at_once(served, ADMITTED))
    high, seen = 0, -1
    while high != seen:  # until all are there and nothing grows any more
        await asyncio.sleep(3.0)
        seen, high = high, max(high, process.memory_full_info().uss)
    await served.go()
    assert all(stream.whole for stream in await open_ones)
    return (high - before) / 1024 / ADMITTED


async def _at_once(served: Scripted, count: int) -> list[Stream]:
    """So many streams at once, each read to its end; those that were taken."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session, asyncio.timeout(HANG_SECONDS):
        streams = await asyncio.gather(*(_stream(session, served) for _ in range(count)))
    taken = [stream for stream in streams if stream.status == 200]
    assert len(taken) >= min(count, ADMITTED) and all(stream.whole for stream in taken), "a stream that was admitted did not end"
    assert all(s.status == 429 and int(s.again_seconds) >= 1 for s in streams if s.status != 200), "a stream was refused in another way"
    return taken


async def _stream(session: aiohttp.ClientSession, served: Scripted) -> Stream:
    talk: Any = [{"role": "user", "content": "hi"}]
    body = {"model": "chat", "messages": talk, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    started = time.perf_counter()
    async with session.post(served.url, json=body, headers={"authorization": f"Bearer {served.key}"}) as response:
        answer = await response.read()
        whole = answer.endswith(b"data: [DONE]\n\n")
        return Stream(response.status, response.headers.get("retry-after", "0"), whole, time.perf_counter() - started)


def _p99(streams: list[Stream]) -> float:
    return sorted(stream.seconds for stream in streams)[int(0.99 * (len(streams) - 1))]


if __name__ == "__main__":
    for line in run():
        print(line)

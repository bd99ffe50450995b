"""A thousand streams at once on a gateway that takes fewer: those it takes end whole, the others hear so at once, nobody hangs."""

from __future__ import annotations

import asyncio
import resource
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gateway_market import Gateway, gateway, until
from sdk_market import FakeProvider

STREAMS, ADMITTED = 1_000, 64
SECONDS = 240
TALK: Any = [{"role": "user", "content": "hi"}]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * SECONDS)]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Any
    body: bytes


async def ask(session: aiohttp.ClientSession, g: Gateway) -> Answer:
    body = {"model": "chat", "messages": TALK, "max_tokens": 20, "temperature": 0, "stream": True}
    async with session.post(f"{g.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {g.key}"}) as response:
        return Answer(response.status, response.headers, await response.read())


def require_files(count: int) -> None:
    """Both ends of every connection are in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"this needs {count} open files, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


async def test_gateway_under_a_thousand_streams_ends_those_it_takes_and_turns_the_others_away(tmp_path: Path) -> None:
    require_files(3 * STREAMS)
    hold = asyncio.Event()
    async with (
        gateway(tmp_path, FakeProvider("a", hold=hold), jobs_max=ADMITTED) as g,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        async with asyncio.timeout(SECONDS):
            asked = [asyncio.create_task(ask(session, g)) for _ in range(STREAMS)]
            await until(lambda: g.room.counter.running == ADMITTED)
            while sum(task.done() for task in asked) < STREAMS - ADMITTED:  # the others wait for nobody  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            hold.set()
            answers = await asyncio.gather(*asked)
        assert Counter(answer.status for answer in answers) == {200: ADMITTED, 429: STREAMS - ADMITTED}
        refused = [answer for answer in answers if answer.status == 429]
        assert all(int(answer.headers["retry-after"]) >= 1 and b"rate_limit_exceeded" in answer.body for answer in refused)
        whole = {answer.body.count(b'"finish_reason":"length"') for answer in answers if answer.status == 200}
        assert whole == {1}
        assert all(answer.body.endswith(b"data: [DONE]\n\n") for answer in answers if answer.status == 200)
        assert len({spec.key for spec in g.market.scheduler.matched}) == ADMITTED
        await until(lambda: g.room.counter.running == 0 and not g.room.counter.ledger.account(g.keys.all()[0].id).reserved)
        assert (await ask(session, g)).status == 200

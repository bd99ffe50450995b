"""A market whose scheduler keeps its ledger in PostgreSQL, and the server is restarted in the middle of jobs: the scheduler ends by itself
and says why, is started again as a supervisor would, and clients, providers and books agree."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
from fault_market import FaultMarket, assert_delivered_once, assert_paid_once, ended, plan, until
from postgres_server import Server
from reliability import record

from gpumarket.core.errors import GpumarketError
from gpumarket.sdk import Client
from gpumarket.sdk.results import ChatResult
from gpumarket.testnet.network import Network
from gpumarket.testnet.plan import SCHEDULER, TINY_LLAMA

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def served_by_postgres(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultMarket]:
    usual = plan()
    with postgres.database() as url:
        network = Network(tmp_path_factory.mktemp("market"), replace(usual, scheduler={**usual.scheduler, "database": url}))
        try:
            asyncio.run(network.up())
            yield FaultMarket(network)
        finally:
            asyncio.run(network.down())


async def keep_buying(client: Client, done: list[ChatResult], refused: list[GpumarketError], enough: asyncio.Event) -> None:
    """One short job after another; a refusal must say that it passes."""
    while not enough.is_set():
        try:
            done.append(await client.chat(TINY_LLAMA, f"Answer {len(done)}", max_tokens=8))
        except GpumarketError as error:
            assert error.retryable, repr(error)
            refused.append(error)
            await asyncio.sleep(0.1)


async def bought(done: list[ChatResult], count: int) -> bool:
    return len(done) >= count


@pytest.mark.parametrize("how", ["immediate", "fast"])
async def test_market_whose_database_server_is_restarted_pays_every_job_once(
    served_by_postgres: FaultMarket, postgres: Server, how: str
) -> None:
    market, done, refused, enough = served_by_postgres, list[ChatResult](), list[GpumarketError](), asyncio.Event()
    await market.heal()
    await market.matchable()
    async with market.client() as client:
        stream, pieces, _ = await market.begin(client)
        buying = asyncio.create_task(keep_buying(client, done, refused, enough))
        await until(partial(bought, done, 1), "no job is done")
        scheduler = market.network.processes.roles[SCHEDULER].process
        postgres.restart(how)
        assert await ended(scheduler) == 1
        assert "nothing more is signed or released" in market.network.folder.log(SCHEDULER).read_text()
        await market.restart(SCHEDULER)
        await market.matchable()
        pieces += [piece async for piece in stream]
        await until(partial(bought, done, len(done) + 2), "no job is done although everything is back")
        enough.set()
        await buying
        resumed = [result for result in await client.resume_all() if isinstance(result, ChatResult)]
        assert "".join(pieces) == stream.result.text
    await market.settle()
    assert_paid_once(market, stream.result.job, len(assert_delivered_once(market, stream.result.job)))
    jobs = {result.job: result for result in (*done, *resumed)}
    for result in jobs.values():
        assert_paid_once(market, result.job, result.usage.output_tokens)
    await market.check_invariants()
    seen = f"{len(jobs) + 1} jobs paid once, {len(refused)} refused for a while, {len(resumed)} resumed"
    record("PostgreSQL restarted under load", 1, f"a whole market, {how}: {seen}, lost 0, double 0", "lost 0; double 0")

"""A client among several schedulers: one that does not answer is replaced for new orders, and for nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sdk_models
from reliability import record
from sdk_market import CLIENT, TOKEN, FakeMarket, FakeProvider, FakeScheduler, fake_market
from sqlalchemy import select

from gpumarket.core.errors import SpendLimitReached, Unreachable
from gpumarket.core.units import Hash, hex0x, money_from_bytes
from gpumarket.sdk import Client, ClientSettings, ordering
from gpumarket.sdk.constraints import Constraints
from gpumarket.sdk.requests import embed_body
from gpumarket.sdk.results import EmbedResult, VerdictState
from gpumarket.sdk.tables import GUARD, JOBS

TEXTS = ["w1 w2 w3", "w4 w5", "w6"]


@dataclass
class Town:
    """Two schedulers and their providers. `first` has the larger stake: a client without a word of its own chooses it."""

    market: FakeMarket
    first: FakeScheduler
    second: FakeScheduler

    @asynccontextmanager
    async def client(self, **changes: Any) -> AsyncIterator[Client]:
        folder = self.market.folder
        usual: dict[str, Any] = {"check_probability": 0.0, "patience_seconds": 0.3, "failover_seconds": 0.5}
        settings = ClientSettings(state=folder / "client", lock_file=folder / "models.lock", **(usual | changes))
        async with Client(settings, key=CLIENT, chain=self.market.chain) as client:
            if not client.models():
                await client.add_model("mini", sdk_models.EMBED.digest)
                await client.add_model("chat", sdk_models.CHAT.digest)
            yield client

    def channel(self, scheduler: FakeScheduler) -> Hash:
        """The client's only channel to it."""
        (found,) = [c.id for c in self.market.chain.channels.values() if c.payee == scheduler.key.address]
        return Hash(found)


@pytest.fixture
async def town(tmp_path: Path) -> AsyncIterator[Town]:
    async with fake_market(tmp_path, FakeProvider("a"), FakeProvider("b")) as market:
        yield Town(market, market.scheduler, await market.another())


def orders(scheduler: FakeScheduler) -> list[Hash]:
    """Jobs that it got, first to last; one whose voucher fell short came again."""
    return list(dict.fromkeys(spec.key for spec in scheduler.matched))


def guards(client: Client) -> dict[Hash, int]:
    """Highest amount signed, by channel."""
    return {Hash(row.channel): row.cumulative for row in client.desk.journal.read(lambda c: c.execute(select(GUARD)).all())}


async def test_new_order_goes_through_another_scheduler_when_the_chosen_one_dies(town: Town) -> None:
    async with town.client() as client:
        before = await client.embed("mini", TEXTS)
        await town.market.stop(town.first)
        after = [await client.embed("mini", TEXTS), await client.embed("mini", TEXTS)]
        assert orders(town.first) == [before.job]
        assert orders(town.second) == [result.job for result in after]
        assert {spec.scheduler for spec in town.second.matched} == {town.second.key.address}
        signed = guards(client)
        assert set(signed) == {town.channel(town.first), town.channel(town.second)}, "a channel to each, and no third"
        for scheduler in (town.first, town.second):
            channel = town.channel(scheduler)
            newest = scheduler.newest[channel].voucher
            assert (bytes(newest.channel), money_from_bytes(newest.cumulative)) == (channel, signed[channel])
        billed = client.desk.account.known(town.channel(town.second))
        assert billed is not None and billed.billed == sum(result.cost for result in after)
        warnings = (await client.account()).warnings
        assert any(hex0x(town.channel(town.first)) in w and hex0x(town.first.key.address) in w for w in warnings)
    record(
        "chosen scheduler dies, several registered", 1, "the next order went through another one, on a channel of its own", "no order lost"
    )


async def test_client_that_finds_the_best_scheduler_dead_opens_with_another(town: Town) -> None:
    await town.market.stop(town.first)
    async with town.client() as client:
        result = await client.embed("mini", TEXTS)
        assert (await client.account()).scheduler == town.second.key.address
    assert orders(town.second) == [result.job]


async def test_named_scheduler_is_never_replaced(town: Town) -> None:
    async with town.client(scheduler=hex0x(town.first.key.address)) as client:
        await client.embed("mini", TEXTS)
        await town.market.stop(town.first)
        with pytest.raises(Unreachable) as caught:
            await client.embed("mini", TEXTS)
        assert "GPUMARKET_CLIENT_SCHEDULER" in caught.value.hint and caught.value.retryable
    assert not town.second.matched


async def test_order_that_no_scheduler_answers_is_refused_and_not_written(town: Town) -> None:
    async with town.client() as client:
        await client.embed("mini", TEXTS)
        for scheduler in (town.first, town.second):
            await town.market.stop(scheduler)
        with pytest.raises(Unreachable, match="none of 1 other registered schedulers answers"):
            await client.embed("mini", TEXTS)
        assert len(client.jobs()) == 1
        await town.market.start(town.first)
        await client.embed("mini", TEXTS)
    assert len(orders(town.first)) == 2


async def test_orders_at_once_move_to_one_scheduler_and_open_one_channel(town: Town) -> None:
    async with town.client() as client:
        await client.embed("mini", TEXTS)
        await town.market.stop(town.first)
        results = await asyncio.gather(*(client.embed("mini", TEXTS) for _ in range(5)))
    assert {spec.key for spec in town.second.matched} == {result.job for result in results}
    assert town.channel(town.second)


async def test_job_of_a_dead_scheduler_stays_its_own_and_is_resumed_when_that_is_back(town: Town) -> None:
    """Only its scheduler opens the next attempt: elsewhere it could be paid twice."""
    async with town.client() as client:
        await client.embed("mini", TEXTS)
        stream = client.chat("chat", "hello", stream=True, max_tokens=20)
        pieces = stream.__aiter__()
        await anext(pieces)
        await town.market.stop(town.first)
        rest = [piece async for piece in pieces]  # the provider goes on: the scheduler is not asked meanwhile
        assert rest and stream.result.finish_reason == "length"
        ordered = await interrupted(client, town)
        elsewhere = await client.embed("mini", TEXTS)
        assert [type(found) for found in await client.resume_all()] == [Unreachable]
        await town.market.start(town.first)
        (resumed,) = await client.resume_all()
        assert isinstance(resumed, EmbedResult) and resumed.job == ordered
        assert await client.resume_all() == []
    assert ordered in {spec.key for spec in town.first.matched}
    assert {spec.key for spec in town.second.matched} == {elsewhere.job}


async def interrupted(client: Client, town: Town) -> Hash:
    """A job that was written down for the first scheduler and never reached it."""
    loaded = await client._models_.load("mini")
    ask = client._ask(loaded, embed_body(loaded, TEXTS), None, Constraints(), False)
    await town.market.start(town.first)
    job, _ = await ordering.place(client.desk, ask)
    await town.market.stop(town.first)
    return job.job


async def test_days_cap_holds_over_all_schedulers_together(town: Town) -> None:
    async with town.client() as client:
        quote = await client.quote("mini", TEXTS)
    async with town.client(spend_limit=f"{1.5 * quote.maximum / TOKEN:.18f}") as client:
        await client.embed("mini", TEXTS, max_cost=quote.maximum)
        await town.market.stop(town.first)
        with pytest.raises(SpendLimitReached):
            await client.embed("mini", TEXTS, max_cost=quote.maximum)
        assert guards(client)[town.channel(town.second)] == 0
    assert not town.second.matched


async def test_check_goes_through_the_scheduler_of_its_job_or_not_at_all(town: Town) -> None:
    """Whoever judges must know both. The job is paid unchecked, which is said, and the scheduler hears of it when it is back."""
    async with town.client(check_probability=1.0) as client:
        stream = client.chat("chat", "hello", stream=True, max_tokens=20)
        pieces = stream.__aiter__()
        await anext(pieces)
        await town.market.stop(town.first)
        assert [piece async for piece in pieces]
        assert stream.result.verdict.state is VerdictState.UNCHECKED
        assert not town.second.matched
        assert client.desk.journal.read(lambda c: c.execute(select(JOBS.c.report)).scalar_one()) is not None
    await town.market.start(town.first)
    async with town.client():
        pass
    assert [report.job for report in town.first.reports] == [stream.result.job]

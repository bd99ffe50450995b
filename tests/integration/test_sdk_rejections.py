"""What a rejection costs: the judged attempt is ours again, what was acked before it stays paid, and max_cost holds over all of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import sdk_models
from sdk_market import CLIENT, FakeMarket, FakeProvider, fake_market

from gpumarket.core.daemon import StateFolder
from gpumarket.core.errors import ResultRejected
from gpumarket.core.units import Hash, Money, parse_money
from gpumarket.sdk import Client, ClientSettings
from gpumarket.sdk.results import VerdictState

TOKENS = 120
"""What follows the lost attempt is still longer than the shortest text that a check may reject alone."""


def closed_client(market: FakeMarket, **changes: Any) -> Client:
    values: dict[str, Any] = {"state": market.folder / "client", "lock_file": market.folder / "models.lock", "check_probability": 1.0}
    settings = ClientSettings(**(values | {"failover_seconds": 0.5} | changes))
    return Client(settings, key=CLIENT, chain=market.chain)


@asynccontextmanager
async def client_of(market: FakeMarket, **changes: Any) -> AsyncIterator[Client]:
    async with closed_client(market, **changes) as client:
        if not client.models():
            await client.add_model("chat", sdk_models.CHAT.digest)
        yield client


def providers(**of_b: Any) -> tuple[FakeProvider, ...]:
    """One that dies after 21 tokens, one that goes on with wrong ones, two that are honest."""
    return FakeProvider("dying", dies_after_items=21), FakeProvider("cheat", wrong_numbers=1), FakeProvider("b", **of_b), FakeProvider("c")


def costs(client: Client, purpose: str) -> list[Money]:
    return [job.cost for job in client.jobs(checks=True) if job.purpose == purpose]


async def test_rejection_after_a_failover_keeps_the_lost_attempt_paid_and_the_channel_closes(tmp_path: Path) -> None:
    async with fake_market(tmp_path, *providers()) as market, client_of(market) as client:
        result = await client.chat("chat", "hello", max_tokens=TOKENS, max_cost="0.01")
        (wrong,) = result.rejected
        assert wrong.provider == market.scheduler.providers[1].key.address
        earned = market.scheduler.jobs[wrong.job].spent  # by the attempt that was lost, at its last ack: the scheduler pays it
        assert 0 < earned == wrong.cost
        assert [job.cost for job in client.jobs() if job.job == wrong.job] == [earned]
        used = earned + result.cost + result.check_cost
        assert (await client.account()).billed == used
        market.scheduler.settle(used)
        assert await client.close_channel() == parse_money("10") - used


async def prices(folder: Path) -> tuple[Money, Money, Money]:
    """Of such a job in a market of its own: the quote, one check, and what the attempt that is lost earns."""
    async with fake_market(folder, *providers()) as market, client_of(market) as client:
        result = await client.chat("chat", "hello", max_tokens=TOKENS)
        quote = await client.quote("chat", "hello", max_tokens=TOKENS)
        return quote.maximum, max(costs(client, "check")), Money(market.scheduler.jobs[result.rejected[0].job].spent)


async def test_rerun_after_a_failover_counts_the_lost_attempt_against_max_cost(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    quote, check, lost = await prices(tmp_path_factory.mktemp("prices"))
    limit = Money(quote + 2 * check + lost // 2)  # enough for the job, two checks and a rerun, if nothing had been lost
    async with fake_market(tmp_path, *providers()) as market, client_of(market) as client:
        with pytest.raises(ResultRejected, match="not run again"):
            await client.chat("chat", "hello", max_tokens=TOKENS, max_cost=limit)
        assert len(costs(client, "check")) == 2
        assert 0 < (await client.account()).billed <= limit


async def test_resumed_rerun_counts_the_checks_of_what_it_replaces_against_max_cost(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    quote, check, _ = await prices(tmp_path_factory.mktemp("prices"))
    limit = Money(quote + 2 * check + check // 2)  # for the job, two checks and a rerun; not for a check of that
    cheat, b, c = FakeProvider("cheat", wrong_numbers=1), FakeProvider("b", hold=asyncio.Event()), FakeProvider("c")
    async with fake_market(tmp_path, cheat, b, c) as market:
        rerun = await interrupted_rerun(market, limit)
        b.hold = None
        async with client_of(market) as client:
            result = await client.resume(rerun)
            assert result.verdict.state is VerdictState.UNCHECKED
            assert [r.provider for r in result.rejected] == [cheat.key.address]
            assert result.check_cost == sum(costs(client, "check")) > 0
            assert result.cost + result.check_cost == (await client.account()).billed <= limit
            again = await client.resume(result.rejected[0].job)
            assert (again.job, again.check_cost, again.rejected) == (result.job, result.check_cost, result.rejected)


async def test_resumed_rerun_that_is_rejected_too_was_the_last_one_allowed(tmp_path: Path) -> None:
    first, second = FakeProvider("first", wrong_numbers=1), FakeProvider("second", wrong_numbers=2, hold=asyncio.Event())
    async with fake_market(tmp_path, first, second, FakeProvider("b"), FakeProvider("c")) as market:
        rerun = await interrupted_rerun(market, None, reruns_max=1)
        second.hold = None
        async with client_of(market, reruns_max=1) as client:
            with pytest.raises(ResultRejected, match="2 results were rejected in a row"):
                await client.resume(rerun)


async def interrupted_rerun(market: FakeMarket, limit: Money | None, **changes: Any) -> Hash:
    """A client that dies in the midst of a rerun: its provider holds it back."""
    async with client_of(market):
        pass  # it leaves the model in the lock file
    client = await closed_client(market, **changes).__aenter__()
    buying = asyncio.create_task(client.chat("chat", "hello", max_tokens=TOKENS, max_cost=limit))
    while not (reruns := [job.job for job in client.jobs() if job.purpose == "rerun" and job.cost == 0 and job.state == "leased"]):
        assert not buying.done()
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.3)  # some tokens of it are acked
    await crash(client)
    buying.cancel()
    await asyncio.wait({buying})
    return reruns[0]


async def crash(client: Client) -> None:
    """As if the process were killed: nothing is said to anybody, only the folder's lock and the connections go."""
    desk = client.desk
    desk.hub._locate = asyncio.Event().wait  # type: ignore[assignment]  # what still runs must not retry what is about to break
    await desk.hub.close()
    await desk.journal.close()
    await desk.peers.close()
    for _, callback in client._stack.pop_all()._exit_callbacks:  # type: ignore[attr-defined]
        folder = getattr(callback, "__self__", None)
        if isinstance(folder, StateFolder):
            folder.__exit__()

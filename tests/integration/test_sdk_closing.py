"""Closing a channel with its scheduler's consent, when the transaction does not come through at first."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import sdk_models
from sdk_market import CLIENT, FakeMarket, FakeProvider, fake_market

from gpumarket.core.errors import ConfigError, TransactionFailed, Unreachable
from gpumarket.core.units import parse_money
from gpumarket.sdk import Client, ClientSettings

TEXTS = ["w1 w2 w3", "w4 w5", "w6"]


@asynccontextmanager
async def client_of(market: FakeMarket) -> AsyncIterator[Client]:
    settings = ClientSettings(
        state=market.folder / "client", lock_file=market.folder / "models.lock", check_probability=0.0, patience_seconds=1.0
    )
    async with Client(settings, key=CLIENT, chain=market.chain) as client:
        if not client.models():
            await client.add_model("mini", sdk_models.EMBED.digest)
        yield client


@pytest.mark.parametrize("failure", [Unreachable("the chain does not answer"), TransactionFailed("no coin for gas")], ids=["rpc", "gas"])
async def test_close_whose_transaction_failed_is_taken_up_again(tmp_path: Path, failure: Exception) -> None:
    """The scheduler consented and the chain took nothing: also in a later life of the client the deposit comes back."""
    async with fake_market(tmp_path, FakeProvider("a")) as market:
        async with client_of(market) as client:
            cost = (await client.embed("mini", TEXTS)).cost
            market.scheduler.settle(cost)
            market.chain.close_fails = failure
            with pytest.raises(type(failure), match=str(failure)):
                await client.close_channel()
            (channel,) = market.chain.channels.values()
            assert (await client.account()).channel == channel.id and not channel.closed
        async with client_of(market) as client:
            assert await client.close_channel() == parse_money("10") - cost
            assert channel.closed
            with pytest.raises(ConfigError, match="no open channel"):
                await client.close_channel()


async def test_close_after_a_failed_one_and_new_work_brings_both_deposits_back(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market) as client:
        before = market.chain.money
        first = (await client.embed("mini", TEXTS)).cost
        market.scheduler.settle(first)
        market.chain.close_fails = Unreachable("the chain does not answer")
        with pytest.raises(Unreachable):
            await client.close_channel()
        second = (await client.embed("mini", TEXTS)).cost
        assert len(market.chain.channels) == 2
        assert any("holds money besides" in warning for warning in (await client.account()).warnings)
        market.scheduler.jobs.clear()
        newest = next(c for c in market.chain.channels if c not in market.scheduler.used)
        market.scheduler.used[newest] = second
        assert await client.close_channel() == parse_money("20") - first - second
        assert market.chain.money == before - first - second


async def test_close_without_an_answer_of_the_scheduler_names_the_way_out_that_asks_nobody(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market) as client:
        await client.deposit("1")
        await market.servers[0].stop(None)
        with pytest.raises(Unreachable) as caught:
            await client.close_channel()
        assert "gpumarket wallet close-channel --alone" in caught.value.hint

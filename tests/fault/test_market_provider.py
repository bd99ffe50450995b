"""A provider's process is killed, or told to end, while it works. The market goes on and everybody is paid what they delivered."""

from __future__ import annotations

import signal

import pytest
from fault_market import FaultMarket, assert_delivered_once, assert_paid_once, attempts_of, ended, until

from gpumarket.node.tables import OWED
from gpumarket.testnet.plan import TINY_LLAMA

pytestmark = pytest.mark.timeout(600)


async def test_provider_killed_in_mid_stream_rest_comes_from_another_and_each_is_paid_its_part(market: FaultMarket) -> None:
    async with market.client() as client:
        stream, pieces, victim = await market.begin(client)
        market.network.processes.kill(victim)
        pieces += [piece async for piece in stream]
        result = stream.result
        tokens = assert_delivered_once(market, result.job)
        assert "".join(pieces) == result.text
        assert result.usage.output_tokens == len(tokens)
    assert [market.name_of(a.provider) for a in result.attempts] == [victim, *(n for n in market.providers if n != victim)]
    await market.restart(victim)
    await market.settle()
    first, second = attempts_of(market.books(), result.job)
    assert 0 < first.units < len(tokens)
    assert first.units + second.units == len(tokens)
    assert_paid_once(market, result.job, len(tokens))


async def test_provider_killed_after_earning_redeems_all_of_it_when_it_is_back(market: FaultMarket) -> None:
    await market.matchable()
    async with market.client() as client:
        result = await client.chat(TINY_LLAMA, await market.long_prompt(client), max_tokens=32, temperature=0.0)
    victim = market.name_of(result.attempts[-1].provider)

    async def owed() -> bool:
        rows = [row for row in market.books().providers[victim].attempts if row.job == result.job]
        return [row.state for row in rows] == [OWED]

    await until(owed, "the claim is not owed")
    before = await market.balance(victim)
    unpaid = await market.unpaid(victim)
    market.network.processes.kill(victim)
    assert unpaid > 0
    assert await market.balance(victim) == before
    await market.restart(victim)
    answer = await market.cli("wallet", "redeem", config=market.network.folder.config(victim))
    assert answer.code == 0, answer
    assert await market.balance(victim) == before + unpaid


async def test_provider_told_to_end_in_mid_stream_finishes_the_stream_first(market: FaultMarket) -> None:
    await market.matchable()
    async with market.client() as client:
        stream, pieces, leaving = await market.begin(client)
        process = market.network.processes.roles[leaving].process
        market.network.processes.signal(leaving, signal.SIGTERM)
        await until(lambda: market.draining(leaving), "the provider does not drain")
        pieces += [piece async for piece in stream]
        result = stream.result
        tokens = assert_delivered_once(market, result.job)
        assert "".join(pieces) == result.text
        assert len(result.attempts) == 1
        assert market.name_of(result.attempts[0].provider) == leaving
        assert await ended(process) == 0
        elsewhere = await client.chat(TINY_LLAMA, "Is anybody left?", max_tokens=4)
        assert market.name_of(elsewhere.attempts[-1].provider) != leaving
    await market.restart(leaving)
    await market.settle()
    assert_paid_once(market, result.job, len(tokens))


async def test_provider_told_to_end_twice_ends_at_once_and_its_stream_goes_on_elsewhere(market: FaultMarket) -> None:
    await market.matchable()
    async with market.client() as client:
        stream, pieces, leaving = await market.begin(client)
        process = market.network.processes.roles[leaving].process
        market.network.processes.signal(leaving, signal.SIGTERM)
        await until(lambda: market.draining(leaving), "the provider does not drain")
        market.network.processes.signal(leaving, signal.SIGTERM)
        assert await ended(process) == 130
        pieces += [piece async for piece in stream]
        result = stream.result
        tokens = assert_delivered_once(market, result.job)
        assert "".join(pieces) == result.text
        assert [market.name_of(a.provider) for a in result.attempts] == [leaving, *(n for n in market.providers if n != leaving)]
    await market.restart(leaving)
    await market.settle()
    assert_paid_once(market, result.job, len(tokens))

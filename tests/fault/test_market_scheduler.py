"""The scheduler, the p2p processes and the chain die under running jobs. Streams go on, and the books agree afterwards."""

from __future__ import annotations

import pytest
from fault_market import FaultMarket, assert_delivered_once, assert_paid_once, attempts_of, until

from gpumarket.scheduler.lifecycle import AttemptState
from gpumarket.testnet.network import SCHEDULER
from gpumarket.testnet.plan import TINY_LLAMA

pytestmark = pytest.mark.timeout(600)
P2P = "gpumarket.p2p.host"


async def test_scheduler_killed_between_match_and_claim_honours_the_claim_once_when_it_is_back(market: FaultMarket) -> None:
    await market.matchable()
    async with market.client() as client:
        stream, pieces, provider = await market.begin(client)
        market.network.processes.kill(SCHEDULER)
        pieces += [piece async for piece in stream]
        result = stream.result
        tokens = assert_delivered_once(market, result.job)
        assert "".join(pieces) == result.text
        (attempt,) = attempts_of(market.books(), result.job)
        assert attempt.state == AttemptState.OPEN
        await market.restart(SCHEDULER)
        await market.matchable()
        following = await client.chat(TINY_LLAMA, "And the next one?", max_tokens=8)
        assert following.usage.output_tokens > 0
    await market.settle()
    (attempt,) = attempts_of(market.books(), result.job)
    assert market.name_of(attempt.provider) == provider
    assert_paid_once(market, result.job, len(tokens))


async def test_p2p_processes_killed_come_back_with_their_offers_while_a_job_goes_on(market: FaultMarket) -> None:
    await market.matchable()
    async with market.client() as client:
        stream, pieces, _ = await market.begin(client)
        before = {name: market.child(name, P2P) for name in (SCHEDULER, market.providers[0])}
        for process in before.values():
            process.kill()
        pieces += [piece async for piece in stream]
        tokens = assert_delivered_once(market, stream.result.job)
        assert len(stream.result.attempts) == 1

        async def back() -> bool:
            now = {name: market.children(name, P2P) for name in before}
            return all(found and found[0].pid != before[name].pid for name, found in now.items())

        await until(back, "a p2p process does not come back")
        assert {market.pid(name) for name in before} == {p.ppid() for name in before for p in market.children(name, P2P)}
        async with market.newcomer() as known:

            async def flow() -> bool:
                return await known() >= set(market.providers)

            await until(flow, "offers do not flow over p2p")
        result = await client.chat(TINY_LLAMA, "Still there?", max_tokens=8)
        assert result.usage.output_tokens > 0
    await market.settle()
    assert_paid_once(market, stream.result.job, len(tokens))


async def test_chain_killed_and_restarted_from_its_state_jobs_go_on_and_are_redeemed_after_it(market: FaultMarket) -> None:
    await market.matchable()
    async with market.client() as client:
        stream, pieces, _ = await market.begin(client)
        market.network.anvil.kill()
        pieces += [piece async for piece in stream]
        tokens = assert_delivered_once(market, stream.result.job)
        during = await client.chat(TINY_LLAMA, "Without a chain", max_tokens=8)
        market.network.restart_chain()
        await market.matchable()
        after = await client.chat(TINY_LLAMA, "With the chain again", max_tokens=8)
    await market.settle()
    assert_paid_once(market, stream.result.job, len(tokens))
    for result in (during, after):
        assert_paid_once(market, result.job, result.usage.output_tokens)
    assert sum([await market.unpaid(name) for name in market.providers]) == 0

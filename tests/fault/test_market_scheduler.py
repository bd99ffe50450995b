"""The scheduler, the p2p processes and the chain die under running jobs. Streams go on, and the books agree afterwards."""

from __future__ import annotations

import asyncio
import time

import pytest
from fault_market import FaultMarket, assert_delivered_once, assert_paid_once, attempts_of, until
from reliability import record

from gpumarket.core.errors import GpumarketError
from gpumarket.scheduler.lifecycle import AttemptState
from gpumarket.sdk.results import ChatResult
from gpumarket.testnet.plan import SCHEDULER, TINY_LLAMA

pytestmark = pytest.mark.timeout(600)
P2P = "gpumarket.p2p.host"
RECOVERY_SECONDS = 60.0
"""From a scheduler's start to the first new answer: its process, its ledger, the providers' hellos and GPU proofs."""


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
        started = time.monotonic()
        await market.restart(SCHEDULER)
        await market.matchable()
        following = await client.chat(TINY_LLAMA, "And the next one?", max_tokens=8)
        recovered = time.monotonic() - started
        assert following.usage.output_tokens > 0
    await market.settle()
    (attempt,) = attempts_of(market.books(), result.job)
    assert market.name_of(attempt.provider) == provider
    assert_paid_once(market, result.job, len(tokens))
    assert recovered < RECOVERY_SECONDS
    figure = f"the claim was honoured once when it was back; accepted jobs lost 0; from its start to the next answer {recovered:.1f} s"
    record("F03", 1, figure, f"jobs without an end 0; recovery {RECOVERY_SECONDS:.0f} s")


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


@pytest.mark.parametrize("away", [5, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(1_200)])])
async def test_chain_killed_and_restarted_from_its_state_jobs_go_on_and_are_redeemed_after_it(market: FaultMarket, away: int) -> None:
    """F31. While the chain is away the market goes on within what is deposited; when it is back all of it is redeemed, once."""
    await market.matchable()
    done: list[ChatResult] = []
    refused: list[GpumarketError] = []
    async with market.client() as client:

        async def served() -> bool:
            """Whether one more job was taken and done; refusals say that they pass."""
            try:
                done.append(await client.chat(TINY_LLAMA, f"Answer {len(done)}", max_tokens=8))
            except GpumarketError as error:
                assert error.retryable, error
                refused.append(error)
                return False
            return True

        stream, pieces, _ = await market.begin(client)
        market.network.anvil.kill()
        ends = time.monotonic() + away
        pieces += [piece async for piece in stream]
        tokens = assert_delivered_once(market, stream.result.job)
        assert await served(), "an outage that has just begun refuses nobody"
        while time.monotonic() < ends:
            await asyncio.sleep(min(away / 10, max(0.0, ends - time.monotonic())))
            await served()
        during = len(done)
        market.network.restart_chain()
        await market.matchable()
        await until(served, "no job is taken although the chain is back")
        done += [result for result in await client.resume_all() if isinstance(result, ChatResult)]
    await market.settle()
    assert_paid_once(market, stream.result.job, len(tokens))
    for result in done:
        assert_paid_once(market, result.job, result.usage.output_tokens)
    assert sum([await market.unpaid(name) for name in market.providers]) == 0
    figure = f"away for {away} s: {during} jobs done meanwhile, {len(refused)} refused for a while, redemptions lost 0, doubled 0"
    record("F31", 1, figure, "transactions lost 0; duplicates 0")

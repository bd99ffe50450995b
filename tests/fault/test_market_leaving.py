"""A client leaves a text in the middle, in the whole market: the provider stops, is paid what it delivered, and all books agree."""

from __future__ import annotations

import asyncio
import time

import pytest
from fault_market import MAX_TOKENS, WINDOW, FaultMarket, assert_delivered_once, attempts_of, until

from gpumarket.core.codec import from_proto, parse
from gpumarket.core.terms import Lease, Outcome, Receipt
from gpumarket.core.units import Hash, Money
from gpumarket.scheduler.lifecycle import AttemptState
from gpumarket.sdk.constraints import Constraints
from gpumarket.sdk.streaming import ChatStream
from gpumarket.settlement.pricing import client_amount
from gpumarket.testnet.plan import TINY_LLAMA
from gpumarket.v1 import terms_pb2 as pb

pytestmark = pytest.mark.timeout(600)


async def assert_billed_as_told(market: FaultMarket, job: Hash, units: int, cost: Money, receipt: Receipt | None) -> None:
    """What the client was told is what its acks, its provider's claim and the scheduler's ledger say; in flight was a window at most."""
    assert receipt is not None
    assert receipt.outcome is Outcome.CANCELLED
    assert units <= receipt.output_units <= units + WINDOW < MAX_TOKENS + WINDOW
    assert len(assert_delivered_once(market, job)) == units
    await market.settle()
    (attempt,) = attempts_of(market.books(), job)
    assert (attempt.units, attempt.complete, AttemptState(attempt.state)) == (units, False, AttemptState.OWED)
    lease = from_proto(Lease, parse(pb.SignedLease, attempt.signed_lease).lease)
    assert cost == client_amount(attempt.amount, lease.fee_ppm)


async def rest_of(stream: ChatStream) -> list[str]:
    return [piece async for piece in stream]


@pytest.mark.parametrize("how", ["aclose", "the reading task is cancelled"])
async def test_client_that_leaves_a_stream_pays_what_came_and_the_provider_stops(market: FaultMarket, how: str) -> None:
    await market.matchable()
    async with market.client() as client:
        stream, _, provider = await market.begin(client)
        began = time.monotonic()
        if how != "aclose":
            reading = asyncio.create_task(rest_of(stream))
            await asyncio.sleep(0)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        await stream.aclose()
        print(f"{how}: {time.monotonic() - began:.3f} s to the provider's receipt")
        end = stream.end
        assert end is not None
        assert end.provider is not None
        assert (end.outcome, market.name_of(end.provider)) == ("cancelled", provider)

        async def idle() -> bool:
            return not market.running_attempts()

        await until(idle, "an attempt still runs")
    await assert_billed_as_told(market, end.job, end.units, end.cost, end.receipt)


async def test_text_that_ends_at_a_stop_string_pays_what_came_and_the_provider_stops(market: FaultMarket) -> None:
    await market.matchable()
    async with market.client() as client:
        prompt = await market.long_prompt(client)
        whole = await client.chat(TINY_LLAMA, prompt, max_tokens=MAX_TOKENS, temperature=0.0)
        middle = len(whole.text) // 3
        stop = whole.text[middle : middle + 8]
        result = await client.chat(TINY_LLAMA, prompt, max_tokens=MAX_TOKENS, temperature=0.0, stop=stop)
        assert (result.text, result.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
        assert result.tokens == whole.tokens[: len(result.tokens)]
    await assert_billed_as_told(market, result.job, len(result.tokens), result.cost, result.receipt)


async def test_same_seed_gives_the_same_text_at_every_provider(market: FaultMarket) -> None:
    await market.matchable()
    async with market.client() as client:
        texts = set()
        for name in market.providers:
            only = Constraints(require_provider=market.address(name))
            answer = await client.chat(TINY_LLAMA, "Tell me of markets.", max_tokens=48, temperature=1.0, seed=42, constraints=only)
            assert market.name_of(answer.provider) == name
            texts.add(answer.tokens)
        assert len(texts) == 1
        other = await client.chat(TINY_LLAMA, "Tell me of markets.", max_tokens=48, temperature=1.0, seed=43)
        assert other.tokens not in texts

"""A client's process is killed in the middle of a job. Its journal knows, and a new client goes on from there."""

from __future__ import annotations

import pytest
from fault_market import MAX_TOKENS, WINDOW, FaultMarket, assert_delivered_once, assert_paid_once, attempts_of, until

from gpumarket.sdk.results import ChatResult

pytestmark = pytest.mark.timeout(600)
VICTIM = "client-process"


async def test_client_killed_in_mid_job_new_client_on_its_state_gets_the_rest_and_pays_once(market: FaultMarket) -> None:
    await market.matchable()
    async with market.client() as client:
        prompt = await market.long_prompt(client)
    market.spawn_client(VICTIM, prompt)
    await until(market.acknowledged, "the client's job does not get anywhere")
    market.network.processes.kill(VICTIM)
    (interrupted,) = market.running_attempts()
    async with market.client() as client:
        (result,) = await client.resume_all()
        assert isinstance(result, ChatResult)
        assert result.job == interrupted.job
        tokens = assert_delivered_once(market, result.job)
        assert len(tokens) == MAX_TOKENS
        assert list(result.tokens) == [int.from_bytes(token, "little") for token in tokens]
        assert [a.outcome for a in result.attempts] == ["client-restart", "completed"]
        assert await client.resume_all() == []
        again = await client.resume(result.job)
        assert isinstance(again, ChatResult)
        assert again.text == result.text
    await market.settle()
    first, _ = attempts_of(market.books(), result.job)
    assert first.units > 0
    assert_paid_once(market, result.job, len(tokens), unacked_max=WINDOW)

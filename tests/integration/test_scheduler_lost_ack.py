"""An ack that its provider never got, shown by the client that returns: the work is paid for, whenever the claim came."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from scheduler_world import (
    PRICE,
    SCHEDULER,
    TOKEN,
    Bought,
    HandChain,
    HandClock,
    ScriptedClient,
    ScriptedProvider,
    claim_call,
    deliver,
    key,
    running,
)

from gpumarket.core.terms import Outcome
from gpumarket.core.units import Address, money_from_bytes
from gpumarket.scheduler.market import Market
from gpumarket.v1 import market_pb2 as pb

UNIT = PRICE // 1_000_000
ROWS = [struct.pack("<2f", i, 1.0) for i in range(3)]  # of 3, 2 and 1 units


@dataclass
class Floor:
    """One scheduler, a client, two providers."""

    clock: HandClock
    market: Market
    client: ScriptedClient
    providers: dict[Address, ScriptedProvider]

    async def cut_short(self, check_seconds: int) -> tuple[Bought, ScriptedProvider]:
        """A job whose provider got the ack of its first row only, and claimed it; then `check_seconds` pass."""
        job = self.client.job()
        await self.client.match(job, pay=TOKEN)
        assert job.lease is not None
        provider = self.providers[job.lease.provider]
        deliver(provider.key, job, ROWS[:2], units=5, outcome=Outcome.CANCELLED)
        reply = await self.client.stub.Claim(claim_call(provider.key, self.clock, job, self.client.ack(job, 3, items=1)))
        assert (reply.state, money_from_bytes(reply.amount)) == (pb.CLAIM_STATE_HELD, 3 * UNIT)
        self.clock.pass_seconds(check_seconds)
        await self.market.billing.tick()
        for other in self.providers.values():
            await other.beat()
        return job, provider


@pytest.fixture
async def floor(tmp_path: Path, database: str) -> AsyncIterator[Floor]:
    clock = HandClock()
    chain = HandChain(SCHEDULER.address, clock)
    async with running(tmp_path / "scheduler", chain, clock, database=database) as market:
        client = ScriptedClient("client", chain.hub(key("client")), clock)
        await client.connect(market)
        providers = {p.address: p for p in (ScriptedProvider("p1", tmp_path), ScriptedProvider("p2", tmp_path))}
        for provider in providers.values():
            await provider.start(chain)
            await provider.ready(market, clock)
        yield Floor(clock, market, client, providers)
        for provider in providers.values():
            await provider.stop()
        await client.close()


@pytest.mark.parametrize("check_seconds", [0, 61], ids=["held", "owed"])
async def test_lost_ack_shown_with_the_retry_is_paid_whether_the_claim_is_held_or_owed(floor: Floor, check_seconds: int) -> None:
    job, first = await floor.cut_short(check_seconds)
    again = await floor.client.retry(job, 1, "client-restart", floor.client.ack(job, 5, items=2))
    assert again.HasField("granted"), again
    assert job.lease is not None
    assert job.lease.prefix_units == 5
    second = floor.providers[job.lease.provider]
    assert second is not first
    deliver(second.key, job, ROWS, units=1)
    reply = await floor.client.stub.Claim(claim_call(second.key, floor.clock, job, floor.client.ack(job, 1, complete=True)))
    assert (reply.state, money_from_bytes(reply.amount)) == (pb.CLAIM_STATE_OWED, UNIT)
    floor.clock.pass_seconds(61)
    await floor.market.billing.tick()
    told = await first.told(lambda down: down.HasField("voucher") and money_from_bytes(down.voucher.voucher.cumulative) == 5 * UNIT)
    assert told.voucher.signature
    account = await floor.client.account()
    assert (money_from_bytes(account.used), money_from_bytes(account.held), money_from_bytes(account.open)) == (6 * UNIT * 101 // 100, 0, 0)


@pytest.mark.parametrize("claimed", [False, True])
async def test_client_that_left_ends_its_job_and_has_the_rest_of_its_maximum_back(floor: Floor, claimed: bool) -> None:
    """Whichever comes first, its word or its provider's bill: what was acked is owed, and nobody gets the job after that."""
    job = floor.client.job()
    await floor.client.match(job, pay=TOKEN)
    assert job.lease is not None
    provider = floor.providers[job.lease.provider]
    deliver(provider.key, job, ROWS[:2], units=5, outcome=Outcome.CANCELLED)
    ack = floor.client.ack(job, 3, items=1)
    bill = claim_call(provider.key, floor.clock, job, ack)
    if claimed:
        await floor.client.stub.Claim(bill)
    answer = await floor.client.retry(job, 1, "client-left", ack)
    assert (answer.granted.lease.lease.attempt, answer.granted.lease.lease.provider) == (1, provider.address)
    if not claimed:
        await floor.client.stub.Claim(bill)
    account = await floor.client.account()
    assert (money_from_bytes(account.held), money_from_bytes(account.open)) == (3 * UNIT * 101 // 100, 0)
    again = await floor.client.retry(job, 1, "client-left", ack)
    assert again.granted.lease == answer.granted.lease, "said again, it changes nothing"
    refused = await floor.client.retry(job, 1, "lost", ack)
    assert "ended (cancelled)" in refused.problem.message
    floor.clock.pass_seconds(61)
    await floor.market.billing.tick()
    told = await provider.told(lambda down: down.HasField("voucher") and money_from_bytes(down.voucher.voucher.cumulative) == 3 * UNIT)
    assert told.voucher.signature
    account = await floor.client.account()
    assert (money_from_bytes(account.used), money_from_bytes(account.held)) == (3 * UNIT * 101 // 100, 0)

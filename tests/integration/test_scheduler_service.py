"""The Market service over real TLS with a real ledger: from order to voucher, and what must be refused on the way."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from scheduler_world import (
    CHANNELS,
    DOMAIN,
    MODEL,
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

from gpumarket.core.codec import signed_call
from gpumarket.core.errors import BadSignature, Busy, ChannelExpiring, GpumarketError, OutOfFunds, ProtocolError
from gpumarket.core.rpc import from_rpc
from gpumarket.core.terms import Outcome, Task, output_chain
from gpumarket.core.units import Hash, money_from_bytes
from gpumarket.scheduler.market import Market
from gpumarket.settlement.vouchers import verify_voucher
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import terms_pb2 as terms

UNIT = PRICE // 1_000_000
FEE = UNIT // 100
ROWS = [struct.pack("<2f", i, 1.0) for i in range(3)]
OTHER = [struct.pack("<2f", i + 5, 1.0) for i in range(3)]


@dataclass
class Floor:
    """One scheduler with providers and a client on it."""

    state: Path
    folder: Path
    clock: HandClock = field(default_factory=HandClock)
    market: Market = field(init=False)
    chain: HandChain = field(init=False)
    client: ScriptedClient = field(init=False)
    providers: list[ScriptedProvider] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chain = HandChain(SCHEDULER.address, self.clock)
        client = key("client")
        self.client = ScriptedClient("client", self.chain.hub(client), self.clock)

    async def provider(self, name: str, **changes: Any) -> ScriptedProvider:
        provider = ScriptedProvider(name, self.folder)
        self.providers.append(provider)
        await provider.start(self.chain)
        await provider.ready(self.market, self.clock, **changes)
        return provider

    async def claim(self, provider: ScriptedProvider, job: Bought, ack: terms.SignedAck | None) -> pb.ClaimReply:
        reply: pb.ClaimReply = await self.client.stub.Claim(claim_call(provider.key, self.clock, job, ack))
        return reply

    async def bought(self, **changes: Any) -> Bought:
        """An order that is granted."""
        job = self.client.job(**changes)
        reply = await self.client.match(job, pay=TOKEN)
        assert reply.HasField("granted"), reply
        return job


@pytest.fixture
async def floor(tmp_path: Path, database: str) -> AsyncIterator[Floor]:
    made = Floor(tmp_path / "scheduler", tmp_path)
    async with running(made.state, made.chain, made.clock, database=database) as market:
        made.market = market
        await made.client.connect(market)
        yield made
        for provider in made.providers:
            await provider.stop()
        await made.client.close()


def money(raw: bytes) -> int:
    return money_from_bytes(raw)


def error_of(caught: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> GpumarketError:
    return from_rpc(caught.value, "the scheduler")


async def test_order_claimed_without_check_is_owed_and_vouchered(floor: Floor) -> None:
    provider = await floor.provider("p1")
    job = await floor.bought()
    assert job.lease is not None
    assert (job.lease.provider, job.lease.attempt, job.lease.maximum) == (provider.address, 1, 6 * UNIT)
    deliver(provider.key, job, ROWS)
    reply = await floor.claim(provider, job, floor.client.ack(job, 6, complete=True))
    assert reply.state == pb.CLAIM_STATE_OWED
    assert money(reply.amount) == 6 * UNIT == money(reply.voucher.voucher.cumulative)
    channel = Hash(reply.voucher.voucher.channel)
    verify_voucher(CHANNELS, channel, 6 * UNIT, reply.voucher.signature, SCHEDULER.address)
    account = await floor.client.account()
    assert (money(account.used), money(account.held), money(account.open)) == (6 * (UNIT + FEE), 0, 0)
    told = await provider.told(lambda down: job.hash in down.settled)
    assert money(told.voucher.voucher.cumulative) == 6 * UNIT or told.voucher.ByteSize() == 0


async def test_claim_sent_again_is_paid_once(floor: Floor) -> None:
    provider = await floor.provider("p1")
    job = await floor.bought()
    deliver(provider.key, job, ROWS)
    ack = floor.client.ack(job, 6, complete=True)
    first, second = await floor.claim(provider, job, ack), await floor.claim(provider, job, ack)
    assert first == second


async def test_order_sent_again_answers_the_same_lease(floor: Floor) -> None:
    await floor.provider("p1")
    await floor.provider("p2")
    job = floor.client.job()
    first = await floor.client.match(job, pay=TOKEN)
    second = await floor.client.match(job)
    assert first.granted.lease == second.granted.lease
    assert first.granted.offer == second.granted.offer
    assert money((await floor.client.account()).open) == TOKEN


async def test_job_id_for_another_order_is_refused(floor: Floor) -> None:
    await floor.provider("p1")
    job = await floor.bought()
    other = floor.client.job(job_id=job.spec.job_id, inputs=[[9]])
    reply = await floor.client.match(other)
    assert (reply.problem.code, "another order" in reply.problem.message) == ("protocol", True)


async def test_order_without_voucher_is_out_of_funds_with_numbers(floor: Floor) -> None:
    await floor.provider("p1")
    reply = await floor.client.match(floor.client.job())
    assert reply.problem.code == OutOfFunds.code
    assert "the job may cost 1" in reply.problem.message
    assert "higher voucher" in reply.problem.hint


async def test_orders_beyond_the_voucher_are_out_of_funds(floor: Floor) -> None:
    await floor.provider("p1")
    await floor.bought()
    reply = await floor.client.match(floor.client.job())
    assert reply.problem.code == OutOfFunds.code
    assert "1 open" in reply.problem.message


async def test_order_with_a_voucher_that_was_overtaken_is_granted_by_the_newer_one(floor: Floor) -> None:
    await floor.provider("p1")
    older = floor.client.voucher(TOKEN)
    assert (await floor.client.match(floor.client.job(), pay=TOKEN)).HasField("granted")
    reply = await floor.client.match(floor.client.job(), voucher=older)
    assert reply.HasField("granted"), reply
    account = await floor.client.account()
    assert (money(account.voucher), money(account.open)) == (2 * TOKEN, 2 * TOKEN)


async def test_voucher_above_the_deposit_is_refused(floor: Floor) -> None:
    await floor.provider("p1")
    reply = await floor.client.match(floor.client.job(), pay=101 * TOKEN)
    assert reply.problem.code == OutOfFunds.code
    assert money((await floor.client.account()).voucher) == 0


async def test_voucher_by_another_key_is_refused(floor: Floor) -> None:
    await floor.provider("p1")
    floor.client.key, right = key("thief"), floor.client.key
    stolen = floor.client.voucher(TOKEN)
    floor.client.key = right
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await floor.client.stub.Deposit(stolen)
    assert isinstance(error_of(caught), BadSignature)


async def test_order_by_another_key_is_refused(floor: Floor) -> None:
    await floor.provider("p1")
    job = floor.client.job()
    job.order.signature = floor.client.job().order.signature
    reply = await floor.client.match(job, pay=TOKEN)
    assert reply.problem.code == BadSignature.code


async def test_order_on_a_channel_about_to_expire_is_refused(floor: Floor) -> None:
    await floor.provider("p1")
    channel = floor.chain.view.channels[floor.client.channel]
    floor.chain.put_channel(replace(channel, expires_at=floor.clock.now() + 700))
    reply = await floor.client.match(floor.client.job(), pay=TOKEN)
    assert reply.problem.code == ChannelExpiring.code


async def test_order_with_a_deadline_too_far_is_refused(floor: Floor) -> None:
    await floor.provider("p1")
    reply = await floor.client.match(floor.client.job(deadline=floor.clock.now() + 10**5), pay=TOKEN)
    assert reply.problem.code == ProtocolError.code


async def test_order_nobody_can_take_counts_the_filters(floor: Floor) -> None:
    await floor.provider("p1")
    await floor.provider("p2", model=Hash(b"\7" * 32))
    constraints = terms.Constraints(gpu_class="NVIDIA H200")
    reply = await floor.client.match(floor.client.job(constraints=constraints), pay=TOKEN)
    assert reply.no_match.considered == 2
    assert {r.filter: r.removed for r in reply.no_match.removed} == {"model": 1, "gpu_class": 1}
    assert money((await floor.client.account()).open) == 0


async def test_quote_needs_no_signature_and_reserves_nothing(floor: Floor) -> None:
    provider = await floor.provider("p1")
    job = floor.client.job()
    job.order.signature = b""
    reply = await floor.client.match(job, quote=True)
    assert reply.quote.provider == provider.address
    assert money(reply.quote.maximum) == 6 * (UNIT + FEE)
    assert not floor.market.ledger.jobs


async def test_order_at_the_quoted_maximum_is_granted_in_full(floor: Floor) -> None:
    await floor.provider("p1")
    quoted = money((await floor.client.match(floor.client.job(), quote=True)).quote.maximum)
    job = await floor.bought(max_amount=quoted)
    assert job.lease is not None
    assert job.lease.maximum == 6 * UNIT
    below = await floor.client.match(floor.client.job(max_amount=quoted - 1000))
    assert [r.filter for r in below.no_match.removed] == ["max_amount"]


async def test_checked_claim_is_held_until_the_report(floor: Floor) -> None:
    provider = await floor.provider("p1")
    job = await floor.bought()
    deliver(provider.key, job, ROWS)
    held = await floor.claim(provider, job, floor.client.ack(job, 6, complete=True, will_check=True))
    assert (held.state, held.HasField("voucher")) == (pb.CLAIM_STATE_HELD, False)
    status = await floor.client.report(job, pb.VERDICT_ACCEPTED)
    assert (status.state, money(status.amount)) == ("completed", 6 * (UNIT + FEE))
    owed = await floor.claim(provider, job, floor.client.ack(job, 6, complete=True, will_check=True))
    assert (owed.state, money(owed.voucher.voucher.cumulative)) == (pb.CLAIM_STATE_OWED, 6 * UNIT)


async def test_checked_claim_never_reported_is_owed_after_the_check_time(floor: Floor) -> None:
    provider = await floor.provider("p1")
    job = await floor.bought()
    deliver(provider.key, job, ROWS)
    ack = floor.client.ack(job, 6, complete=True, will_check=True)
    await floor.claim(provider, job, ack)
    floor.clock.pass_seconds(floor.market.settings.check_seconds)
    await floor.market.billing.tick()
    assert (await floor.claim(provider, job, ack)).state == pb.CLAIM_STATE_OWED


async def test_what_is_held_on_a_spoke_that_its_key_closed_elsewhere_is_owed_and_time_goes_on(floor: Floor) -> None:
    provider = await floor.provider("p1")
    job = await floor.bought()
    deliver(provider.key, job, ROWS)
    ack = floor.client.ack(job, 6, complete=True, will_check=True)
    assert (await floor.claim(provider, job, ack)).state == pb.CLAIM_STATE_HELD
    assert job.lease is not None
    spoke = job.lease.provider_channel
    floor.chain.put_channel(replace(floor.chain.view.channels[spoke], closed=True))
    floor.clock.pass_seconds(floor.market.settings.check_seconds)
    await floor.market.billing.tick()
    assert (await floor.claim(provider, job, ack)).state == pb.CLAIM_STATE_OWED
    state = floor.market.ledger.spokes[spoke].state
    assert (state.closed, state.vouchered, state.reserved) == (True, 6 * UNIT, 0)
    floor.market.ledger.check()


async def checked(floor: Floor, job: Bought, checker: ScriptedProvider, rows: list[bytes]) -> Bought:
    """A check job of all the job's inputs, bought from one checker."""
    opened = terms.EmbedRequest.FromString(job.request)
    only = terms.Constraints(require_provider=checker.address)
    check = await floor.bought(check_of=opened, constraints=only)
    deliver(checker.key, check, rows)
    return check


async def test_two_agreeing_checks_reject_and_return_the_money(floor: Floor) -> None:
    providers = {p.address: p for p in [await floor.provider(f"p{i}") for i in range(3)]}
    job = await floor.bought()
    assert job.lease is not None
    cheater = providers.pop(job.lease.provider)
    deliver(cheater.key, job, OTHER)
    ack = floor.client.ack(job, 6, complete=True, will_check=True)
    await floor.claim(cheater, job, ack)
    first, second = [await checked(floor, job, checker, ROWS) for checker in providers.values()]
    one = await floor.client.report(job, pb.VERDICT_REJECTED, [first])
    assert one.state == "checking", "one check holds, it does not reject"
    before = money((await floor.client.account()).held)
    status = await floor.client.report(job, pb.VERDICT_REJECTED, [first, second])
    assert (status.state, money(status.amount), status.attempts[0].state) == ("rejected", 0, "rejected")
    assert before - money((await floor.client.account()).held) == 6 * (UNIT + FEE)
    assert (await floor.claim(cheater, job, ack)).state == pb.CLAIM_STATE_REJECTED
    told = await cheater.told(lambda down: "jailed" in down.notice)
    assert "rejected" in told.notice
    again = await floor.client.retry(job, 1, "bad-output")
    assert again.granted.lease.lease.provider != cheater.address
    assert again.granted.lease.lease.attempt == 2


async def test_rejection_that_a_check_contradicts_is_refused(floor: Floor) -> None:
    providers = {p.address: p for p in [await floor.provider(f"p{i}") for i in range(3)]}
    job = await floor.bought()
    assert job.lease is not None
    honest = providers.pop(job.lease.provider)
    deliver(honest.key, job, ROWS)
    await floor.claim(honest, job, floor.client.ack(job, 6, complete=True, will_check=True))
    liar, witness = providers.values()
    lie, truth = await checked(floor, job, liar, OTHER), await checked(floor, job, witness, ROWS)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await floor.client.report(job, pb.VERDICT_REJECTED, [lie, truth])
    assert "does not reject" in error_of(caught).message
    assert (await floor.client.report(lie, pb.VERDICT_REJECTED, [truth, job])).attempts[0].state == "rejected"


async def test_rejection_by_checks_of_one_owner_is_refused(floor: Floor) -> None:
    owner = key("one owner").address
    providers = {}
    for i in range(3):
        provider = await floor.provider(f"p{i}")
        providers[provider.address] = provider
    job = await floor.bought()
    assert job.lease is not None
    cheater = providers.pop(job.lease.provider)
    deliver(cheater.key, job, OTHER)
    await floor.claim(cheater, job, floor.client.ack(job, 6, complete=True, will_check=True))
    checks = [await checked(floor, job, checker, ROWS) for checker in providers.values()]
    for checker in providers.values():
        floor.chain.put_node(replace(floor.chain.view.nodes[checker.address], owner=owner))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await floor.client.report(job, pb.VERDICT_REJECTED, checks)
    assert "different owners" in error_of(caught).message


async def test_rejection_without_evidence_is_refused(floor: Floor) -> None:
    provider = await floor.provider("p1")
    job = await floor.bought()
    deliver(provider.key, job, ROWS)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await floor.client.report(job, pb.VERDICT_REJECTED, [])
    assert isinstance(error_of(caught), ProtocolError)


async def test_retry_pays_acked_units_once_and_excludes_the_dead_provider(floor: Floor) -> None:
    for name in ("p1", "p2"):
        await floor.provider(name)
    by_address = {p.address: p for p in floor.providers}
    job = await floor.bought()
    assert job.lease is not None
    dead = by_address[job.lease.provider]
    deliver(dead.key, job, ROWS[:1], units=3, outcome=Outcome.CANCELLED)
    first = replace_lease(job)
    ack = floor.client.ack(job, 3, items=1)
    reply = await floor.client.retry(job, 1, "lost", ack)
    lease = job.lease
    assert (lease.attempt, lease.prefix_units, lease.prefix_hash) == (2, 3, output_chain(ROWS[:1]))
    assert lease.provider != dead.address
    assert lease.maximum == 3 * UNIT
    assert await floor.client.retry(job, 1, "lost", ack) == reply, "a repeated retry answers the same lease"
    alive = by_address[lease.provider]
    deliver(alive.key, job, ROWS)
    done = await floor.claim(alive, job, floor.client.ack(job, 3, complete=True))
    assert (done.state, money(done.amount)) == (pb.CLAIM_STATE_OWED, 3 * UNIT)
    late = await floor.claim(dead, first, ack)
    assert (late.state, money(late.amount)) == (pb.CLAIM_STATE_HELD, 3 * UNIT)
    floor.clock.pass_seconds(floor.market.settings.check_seconds)
    await floor.market.billing.tick()
    assert money((await floor.client.account()).used) == 6 * (UNIT + FEE)


def replace_lease(job: Bought) -> Bought:
    """The job as its first attempt knows it."""
    return Bought(job.spec, job.order, job.request, job.salt, job.lease, job.signed_lease, job.receipt, list(job.output))


async def test_signed_ack_above_the_retrys_wins_and_its_client_is_refused(floor: Floor) -> None:
    for name in ("p1", "p2"):
        await floor.provider(name)
    by_address = {p.address: p for p in floor.providers}
    job = await floor.bought()
    assert job.lease is not None
    wronged = by_address[job.lease.provider]
    deliver(wronged.key, job, ROWS)
    signed = floor.client.ack(job, 6, complete=True)
    first = replace_lease(job)
    await floor.client.retry(job, 1, "lost")
    early = await floor.claim(wronged, first, signed)
    assert (early.state, money(early.amount)) == (pb.CLAIM_STATE_HELD, 0), "the running attempt may need what is open"
    second = by_address[job.lease.provider]
    deliver(second.key, job, ROWS)
    await floor.claim(second, job, floor.client.ack(job, 6, complete=True))
    paid = await floor.claim(wronged, first, signed)
    assert (paid.state, money(paid.amount)) == (pb.CLAIM_STATE_OWED, 6 * UNIT)
    account = await floor.client.account()
    assert (money(account.used), money(account.open), money(account.held)) == (12 * (UNIT + FEE), 0, 0)
    floor.market.ledger.check()
    refused = await floor.client.match(floor.client.job(), pay=TOKEN)
    assert "no orders are taken" in refused.problem.message
    floor.clock.pass_seconds(3_601)
    for provider in floor.providers:
        await provider.beat()
    assert "no orders" not in (await floor.client.match(floor.client.job(), pay=TOKEN)).problem.message


async def test_one_clients_word_against_a_provider_counts_once_an_hour(floor: Floor) -> None:
    provider = await floor.provider("p1")

    async def blamed() -> float:
        job = await floor.bought()
        await floor.client.retry(job, 1, "lost")
        return floor.market.ledger.reputations[provider.address].broken

    first = await blamed()
    assert await blamed() == first > 0
    floor.clock.pass_seconds(3_601)
    await provider.beat()
    standing = floor.market.book.entries[provider.address].standing
    while standing.heartbeat < floor.clock.monotonic():  # noqa: ASYNC110  the beat is on its way
        await asyncio.sleep(0.01)
    assert await blamed() > first


async def test_retry_on_a_channel_whose_close_is_signed_is_refused(floor: Floor) -> None:
    provider = await floor.provider("p1")
    await floor.provider("p2")
    job = await floor.bought()
    deliver(provider.key, job, ROWS)
    by_address = {p.address: p for p in floor.providers}
    assert job.lease is not None
    done = floor.client.ack(job, 6, complete=True)
    deliver(by_address[job.lease.provider].key, job, ROWS)
    await floor.claim(by_address[job.lease.provider], job, done)
    await floor.client.stub.CloseChannel(floor.client.call("Market/CloseChannel", pb.AccountRequest(channel=floor.client.channel)))
    again = await floor.client.retry(job, 1, "bad-output", floor.client.ack(job, 6, complete=True))
    assert again.problem.code == ChannelExpiring.code
    assert floor.market.ledger.hubs[floor.client.channel].state.open == 0


async def test_claim_by_another_provider_is_refused(floor: Floor) -> None:
    for name in ("p1", "p2"):
        await floor.provider(name)
    job = await floor.bought()
    assert job.lease is not None
    thief = next(p for p in floor.providers if p.address != job.lease.provider)
    deliver(thief.key, job, ROWS)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await floor.claim(thief, job, floor.client.ack(job, 6, complete=True))
    assert isinstance(error_of(caught), ProtocolError)


async def test_call_sent_twice_is_refused(floor: Floor) -> None:
    call = floor.client.call("Market/GetAccount", pb.AccountRequest(channel=floor.client.channel))
    await floor.client.stub.GetAccount(call)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await floor.client.stub.GetAccount(call)
    assert isinstance(error_of(caught), BadSignature)


async def test_unclaimed_job_gives_its_maximum_back_after_the_grace(floor: Floor) -> None:
    await floor.provider("p1")
    job = await floor.bought()
    floor.clock.pass_seconds(600 + floor.market.settings.claim_grace_seconds)
    await floor.market.billing.tick()
    assert money((await floor.client.account()).open) == 0
    status = await floor.client.stub.GetJob(floor.client.call("Market/GetJob", pb.JobRequest(job=job.spec.key)))
    assert (status.state, status.attempts[0].state) == ("expired", "expired")


async def test_restart_from_the_same_database_continues(tmp_path: Path, database: str) -> None:
    floor = Floor(tmp_path / "scheduler", tmp_path)
    async with running(floor.state, floor.chain, floor.clock, database=database) as floor.market:
        await floor.client.connect(floor.market)
        provider = await floor.provider("p1")
        paid, job = await floor.bought(), floor.client.job()
        deliver(provider.key, paid, ROWS)
        owed = await floor.claim(provider, paid, floor.client.ack(paid, 6, complete=True))
        granted = await floor.client.match(job, pay=TOKEN)
        await provider.stop()
    async with running(floor.state, floor.chain, floor.clock, database=database) as floor.market:
        await floor.client.connect(floor.market)
        assert (await floor.client.match(job)).granted.lease == granted.granted.lease
        again = await floor.claim(provider, paid, floor.client.ack(paid, 6, complete=True))
        assert again == owed
        deliver(provider.key, job, ROWS)
        more = await floor.claim(provider, job, floor.client.ack(job, 6, complete=True))
        assert money(more.voucher.voucher.cumulative) == 12 * UNIT
        assert len(floor.chain.opened) == 1
        back = await floor.provider("p1")
        assert len(floor.chain.opened) == 1, "a restart opens no second channel"
        await back.stop()
        await floor.client.close()


async def test_provider_with_a_bad_proof_is_told_and_not_matched(floor: Floor) -> None:
    cheat = ScriptedProvider("p1", floor.folder, honest_gpu=False)
    floor.providers.append(cheat)
    await cheat.start(floor.chain)
    await cheat.greet(floor.market, floor.clock)
    told = await cheat.told(lambda down: "failed" in down.notice)
    assert "off by" in told.notice
    reply = await floor.client.match(floor.client.job(), pay=TOKEN)
    assert [r.filter for r in reply.no_match.removed] == ["gpu_proof"]


async def test_provider_without_a_proof_gets_no_channel(floor: Floor) -> None:
    provider = ScriptedProvider("faker", floor.folder, honest_gpu=False)
    floor.providers.append(provider)
    await provider.start(floor.chain)
    await provider.greet(floor.market, floor.clock)
    await provider.told(lambda down: "GPU proof failed" in down.notice)
    assert floor.chain.opened == [], "a registered key alone must not lock up our money"


async def test_stream_without_a_hello_is_ended(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumarket.scheduler.greeting.HELLO_SECONDS", 0.05)
    call = floor.client.stub.Heartbeat()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert "no hello" in error_of(caught).message


async def test_providers_unknown_to_the_chain_are_limited(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumarket.scheduler.greeting.UNLISTED_MAX", 1)
    for name in ("stranger", "another"):
        provider = ScriptedProvider(name, floor.folder)
        floor.providers.append(provider)
        await provider.greet(floor.market, floor.clock)
        if name == "stranger":
            await provider.told(lambda down: "not registered" in down.notice)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await floor.providers[1].call.read()
    assert isinstance(error_of(caught), Busy)
    await floor.provider("registered")


async def test_provider_not_registered_is_told_and_not_listed(floor: Floor) -> None:
    stranger = ScriptedProvider("p1", floor.folder)
    floor.providers.append(stranger)
    await stranger.start(floor.chain)
    del floor.chain.view.nodes[stranger.address]
    await stranger.greet(floor.market, floor.clock)
    told = await stranger.told(lambda down: down.notice)
    assert "not registered" in told.notice
    assert (await floor.client.match(floor.client.job(), pay=TOKEN)).no_match.considered == 0


async def test_provider_silent_for_three_seconds_is_not_matched(floor: Floor) -> None:
    await floor.provider("p1")
    floor.clock.mono += 3.5
    reply = await floor.client.match(floor.client.job(), pay=TOKEN)
    assert [r.filter for r in reply.no_match.removed] == ["heartbeat"]


async def test_heartbeat_with_another_providers_offer_is_refused(floor: Floor) -> None:
    mine, other = ScriptedProvider("p1", floor.folder), ScriptedProvider("p2", floor.folder)
    floor.providers += [mine, other]
    await mine.start(floor.chain)
    await other.start(floor.chain)
    floor.client.key, client = mine.key, floor.client.key
    call = floor.client.stub.Heartbeat()
    offer, nonce = other.offer(floor.clock), Hash(b"n" * 32)
    hello = signed_call(mine.key, DOMAIN, "Market/Heartbeat", offer, SCHEDULER.address, floor.clock.now(), nonce)
    await call.write(pb.HeartbeatUp(hello=hello))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert isinstance(error_of(caught), ProtocolError)
    floor.client.key = client


async def test_watch_resumes_from_its_revision(floor: Floor) -> None:
    await floor.provider("p1")
    events = []
    call = floor.client.stub.WatchOffers(pb.WatchRequest())
    async for event in call:
        events.append(event)
        if event.synced:
            break
    call.cancel()
    known = [listing.body.SerializeToString(deterministic=True) for listing, _ in floor.market.listings.listed.values()]
    assert [e.offer.body for e in events[:-1]] == known
    second = await floor.provider("p2")
    call = floor.client.stub.WatchOffers(pb.WatchRequest(from_revision=events[-1].revision, model=MODEL))
    event = await call.read()
    assert terms.OfferBody.FromString(event.offer.body).provider == second.address
    assert (await call.read()).synced
    call.cancel()


async def test_watchers_and_streams_beyond_the_limit_are_refused(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumarket.scheduler.service.WATCHERS_MAX", 1)
    monkeypatch.setattr("gpumarket.scheduler.service.STREAMS_MAX", 0)
    first = floor.client.stub.WatchOffers(pb.WatchRequest())
    assert (await first.read()).synced
    for call in (floor.client.stub.WatchOffers(pb.WatchRequest()), floor.client.stub.Match()):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert isinstance(error_of(caught), Busy)
    first.cancel()


async def test_explain_tells_scores_and_rejections(floor: Floor) -> None:
    provider = await floor.provider("p1")
    await floor.provider("p2", price=10**6 * TOKEN)
    told = await floor.client.stub.Explain(floor.client.job().order)
    assert [(s.provider, s.chosen) for s in told.candidates] == [(provider.address, True)]
    assert sum(told.candidates[0].parts.values()) == pytest.approx(told.candidates[0].total)
    assert [r.filter for r in told.rejected] == ["max_amount"]
    assert "would cost" in told.rejected[0].reason
    assert [(c.filter, c.removed) for c in told.removed] == [("max_amount", 1)]


async def test_questions_that_walk_the_book_too_often_are_refused_until_later(floor: Floor) -> None:
    await floor.provider("p1")
    allowance = floor.market.service._allowance
    allowance._at_once = 20
    unfitting = floor.client.job(constraints=terms.Constraints(gpu_class="none such"))
    unsigned = terms.JobOrder(spec=unfitting.order.spec, constraints=unfitting.order.constraints)
    while (reply := await floor.client.match(unfitting, quote=True)).HasField("no_match"):
        await floor.client.stub.Explain(unsigned)
    assert reply.problem.code == Busy.code and reply.problem.retryable
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await floor.client.stub.Explain(unsigned)
    error = error_of(caught)
    assert isinstance(error, Busy)
    assert error.retry_after_seconds > 0
    assert (await floor.client.match(floor.client.job(), pay=TOKEN)).problem.code == Busy.code
    floor.clock.mono += error.retry_after_seconds
    assert (await floor.client.match(floor.client.job(), quote=True)).WhichOneof("result") in ("quote", "no_match")


@pytest.mark.parametrize("quote", [True, False])
async def test_text_longer_than_the_model_takes_is_matched_nowhere(floor: Floor, quote: bool) -> None:
    await floor.provider("p1", text=True)
    fits, long = (floor.client.job(task=Task.GENERATE, prompt_units=400, max_output_units=units) for units in (112, 113))
    assert (await floor.client.match(fits, pay=TOKEN, quote=quote)).WhichOneof("result") == ("quote" if quote else "granted")
    reply = await floor.client.match(long, pay=TOKEN, quote=quote)
    assert [(r.filter, r.example) for r in reply.no_match.removed] == [("input_tokens", "inputs of at most 512 tokens, asked are 513")]


async def test_questions_that_find_a_place_are_never_refused(floor: Floor) -> None:
    await floor.provider("p1")
    floor.market.service._allowance._at_once = 0
    for _ in range(50):
        assert (await floor.client.match(floor.client.job(), quote=True)).HasField("quote")


async def test_close_is_signed_once_nothing_is_open_and_ends_orders(floor: Floor) -> None:
    provider = await floor.provider("p1")
    job = await floor.bought()

    def call() -> terms.SignedCall:
        return floor.client.call("Market/CloseChannel", pb.AccountRequest(channel=floor.client.channel))

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await floor.client.stub.CloseChannel(call())
    assert "still open" in error_of(caught).message
    deliver(provider.key, job, ROWS)
    await floor.claim(provider, job, floor.client.ack(job, 6, complete=True))
    closed = await floor.client.stub.CloseChannel(call())
    assert money(closed.cumulative) == 6 * (UNIT + FEE)
    reply = await floor.client.match(floor.client.job(), pay=TOKEN)
    assert reply.problem.code == ChannelExpiring.code


async def test_many_orders_on_one_stream_share_commits(floor: Floor) -> None:
    await floor.provider("p1")
    await floor.client.stub.Deposit(floor.client.voucher(20 * TOKEN))
    before = floor.market.world.journal.batches
    call = floor.client.stub.Match()
    jobs = [floor.client.job() for _ in range(8)]
    for i, job in enumerate(jobs):
        await call.write(pb.MatchRequest(id=i + 1, order=job.order, client_channel=floor.client.channel))
    await call.done_writing()
    replies = [reply async for reply in call]
    assert sorted(r.id for r in replies) == list(range(1, 9))
    assert [r.WhichOneof("result") for r in replies] == ["granted"] * 8, replies
    assert floor.market.world.journal.batches - before <= 8
    assert [r.filter for r in (await floor.client.match(floor.client.job())).no_match.removed] == ["capacity"]

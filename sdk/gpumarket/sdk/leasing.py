"""Getting a lease: placing the order, asking for the next attempt, and refusing a lease that is not what was ordered.

Both calls are idempotent by job key and attempt. Never: an order that is not journaled with the voucher that covers it, a lease that
`lease_rules` did not pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from sqlalchemy import Connection

from gpumarket.core.codec import open_lease, open_offer, parse, signed_ack
from gpumarket.core.errors import Busy, GpumarketError, JobFailed, NoProvider, OutOfFunds, ProtocolError
from gpumarket.core.terms import Lease
from gpumarket.core.units import Address, Hash, hex0x
from gpumarket.sdk import store
from gpumarket.sdk.account import PaidChannelState, Report
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.lease_rules import Expected, check_lease
from gpumarket.sdk.logs import log
from gpumarket.sdk.session import RETRY_MARGIN_SECONDS, Progress, RetryElsewhere
from gpumarket.v1 import market_pb2 as mpb
from gpumarket.v1 import terms_pb2 as pb

FUNDS_PAUSE_SECONDS = 0.3
"""Between two looks at the account while other jobs' maxima are still reserved at the scheduler."""
RETRY_PAUSE_SECONDS, RETRY_PAUSE_SECONDS_MAX = 0.2, 2.0
Place = Callable[[float | None], Awaitable[mpb.MatchReply]]
"""Sends an order; its argument is how long one that finds everybody busy is sent again."""


async def order(
    desk: Desk, job: store.StoredJob, channel: PaidChannelState, *, explain: bool = False, traceparent: str = ""
) -> mpb.Granted:
    """Place a journaled order; sent again, it answers the same lease. Raises NoProvider, Busy, OutOfFunds or the scheduler's refusal.

    The newest voucher goes with it, of whichever job: one of before an await may have been overtaken by another job's meanwhile.
    """
    give_up_at = desk.clock.monotonic() + desk.settings.failover_seconds

    async def place(busy_seconds: float | None = None) -> mpb.MatchReply:
        request = mpb.MatchRequest(order=job.order, client_channel=channel.id, explain=explain, traceparent=traceparent)
        if channel.voucher > channel.report.voucher:
            request.voucher.CopyFrom(desk.account.voucher(channel))
        return await desk.schedulers.line(job.spec.scheduler).match(request, busy_seconds)

    reply: mpb.MatchReply | None = None
    while reply is None:
        try:
            reply = await place()
        except OutOfFunds as error:
            reply = await _topped_up(desk, job, channel, error, give_up_at, place)
    if not reply.HasField("granted"):
        raise ProtocolError("the scheduler answered an order without a lease")
    channel.report, channel.reported = Report.of(reply.granted.account), True
    return reply.granted


async def next_attempt(
    desk: Desk,
    job: store.StoredJob,
    progress: Progress,
    retry: RetryElsewhere,
    receipt: pb.SignedReceipt | None,
    *,
    traceparent: str = "",
) -> mpb.Granted:
    """Close an attempt at its last ack and ask for the next one; while nobody is free, for a bounded time. Raises JobFailed."""
    request = mpb.RetryRequest(job=job.job, attempt=retry.end.number, reason=retry.end.reason)
    if retry.ack is not None:
        request.last_ack.CopyFrom(signed_ack(desk.signer, desk.domain, retry.ack))
    if receipt is not None:
        request.receipt.CopyFrom(receipt)
    give_up_at = desk.clock.monotonic() + desk.settings.failover_seconds
    pause = RETRY_PAUSE_SECONDS
    while True:
        try:
            return await desk.schedulers.line(job.spec.scheduler).retry(request, traceparent)
        except (NoProvider, Busy) as error:
            late = desk.clock.now() + RETRY_MARGIN_SECONDS > job.spec.deadline
            if late or desk.clock.monotonic() + pause > give_up_at:
                raise failure(progress, error) from error
        await asyncio.sleep(pause)
        pause = min(2 * pause, RETRY_PAUSE_SECONDS_MAX)


async def tell_left(desk: Desk, job: store.StoredJob, attempt: int, ack: pb.SignedAck | None) -> None:
    """Tell the scheduler that the job has ended, so that it does not keep the rest of its maximum until the deadline. It is told once; one
    that is not reached, or knows no such job, finds out by the deadline."""
    request = mpb.RetryRequest(job=job.job, attempt=attempt, reason="client-left", last_ack=ack)
    try:
        await desk.schedulers.line(job.spec.scheduler).retry(request)
    except GpumarketError as error:
        log.info("leaving_not_told", job=hex0x(job.job), reason=error.message)


async def checked(desk: Desk, job: store.StoredJob, channel: Hash, progress: Progress, granted: mpb.Granted) -> tuple[Lease, pb.OfferBody]:
    """The lease and the offer behind it, after every rule. Raises BadSignature or ProtocolError."""
    lease = open_lease(desk.domain, granted.lease)
    body = open_offer(desk.domain, granted.offer)
    expected = Expected(
        spec=job.spec,
        ordered_at=job.created_at,
        constraints=parse(pb.Constraints, job.order.constraints),
        attempt=progress.attempt + 1,
        channel=channel,
        fee_ppm=(await desk.schedulers.line(job.spec.scheduler).info()).fee_ppm,
        spent=progress.billed,
        prefix_units=progress.units,
        prefix_hash=progress.output_hash,
        lost_providers=_barred(progress),
    )
    check_lease(lease, expected, body, await desk.registered(lease.provider), desk.clock.now())
    return lease, body


def _barred(progress: Progress) -> frozenset[Address]:
    """Providers that may not get the next attempt: where the last one was lost, and whose output was bad. Others may be reached now."""
    last = [e.provider for e in progress.ends[-1:] if e.reason != "client-restart"]
    return frozenset(last + [e.provider for e in progress.ends if e.reason == "bad-output"])


def failure(progress: Progress, cause: GpumarketError | None = None) -> JobFailed:
    """Why a job ended without an answer: every attempt's reason."""
    parts = [f"attempt {e.number} at {hex0x(e.provider)}: {e.reason} ({e.detail})" for e in progress.ends]
    if cause is not None:
        parts.append(cause.message)
    if not parts:
        parts.append("its deadline passed before it had a provider")
    return JobFailed(
        "the job ended without a result: " + "; ".join(parts),
        hint="gpumarket job get JOB shows each attempt; what was delivered and acked is paid, nothing else",
        retryable=True,
    )


async def _topped_up(
    desk: Desk, job: store.StoredJob, channel: PaidChannelState, refusal: OutOfFunds, give_up_at: float, place: Place
) -> mpb.MatchReply | None:
    """Raise the voucher by the scheduler's account and order again. None when it is to be tried again.

    One job at a time: several that read the same account would each cover one job, and all but one of them be refused again.
    """
    async with channel.topping_up:
        if await _raised(desk, job, channel, refusal, give_up_at):
            try:
                return await place(0.0)
            except (OutOfFunds, Busy):
                return None  # the caller orders again, and waits for a place without holding up the others
    await asyncio.sleep(FUNDS_PAUSE_SECONDS)
    return None


async def _raised(desk: Desk, job: store.StoredJob, channel: PaidChannelState, refusal: OutOfFunds, give_up_at: float) -> bool:
    """The scheduler reckons with more than our books: jobs whose provider has not billed yet still hold their maximum there."""
    channel.report, channel.reported = await _reported(desk, channel, give_up_at), True
    before, late = channel.voucher, desk.clock.monotonic() > give_up_at
    try:
        await desk.account.cover(channel, job.spec.max_amount, _nothing, by_report=True)
    except OutOfFunds:
        if late or not channel.report.open + channel.report.held:
            raise
    if channel.voucher == before and channel.report.voucher >= before:
        if late:
            raise refusal
        return False
    return True


async def _reported(desk: Desk, channel: PaidChannelState, give_up_at: float) -> Report:
    """The scheduler's account. A channel that was just opened may still be unknown there: its view of the chain is a moment behind ours."""
    while True:
        try:
            return Report.of(await desk.schedulers.line(channel.scheduler).account(channel.id))
        except OutOfFunds:
            if desk.clock.monotonic() > give_up_at:
                raise
        await asyncio.sleep(FUNDS_PAUSE_SECONDS)


def _nothing(_connection: Connection) -> None:
    """No record goes with this voucher."""

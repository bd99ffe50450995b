"""Answers of the Market service as messages. No decisions."""

from __future__ import annotations

from gpumarket.core.codec import voucher_proto
from gpumarket.core.errors import GpumarketError, OutOfFunds
from gpumarket.core.rpc import for_peer
from gpumarket.core.terms import Voucher
from gpumarket.core.units import MONEY_MAX, PER_MILLION, Money, format_money, money_bytes
from gpumarket.scheduler.explain import Story
from gpumarket.scheduler.filters import Wanted
from gpumarket.scheduler.lifecycle import Job, charged
from gpumarket.scheduler.match import NoMatch, Plan, Removed
from gpumarket.settlement.channel import ReceivedChannel
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import terms_pb2


def granted(
    request_id: int,
    lease: terms_pb2.SignedLease,
    offer: terms_pb2.SignedOffer,
    hub: ReceivedChannel,
    story: pb.Explanation | None = None,
) -> pb.MatchReply:
    body = pb.Granted(lease=lease, offer=offer, account=_sums(hub), explanation=story)
    return pb.MatchReply(id=request_id, granted=body)


def account(hub: ReceivedChannel) -> pb.Account:
    """A channel's sums, and the voucher that proves what its payer has signed."""
    found = _sums(hub)
    if hub.signature:
        found.newest.CopyFrom(voucher_proto(Voucher(hub.id, Money(hub.voucher)), hub.signature))
    return found


def _sums(hub: ReceivedChannel) -> pb.Account:
    return pb.Account(
        channel=hub.id,
        deposit=money_bytes(hub.deposit),
        voucher=money_bytes(hub.voucher),
        used=money_bytes(hub.used),
        held=money_bytes(hub.held),
        open=money_bytes(hub.open),
    )


def problem(request_id: int, error: GpumarketError) -> pb.MatchReply:
    error = for_peer(error)
    body = pb.Problem(code=error.code, message=error.message, hint=error.hint, retryable=error.retryable)
    return pb.MatchReply(id=request_id, problem=body)


def short_of_funds(wanted: int, hub: ReceivedChannel) -> OutOfFunds:
    """The refusal with its numbers."""
    return OutOfFunds(
        f"the job may cost {format_money(wanted)}, the voucher leaves {format_money(hub.free)}: {format_money(hub.voucher)} vouchered, "
        f"{format_money(hub.used)} used, {format_money(hub.held)} held, {format_money(hub.open)} open; deposit {format_money(hub.deposit)}",
        hint="send a higher voucher; top the channel up when the deposit is used",
    )


def no_match(request_id: int, found: NoMatch) -> pb.MatchReply:
    return pb.MatchReply(id=request_id, no_match=pb.NoMatch(considered=found.considered, removed=_counts(found.removed)))


def _counts(removed: tuple[Removed, ...]) -> list[pb.FilterCount]:
    return [pb.FilterCount(filter=r.filter, removed=r.count, example=r.example) for r in removed]


def quote(request_id: int, plan: Plan, wanted: Wanted, fee_ppm: int) -> pb.MatchReply:
    """The most that the client would pay, rounded up so that an order with this maximum is never short."""
    sale = plan.sale
    cost = -(-wanted.prompt_units * sale.prompt_price // PER_MILLION) + -(-wanted.output_units * sale.output_price // PER_MILLION)
    most = cost + -(-cost * fee_ppm // PER_MILLION)
    body = pb.Quote(
        provider=plan.provider,
        prompt_price_per_mtok=money_bytes(sale.prompt_price),
        output_price_per_mtok=money_bytes(sale.output_price),
        fee_ppm=fee_ppm,
        maximum=money_bytes(min(most, MONEY_MAX)),
    )
    return pb.MatchReply(id=request_id, quote=body)


def explanation(seed: bytes, story: Story) -> pb.Explanation:
    return pb.Explanation(
        seed=seed,
        considered=story.considered,
        candidates=[pb.Score(provider=s.provider, total=s.total, parts=s.parts, chosen=s.chosen) for s in story.candidates],
        rejected=[pb.Rejected(provider=r.provider, filter=r.filter, reason=r.reason) for r in story.rejected],
        explored=story.explored,
        removed=_counts(story.removed),
    )


def job_status(job: Job) -> pb.JobStatus:
    """State, what the client pays, and every attempt; the lease and offer of the newest."""
    newest = job.newest
    attempts = [
        pb.Attempt(
            attempt=a.lease.attempt,
            provider=a.lease.provider,
            state=a.state.name.lower(),
            amount=money_bytes(a.amount),
            units=a.units,
        )
        for a in job.attempts
    ]
    return pb.JobStatus(
        job=job.key,
        state=job.state.name.lower(),
        amount=money_bytes(sum(charged(a) for a in job.attempts)),
        attempts=attempts,
        lease=terms_pb2.SignedLease.FromString(newest.signed),
        offer=terms_pb2.SignedOffer.FromString(newest.offer),
    )

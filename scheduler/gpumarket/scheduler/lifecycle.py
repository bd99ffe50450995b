"""One job and its attempts: `event(job, ...) -> (job, [instruction])`. Pure; the ledger carries the instructions out.

    attempt  OPEN ── claim, complete, no check ──────────► OWED         job  LEASED ── complete claim ► DELIVERED or CHECKING ► COMPLETED
             OPEN ── claim or retry, something earned ───► HELD                LEASED ── client left, or lapse ► CANCELLED
             OPEN ── claim or retry, nothing earned ─────► CLOSED              LEASED ── lapse ► CANCELLED, FAILED or EXPIRED
             OPEN ── deadline and claim grace over ──────► EXPIRED             any but a lapsed one ── retry ► LEASED
             HELD ── accepted, or check time over ───────► OWED                DELIVERED, CHECKING ── reject ► REJECTED
             OPEN, HELD ── rejected on evidence ─────────► REJECTED
             HELD, CLOSED by retry ── higher ack ────────► HELD
             HELD, CLOSED, OWED ── retry, higher ack ────► HELD, OWED of more

Money: `open` of max_amount is reserved in the client's channel from the order on. An attempt's earnings move open → held → used there, and
reserved → vouchered in the provider's channel. Invariants: all attempts together never pass max_amount; only the newest attempt is OPEN;
an attempt earns once (I5); every job ends (I6). A retry takes the client's word for its last ack; a provider that shows a higher one is
paid by it (`raise_to`): at once from what is open, or, while a later attempt may still need that, after it; so long it is not released.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from gpumarket.core.errors import OutOfFunds, ProtocolError
from gpumarket.core.terms import Ack, Outcome, Receipt
from gpumarket.core.units import Address, Hash, Money, format_money
from gpumarket.core.values import replace
from gpumarket.scheduler.jobs import LAPSED as LAPSED
from gpumarket.scheduler.jobs import Attempt as Attempt
from gpumarket.scheduler.jobs import AttemptState as AttemptState
from gpumarket.scheduler.jobs import Job as Job
from gpumarket.scheduler.jobs import JobState as JobState
from gpumarket.scheduler.jobs import barred_at as barred_at
from gpumarket.scheduler.jobs import charged as charged
from gpumarket.scheduler.jobs import lost_at as lost_at
from gpumarket.scheduler.reputation import LEFT, RETRY_DEEDS, Deed
from gpumarket.settlement.pricing import attempt_amount, client_amount, counts_as_complete, without_fee

ATTEMPTS_MAX = 16
"""Of one job. Each retry is a free word against a provider and a row for ever; a market that fails so often will not succeed."""
SUSPECTED = "one check is against it"
"""Reason of a hold that was prolonged; it is prolonged once."""


class Side(enum.Enum):
    """Money instructions. The client's channel: RESERVE to RETURN; the provider's: SET_ASIDE to FREE."""

    RESERVE = "free to open"
    RELEASE = "open to free"
    HOLD = "open to held"
    OWE = "held to used"
    RETURN = "held to free"
    SET_ASIDE = "free to reserved"
    PAY = "reserved to vouchered"
    FREE = "reserved to free"


class Move(NamedTuple):
    """Move `amount` in one of the job's two channels; the provider's is that of `attempt`."""

    side: Side
    amount: int
    attempt: Attempt | None = None
    until: int = 0


class Judge(NamedTuple):
    """Tell the reputation of a provider."""

    provider: Address
    deed: Deed


@dataclass(frozen=True, slots=True)
class Understated:
    """The job's client closed an attempt below an ack that it had signed."""


Instruction = Move | Judge | Understated
Change = tuple[Job, list[Instruction]]


def grant(job: Job, attempt: Attempt, until: int) -> Change:
    """Open the job's next attempt. `until`: when the client's money must still be redeemable."""
    lease = attempt.lease
    if lease.attempt != len(job.attempts) + 1:
        raise ProtocolError(f"attempt {lease.attempt} does not follow {len(job.attempts)}")
    if job.attempts and job.newest.state is AttemptState.OPEN:
        raise ProtocolError(f"attempt {job.newest.lease.attempt} is still open")
    wanted = job.spec.max_amount - job.spent
    moves: list[Instruction] = []
    if wanted > job.open:
        moves.append(Move(Side.RESERVE, wanted - job.open, until=until))
    moves.append(Move(Side.SET_ASIDE, lease.maximum, attempt, until))
    return replace(job, attempts=(*job.attempts, attempt), open=max(job.open, wanted), state=JobState.LEASED), moves


def claim(job: Job, number: int, receipt: Receipt, ack: Ack | None, raw: tuple[bytes, bytes], now: int, check_seconds: int) -> Change:
    """The provider's bill, with its receipt and the client's last ack (already verified); `raw` are their serialized forms."""
    attempt = job.attempt(number)
    sure = ack is not None and ack.complete and not ack.will_check
    if attempt.state in (AttemptState.HELD, AttemptState.CLOSED):
        if not attempt.receipt:
            attempt = replace(attempt, receipt=raw[0], outcome=int(receipt.outcome))
            job = _put(job, attempt)
        job, moves = _spare(job)
        if attempt.state is AttemptState.HELD and sure and attempt.complete and not _waits(job, attempt):
            job, more = _owe(job, attempt, Deed.DELIVERED)
            moves += more
        return job, moves
    if attempt.state is not AttemptState.OPEN:
        return job, []
    complete = counts_as_complete(ack, receipt, attempt.lease.window_units)
    attempt = replace(attempt, receipt=raw[0], ack=raw[1], outcome=int(receipt.outcome))
    job, moves = _earn(job, attempt, ack, complete, now + check_seconds)
    if receipt.outcome is Outcome.FAILED:
        moves.append(Judge(attempt.lease.provider, Deed.FAILED))
    attempt = job.attempt(number)
    if attempt.state is AttemptState.HELD and ((sure and complete) or attempt.accepted):
        job, more = _owe(job, attempt, Deed.CHECKED if attempt.accepted else Deed.DELIVERED)
        return job, moves + more
    if complete and ack is not None and ack.will_check:
        job = replace(job, state=JobState.CHECKING)
    return job, moves


def close(job: Job, number: int, ack: Ack | None, raw_ack: bytes, reason: str, now: int, check_seconds: int) -> Change:
    """`Market.Retry`: end attempt `number` at the client's last ack. It earns what was acked, held like any claim."""
    if reason not in RETRY_DEEDS:
        raise ProtocolError(f"{reason!r} is no reason for a retry", hint=f"one of {', '.join(RETRY_DEEDS)}")
    attempt = job.attempt(number)
    acked = ack.units if ack is not None else 0
    if acked < attempt.units and attempt.state in (AttemptState.HELD, AttemptState.CLOSED):
        raise ProtocolError(f"attempt {number} was claimed with your ack of {attempt.units} units; {acked} is not your last")
    if attempt.state is AttemptState.HELD and attempt.complete and job.state is JobState.DELIVERED and not attempt.reason:
        return _contest(job, replace(attempt, ack=raw_ack, reason=reason), ack)
    if attempt.state is not AttemptState.OPEN:
        return job, []
    complete = ack is not None and ack.complete
    job, moves = _earn(job, replace(attempt, ack=raw_ack, reason=reason), ack, complete, now + check_seconds)
    moves.append(Judge(attempt.lease.provider, RETRY_DEEDS[reason]))
    return replace(job, state=JobState.LEASED), moves


def leave(job: Job, number: int, ack: Ack | None, raw_ack: bytes, now: int, check_seconds: int) -> Change:
    """`Market.Retry` for reason LEFT: the attempt ends as in `close`, and the job with it; its maximum is free again, but for what a
    provider that has not claimed yet may show. A job that was completed meanwhile stays so."""
    moves: list[Instruction] = []
    if job.attempt(number).state is AttemptState.OPEN:
        job, moves = close(job, number, ack, raw_ack, LEFT, now, check_seconds)
    if job.state is not JobState.LEASED:
        return job, moves
    job, more = _spare(replace(job, state=JobState.CANCELLED))
    return job, moves + more


def raise_to(job: Job, number: int, ack: Ack, raw_ack: bytes, now: int, check_seconds: int, claim_grace_seconds: int) -> Change:
    """A claim's ack (already verified) against the one that a retry closed the attempt at: the higher one is what was earned.

    Capped by the lease's maximum and by what is left of max_amount. Evidence counts until the deadline and the claim grace; what it could
    not be paid from yet is paid when it is claimed again, once the later attempt has ended.
    """
    attempt, moves = job.attempt(number), list[Instruction]()
    if not _closed_by_retry(attempt):
        return job, moves
    known = (attempt.units, attempt.complete)
    if (ack.units, ack.complete) > known and ack.complete >= attempt.complete and now < job.spec.deadline + claim_grace_seconds:
        later = replace(attempt, units=ack.units, complete=ack.complete, ack=raw_ack, state=AttemptState.HELD)
        attempt = replace(later, hold_until=max(attempt.hold_until, now + check_seconds))
        job = _put(job, attempt)
        moves.append(Understated())
    if not _missing(job, attempt) or job.newest.state is AttemptState.OPEN:
        return job, moves
    before = client_amount(attempt.amount, attempt.lease.fee_ppm)
    amount = min(attempt.amount + _missing(job, attempt), without_fee(job.open + before, attempt.lease.fee_ppm))
    if amount > attempt.amount:
        cost = client_amount(amount, attempt.lease.fee_ppm) - before
        moves += [Move(Side.HOLD, cost), Move(Side.SET_ASIDE, amount - attempt.amount, attempt, job.spec.deadline)]
        job = _put(replace(job, open=job.open - cost), replace(attempt, amount=amount))
    job, more = _spare(job)
    return job, moves + more


def catch_up(job: Job, number: int, ack: Ack, raw_ack: bytes, now: int, check_seconds: int) -> Change:
    """A retry's ack (already verified) above the one that the provider claimed with: it was lost on the way, and what it covers is earned.

    The next attempt starts after it, so that nobody else is paid for it. Where the attempt is owed already, the difference is owed at once.
    """
    attempt = job.attempt(number)
    ended = attempt.state in (AttemptState.HELD, AttemptState.CLOSED, AttemptState.OWED)
    if not ended or attempt.complete or ack.units <= attempt.units or job.state is not JobState.LEASED:
        return job, []
    before, fee_ppm = client_amount(attempt.amount, attempt.lease.fee_ppm), attempt.lease.fee_ppm
    earned = attempt_amount(attempt.lease, prompt_units=job.spec.prompt_units, units=ack.units, complete=False)
    amount = max(attempt.amount, min(earned, without_fee(job.open + before, fee_ppm)))
    cost, more = client_amount(amount, fee_ppm) - before, amount - attempt.amount
    moves: list[Instruction] = [Move(Side.HOLD, cost), Move(Side.SET_ASIDE, more, attempt, job.spec.deadline)] if more else []
    raised = replace(attempt, units=ack.units, amount=amount, ack=raw_ack)
    if attempt.state is AttemptState.OWED:
        moves += [Move(Side.OWE, cost), Move(Side.PAY, more, attempt)] if more else []
    elif attempt.state is AttemptState.CLOSED and amount:
        raised = replace(raised, state=AttemptState.HELD, hold_until=now + check_seconds)
    return _put(replace(job, open=job.open - cost), raised), moves


def accept(job: Job, number: int) -> Change:
    """The client's word that the result is good (accepted or grey). Said before the claim, it is kept for it."""
    attempt = job.attempt(number)
    if attempt.state is AttemptState.HELD and not _waits(job, attempt):
        return _owe(job, attempt, Deed.CHECKED)
    if attempt.state in (AttemptState.OPEN, AttemptState.HELD) and not attempt.accepted:
        return _put(job, replace(attempt, accepted=True)), []
    return job, []


def suspect(job: Job, number: int, until: int) -> Change:
    """One check against the attempt: its money stays held until the second one, `until` at most."""
    attempt = job.attempt(number)
    if attempt.state is not AttemptState.HELD or attempt.reason.endswith(SUSPECTED):
        return job, []
    reason = f"{attempt.reason}; {SUSPECTED}" if attempt.reason else SUSPECTED
    job = _put(job, replace(attempt, hold_until=max(attempt.hold_until, until), reason=reason))
    newest = number == len(job.attempts)  # an earlier one does not end what runs now
    return (replace(job, state=JobState.CHECKING) if attempt.complete and newest else job), []


def reject(job: Job, number: int, reason: str) -> Change:
    """Proven bad: unpaid, the client's money goes back. Raises ProtocolError when it is owed already: a voucher is never recalled."""
    attempt = job.attempt(number)
    judged = Judge(attempt.lease.provider, Deed.REJECTED)
    if attempt.state is AttemptState.REJECTED:
        return job, []
    if attempt.state is AttemptState.OWED:
        raise ProtocolError(f"attempt {number} is owed already; a rejection must come within the check time")
    moves: list[Instruction] = [judged]
    if attempt.state is AttemptState.HELD:
        moves += [Move(Side.RETURN, charged(attempt)), Move(Side.FREE, attempt.amount, attempt)]
    elif attempt.state is AttemptState.OPEN:
        moves.append(Move(Side.FREE, attempt.lease.maximum, attempt))
    job = _put(job, replace(attempt, state=AttemptState.REJECTED, amount=0, reason=reason))
    if number == len(job.attempts):
        job = replace(job, state=JobState.REJECTED)
    job, more = _spare(job)
    return job, moves + more


def due(job: Job, now: int, claim_grace_seconds: int) -> Change:
    """What time alone does: holds that are over become owed; a job past its deadline and the claim grace gives its maximum back."""
    moves: list[Instruction] = []
    over = now >= job.spec.deadline + claim_grace_seconds and bool(job.attempts)
    if over and job.newest.state is AttemptState.OPEN:
        moves.append(Move(Side.FREE, job.newest.lease.maximum, job.newest))
        job = _put(job, replace(job.newest, state=AttemptState.EXPIRED, reason="never claimed"))
    if over and job.open:
        last = now >= job.spec.deadline + 2 * claim_grace_seconds
        kept = 0 if last else min(job.open, _missing_cost(job))  # the claim that waits for it is sent again within the grace
        if job.open > kept:
            moves.append(Move(Side.RELEASE, job.open - kept))
            job = replace(job, open=kept)
    for attempt in job.attempts:
        if attempt.state is AttemptState.HELD and now >= attempt.hold_until and not _waits(job, attempt):
            job, more = _owe(job, attempt, Deed.DELIVERED if attempt.complete else Deed.BLAMELESS)
            moves += more
        elif _kept_for(job, attempt) and now >= attempt.hold_until:
            job = _put(job, replace(attempt, state=AttemptState.EXPIRED))
    job, more = _spare(job)
    moves += more
    return (replace(job, state=_lapsed(job.newest)) if over and job.state is JobState.LEASED else job), moves


def next_prefix(job: Job, number: int, ack: Ack | None, reason: str) -> tuple[int, Hash]:
    """(units, chain hash) that the attempt after `number` starts from: what the client holds, without output that it calls bad."""
    lease = job.attempt(number).lease
    if reason == "bad-output" or ack is None:
        return lease.prefix_units, lease.prefix_hash
    return lease.prefix_units + ack.units, ack.output_hash


def may_retry(job: Job, number: int) -> None:
    """Raises ProtocolError or OutOfFunds when no attempt may follow `number`."""
    if number != len(job.attempts):
        raise ProtocolError(f"attempt {number} is not the newest of job 0x{job.key.hex()}, {len(job.attempts)} is")
    if number >= ATTEMPTS_MAX:
        raise ProtocolError(f"job 0x{job.key.hex()} had {number} attempts, and more are not made", hint="order it again under a new job id")
    if job.state in LAPSED:
        raise ProtocolError(f"job 0x{job.key.hex()} ended ({job.state.name.lower()})", hint="order it again under a new job id")
    if job.spent >= job.spec.max_amount:
        raise OutOfFunds(
            f"all of the job's {format_money(job.spec.max_amount)} is spent on earlier attempts", hint="order it again with a higher limit"
        )


def finished(job: Job) -> bool:
    """Nothing of the job can change any more, except by a retry before its deadline."""
    return job.open == 0 and all(a.state not in (AttemptState.OPEN, AttemptState.HELD) for a in job.attempts)


def next_due(job: Job, claim_grace_seconds: int) -> int:
    """When `due` has something to do next; 0 is never."""
    held = [a for a in job.attempts if a.state is AttemptState.HELD and not _waits(job, a)]
    times = [a.hold_until for a in (*held, *(a for a in job.attempts if _kept_for(job, a)))]
    if job.open or job.newest.state is AttemptState.OPEN:
        kept = job.newest.state is not AttemptState.OPEN and job.open <= _missing_cost(job)
        late = kept and job.state is not JobState.LEASED  # it ended, and only a claim that was shown before keeps its money
        times.append(job.spec.deadline + claim_grace_seconds * (2 if late else 1))
    return min(times, default=0)


def _earn(job: Job, attempt: Attempt, ack: Ack | None, complete: bool, hold_until: int) -> Change:
    """OPEN to HELD or CLOSED: hold what was acked, free the rest of the provider's maximum, and of the client's when all is delivered."""
    units = ack.units if ack is not None else 0
    amount = attempt_amount(attempt.lease, prompt_units=job.spec.prompt_units, units=units, complete=complete)
    cost = client_amount(amount, attempt.lease.fee_ppm)
    assert cost <= job.open, (job.key.hex(), cost, job.open)
    moves: list[Instruction] = []
    if amount:
        moves.append(Move(Side.HOLD, cost))
    moves.append(Move(Side.FREE, attempt.lease.maximum - amount, attempt))
    state = AttemptState.HELD if amount or complete else AttemptState.CLOSED
    job = replace(job, open=job.open - cost, state=JobState.DELIVERED if complete else job.state)
    job = _put(job, replace(attempt, state=state, amount=amount, units=units, complete=complete, hold_until=hold_until))
    job, more = _spare(job)
    return job, moves + more


def _contest(job: Job, attempt: Attempt, ack: Ack | None) -> Change:
    """Complete by the provider's word alone, and its client says otherwise in time: it earns its acked units like any closed attempt."""
    units = ack.units if ack is not None else 0
    amount = attempt_amount(attempt.lease, prompt_units=job.spec.prompt_units, units=units, complete=ack is not None and ack.complete)
    amount = Money(min(amount, attempt.amount))
    back = charged(attempt) - client_amount(amount, attempt.lease.fee_ppm)
    moves: list[Instruction] = [Move(Side.RETURN, back), Move(Side.FREE, attempt.amount - amount, attempt)] if back else []
    moves.append(Judge(attempt.lease.provider, RETRY_DEEDS[attempt.reason]))
    state = AttemptState.HELD if amount else AttemptState.CLOSED
    attempt = replace(attempt, state=state, amount=amount, units=units, complete=ack is not None and ack.complete)
    return replace(_put(job, attempt), state=JobState.LEASED), moves


def _closed_by_retry(attempt: Attempt) -> bool:
    return attempt.state in (AttemptState.HELD, AttemptState.CLOSED) and attempt.reason.partition(";")[0] in RETRY_DEEDS


def _missing(job: Job, attempt: Attempt) -> int:
    """What a held attempt earned by its ack beyond what is held for it: only after `raise_to` this is not 0."""
    if attempt.state is not AttemptState.HELD or not _closed_by_retry(attempt):
        return 0
    earned = attempt_amount(attempt.lease, prompt_units=job.spec.prompt_units, units=attempt.units, complete=attempt.complete)
    return earned - attempt.amount


def _missing_cost(job: Job) -> int:
    return sum(client_amount(_missing(job, a), a.lease.fee_ppm) + 1 for a in job.attempts if _missing(job, a))


def _unclaimed(attempt: Attempt) -> bool:
    """Closed on the client's word, and its provider has not said yet what it holds."""
    return _closed_by_retry(attempt) and not attempt.receipt


def _kept_for(job: Job, attempt: Attempt) -> bool:
    """Whether the end of this closed attempt's hold lets money go."""
    return attempt.state is AttemptState.CLOSED and _unclaimed(attempt) and job.open > 0 and job.state is not JobState.LEASED


def _waits(job: Job, attempt: Attempt) -> bool:
    """More may be held for the attempt yet, so it is not owed yet."""
    return _missing(job, attempt) > 0 and (job.newest.state is AttemptState.OPEN or job.open > 0)


def _spare(job: Job) -> Change:
    """Release what stays open of a job that needs no further attempt, but for what claims lack, or may show within their hold."""
    if job.state is JobState.LEASED:
        return job, []
    unclaimed = [a for a in job.attempts if _unclaimed(a)]
    kept = _missing_cost(job) + sum(client_amount(a.lease.maximum - a.amount, a.lease.fee_ppm) + 1 for a in unclaimed)
    spare = job.open - min(job.open, kept)
    return (replace(job, open=job.open - spare), [Move(Side.RELEASE, spare)]) if spare else (job, [])


def _owe(job: Job, attempt: Attempt, deed: Deed) -> Change:
    moves: list[Instruction] = [Judge(attempt.lease.provider, deed)]
    if attempt.amount:
        moves += [Move(Side.OWE, charged(attempt)), Move(Side.PAY, attempt.amount, attempt)]
    job = _put(job, replace(attempt, state=AttemptState.OWED))
    if attempt.complete and attempt.lease.attempt == len(job.attempts):
        job = replace(job, state=JobState.COMPLETED)
    return job, moves


def _put(job: Job, attempt: Attempt) -> Job:
    at = attempt.lease.attempt - 1
    return replace(job, attempts=(*job.attempts[:at], attempt, *job.attempts[at + 1 :]))


def _lapsed(attempt: Attempt) -> JobState:
    if attempt.outcome == Outcome.CANCELLED:
        return JobState.CANCELLED
    if attempt.outcome in (Outcome.FAILED, Outcome.REFUSED):
        return JobState.FAILED
    return JobState.EXPIRED

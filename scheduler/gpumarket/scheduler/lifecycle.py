"""One job and its attempts: `event(job, ...) -> (job, [instruction])`. Pure; the ledger carries the instructions out.

    attempt  OPEN ── claim, complete, no check ──────────► OWED         job  LEASED ── complete claim ► DELIVERED or CHECKING ► COMPLETED
             OPEN ── claim or retry, something earned ───► HELD                LEASED ── lapse ► CANCELLED, FAILED or EXPIRED
             OPEN ── claim or retry, nothing earned ─────► CLOSED              any but a lapsed one ── retry ► LEASED
             OPEN ── deadline and claim grace over ──────► EXPIRED             DELIVERED, CHECKING ── reject ► REJECTED
             HELD ── accepted, or check time over ───────► OWED
             OPEN, HELD ── rejected on evidence ─────────► REJECTED

Money: `open` of max_amount is reserved in the client's channel from the order on. An attempt's earnings move open → held → used there, and
reserved → vouchered in the provider's channel. Invariants: all attempts together never pass max_amount; only the newest attempt is OPEN;
an attempt earns once (I5); every job ends (I6).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

from gpumarket.core.errors import OutOfFunds, ProtocolError
from gpumarket.core.terms import Ack, JobSpec, Lease, Outcome, Receipt
from gpumarket.core.units import Address, Hash, format_money
from gpumarket.scheduler.reputation import RETRY_DEEDS, Deed
from gpumarket.settlement.pricing import attempt_amount, client_amount, counts_as_complete


class AttemptState(enum.IntEnum):
    """See the table above."""

    OPEN = 1
    HELD = 2
    OWED = 3
    REJECTED = 4
    CLOSED = 5
    EXPIRED = 6


class JobState(enum.IntEnum):
    """See the table above; the names, in lower case, are those of `JobStatus.state`."""

    LEASED = 1
    DELIVERED = 2
    CHECKING = 3
    COMPLETED = 4
    REJECTED = 5
    CANCELLED = 6
    FAILED = 7
    EXPIRED = 8


LAPSED = (JobState.CANCELLED, JobState.FAILED, JobState.EXPIRED)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One lease and what became of it. `amount` is what the provider earns; serialized messages are kept as they were signed."""

    lease: Lease
    hash: Hash
    signed: bytes
    offer: bytes
    state: AttemptState = AttemptState.OPEN
    amount: int = 0
    units: int = 0
    complete: bool = False
    accepted: bool = False
    hold_until: int = 0
    receipt: bytes = b""
    ack: bytes = b""
    outcome: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """An order and its attempts. `open` is what stays reserved in the client's channel."""

    key: Hash
    spec: JobSpec
    order: bytes
    channel: Hash
    created_at: int
    state: JobState = JobState.LEASED
    open: int = 0
    attempts: tuple[Attempt, ...] = field(default=())

    @property
    def newest(self) -> Attempt:
        return self.attempts[-1]

    @property
    def spent(self) -> int:
        """What the client pays, fees included, for attempts that are held or owed."""
        return sum(charged(a) for a in self.attempts)

    def attempt(self, number: int) -> Attempt:
        """Raises ProtocolError for a number that was never leased."""
        if not 1 <= number <= len(self.attempts):
            raise ProtocolError(f"job 0x{self.key.hex()} has no attempt {number}")
        return self.attempts[number - 1]


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


@dataclass(frozen=True, slots=True)
class Move:
    """Move `amount` in one of the job's two channels; the provider's is that of `attempt`."""

    side: Side
    amount: int
    attempt: Attempt | None = None
    until: int = 0


@dataclass(frozen=True, slots=True)
class Judge:
    """Tell the reputation of a provider."""

    provider: Address
    deed: Deed


Instruction = Move | Judge
Change = tuple[Job, list[Instruction]]


def charged(attempt: Attempt) -> int:
    """What the client pays or may still pay for an attempt."""
    if attempt.state not in (AttemptState.HELD, AttemptState.OWED):
        return 0
    return client_amount(attempt.amount, attempt.lease.fee_ppm)


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
    if attempt.state is AttemptState.HELD:
        if not attempt.receipt:
            attempt = replace(attempt, receipt=raw[0], outcome=int(receipt.outcome))
            job = _put(job, attempt)
        return _owe(job, attempt, Deed.DELIVERED) if sure and attempt.complete else (job, [])
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
    if attempt.state is not AttemptState.OPEN:
        return job, []
    complete = ack is not None and ack.complete
    job, moves = _earn(job, replace(attempt, ack=raw_ack, reason=reason), ack, complete, now + check_seconds)
    moves.append(Judge(attempt.lease.provider, RETRY_DEEDS[reason]))
    return replace(job, state=JobState.LEASED), moves


def accept(job: Job, number: int) -> Change:
    """The client's word that the result is good (accepted or grey). Said before the claim, it is kept for it."""
    attempt = job.attempt(number)
    if attempt.state is AttemptState.HELD:
        return _owe(job, attempt, Deed.CHECKED)
    if attempt.state is AttemptState.OPEN and not attempt.accepted:
        return _put(job, replace(attempt, accepted=True)), []
    return job, []


def suspect(job: Job, number: int, until: int) -> Change:
    """One check against the attempt: its money stays held until the second one, `until` at most."""
    attempt = job.attempt(number)
    if attempt.state is not AttemptState.HELD:
        return job, []
    job = _put(job, replace(attempt, hold_until=max(attempt.hold_until, until)))
    return (replace(job, state=JobState.CHECKING) if attempt.complete else job), []


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
    if number < len(job.attempts):
        return job, moves
    if job.open:
        moves.append(Move(Side.RELEASE, job.open))
    return replace(job, state=JobState.REJECTED, open=0), moves


def due(job: Job, now: int, claim_grace_seconds: int) -> Change:
    """What time alone does: holds that are over become owed; a job past its deadline and the claim grace gives its maximum back."""
    moves: list[Instruction] = []
    for attempt in job.attempts:
        if attempt.state is AttemptState.HELD and now >= attempt.hold_until:
            job, more = _owe(job, attempt, Deed.DELIVERED if attempt.complete else Deed.BLAMELESS)
            moves += more
    if now < job.spec.deadline + claim_grace_seconds or not job.attempts:
        return job, moves
    attempt = job.newest
    if attempt.state is AttemptState.OPEN:
        moves.append(Move(Side.FREE, attempt.lease.maximum, attempt))
        job = _put(job, replace(attempt, state=AttemptState.EXPIRED, reason="never claimed"))
    if job.open:
        moves.append(Move(Side.RELEASE, job.open))
        job = replace(job, open=0)
    return (replace(job, state=_lapsed(job.newest)) if job.state is JobState.LEASED else job), moves


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
    times = [a.hold_until for a in job.attempts if a.state is AttemptState.HELD]
    if job.open or job.newest.state is AttemptState.OPEN:
        times.append(job.spec.deadline + claim_grace_seconds)
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
    left = job.open - cost
    if complete and left:
        moves.append(Move(Side.RELEASE, left))
        left = 0
    job = replace(job, open=left, state=JobState.DELIVERED if complete else job.state)
    return _put(job, replace(attempt, state=state, amount=amount, units=units, complete=complete, hold_until=hold_until)), moves


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

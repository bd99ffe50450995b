"""One job's life on the client's side, as a pure state machine: `handle(progress, event) -> (progress, instructions)`.

    ORDERED --LeaseReceived--> LEASED --StartedReceived--> STREAMING --FinishedReceived--> DELIVERED
       ^                          |                           |
       '------ RetryElsewhere <---'---- AttemptFailed --------'------> FAILED (attempts or time used up)
                                       ClientLeaves ----------'------> CANCELLED

Invariants
- No item is delivered twice, none out of order: a frame counts only when it continues exactly where this attempt stands.
- No ack covers more than was received, and none of them ever falls back.
- The item that completes the answer is held back until the receipt verifies: what a lost provider leaves behind can always be continued
  by another one, which then has at least one item to do, and a bad receipt costs no more than what was acked.

It never does I/O, never reads a clock, and never sees a key. The shell (running.py) carries the instructions out in their order, each
durable before its effect is visible.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gpumarket.core.errors import ProtocolError
from gpumarket.core.terms import Ack, Lease, Outcome, Receipt, output_chain
from gpumarket.core.units import ZERO_HASH, Address, Hash, Money
from gpumarket.sdk.frames import accept_items
from gpumarket.sdk.job_plan import JobPlan
from gpumarket.sdk.logprobs import Logprobs, logprobs_flaw
from gpumarket.sdk.receipts import receipt_flaw
from gpumarket.settlement.pricing import attempt_amount, client_amount, counts_as_complete

RETRY_MARGIN_SECONDS = 2
"""Nearer to its deadline than this a job is not given to another provider: it could not earn anything."""


class Phase(enum.Enum):
    """Where a job stands."""

    ORDERED = "ordered"
    LEASED = "leased"
    STREAMING = "streaming"
    DELIVERED = "delivered"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """How an attempt ended. `units` were acked, `amount` is what the client pays for them, fee included."""

    number: int
    provider: Address
    reason: str
    detail: str
    units: int
    amount: Money


@dataclass(frozen=True, slots=True)
class Progress:
    """State of one job. `items` and `units` count over all attempts; `acked_units` in the running attempt."""

    plan: JobPlan
    phase: Phase = Phase.ORDERED
    attempt: int = 0
    lease: Lease | None = None
    nonce: Hash | None = None
    items: int = 0
    units: int = 0
    output_hash: Hash = ZERO_HASH
    acked_units: int = 0
    item_bytes: int = 0
    last_item: bytes | None = None
    """The item that completes the answer, held back until the receipt verifies."""
    last_logprobs: tuple[Logprobs, ...] = ()
    """Those of the item held back; empty where none were asked for."""
    ends: tuple[AttemptEnd, ...] = ()
    receipt: Receipt | None = None
    finish_reason: str = ""

    @property
    def attempt_units(self) -> int:
        """Units that this attempt delivered, without the one held back."""
        return self.units - self.lease.prefix_units if self.lease else 0

    @property
    def billed(self) -> Money:
        """What the ended attempts cost the client."""
        return Money(sum(end.amount for end in self.ends))


# --- events --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LeaseReceived:
    """A lease that passed `lease_rules`."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class StartedReceived:
    """The provider took the attempt and fixed its nonce."""

    attempt: int
    nonce: Hash


@dataclass(frozen=True, slots=True)
class FrameReceived:
    """Output items, and the provider's count of units of this attempt, this frame included."""

    attempt: int
    items: tuple[bytes, ...]
    units: int
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamIdle:
    """Nothing came for a moment: the provider may wait for an ack."""

    attempt: int


@dataclass(frozen=True, slots=True)
class FinishedReceived:
    """The provider's receipt (its signature already verified). `will_check` is the client's own draw, made after the answer was there."""

    attempt: int
    receipt: Receipt
    finish_reason: str
    will_check: bool
    now: int


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """The attempt is over without an answer. `reason` is one of RetryRequest.reason."""

    attempt: int
    reason: str
    detail: str
    now: int


@dataclass(frozen=True, slots=True)
class ClientLeaves:
    """The caller wants no more of it. `finish_reason` "stop": what it has is all it wanted, as it ends at a stop string."""

    attempt: int
    finish_reason: str = ""


Event = LeaseReceived | StartedReceived | FrameReceived | StreamIdle | FinishedReceived | AttemptFailed | ClientLeaves


# --- instructions --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """Make `items` (from absolute index `first`) and `ack` durable, then hand the items out with their logprobs, then send the ack."""

    first: int
    items: tuple[bytes, ...]
    ack: Ack | None
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Conclude:
    """As `Record`, with the receipt and the last ack of the job."""

    first: int
    items: tuple[bytes, ...]
    ack: Ack
    receipt: Receipt
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class RetryElsewhere:
    """Make `end` and `ack` durable, then ask the scheduler for the next attempt. `ack` is None when nothing was received."""

    end: AttemptEnd
    ack: Ack | None


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Make the end durable; no more attempts."""

    end: AttemptEnd
    ack: Ack | None


@dataclass(frozen=True, slots=True)
class Leave:
    """Make `end` and the last ack durable, send the ack, cancel the attempt."""

    end: AttemptEnd
    ack: Ack | None


Instruction = Record | Conclude | RetryElsewhere | GiveUp | Leave
Step = tuple[Progress, list[Instruction]]


def handle(progress: Progress, event: Event) -> Step:
    """Next state, and what the shell has to do, in order. Events of an attempt that is over change nothing.

    Raises ProtocolError for a lease that does not continue this job; whatever a provider does wrong ends its attempt instead.
    """
    if isinstance(event, LeaseReceived):
        return _lease(progress, event.lease)
    if event.attempt != progress.attempt or progress.phase not in (Phase.LEASED, Phase.STREAMING):
        return progress, []
    match event:
        case StartedReceived():
            return _started(progress, event)
        case FrameReceived():
            return _frame(progress, event)
        case StreamIdle():
            return _acknowledge(progress) if progress.attempt_units > progress.acked_units else (progress, [])
        case FinishedReceived():
            return _finished(progress, event)
        case AttemptFailed():
            return _end(progress, event.reason, event.detail, event.now)
        case ClientLeaves():
            return _leave(progress, event.finish_reason)


def restored(progress: Progress, first: int, items: Iterable[bytes]) -> Progress:
    """Progress with journaled output put back (after a client crash), in order from index 0."""
    assert first == progress.items, "output is restored in order"
    return _take(progress, tuple(items))


# --- transitions ---------------------------------------------------------------------------------------------------------------


def _lease(progress: Progress, lease: Lease) -> Step:
    if progress.phase is not Phase.ORDERED or lease.attempt != progress.attempt + 1:
        raise ProtocolError(f"a lease for attempt {lease.attempt} came while attempt {progress.attempt} is {progress.phase.value}")
    if lease.prefix_units != progress.units or lease.prefix_hash != progress.output_hash:
        raise ProtocolError(f"the lease continues after {lease.prefix_units} units; {progress.units} were acked, or with another hash")
    return replace(progress, phase=Phase.LEASED, attempt=lease.attempt, lease=lease, nonce=None, acked_units=0), []


def _started(progress: Progress, event: StartedReceived) -> Step:
    if progress.phase is Phase.STREAMING or len(event.nonce) != 32:
        return _broken(progress, "a second or malformed Started")
    return replace(progress, phase=Phase.STREAMING, nonce=event.nonce), []


def _frame(progress: Progress, event: FrameReceived) -> Step:
    plan = progress.plan
    flaw = "a frame before Started" if progress.phase is not Phase.STREAMING else _frame_flaw(progress, event)
    if flaw:
        return _broken(progress, flaw)
    items = event.items
    last = items[-1] if plan.completes(progress.items + len(items) - 1, items[-1]) else None
    kept = items[:-1] if last is not None else items
    told, held = event.logprobs[: len(kept)], event.logprobs[len(kept) :]
    first = progress.items
    progress = replace(_take(progress, kept), last_item=last, last_logprobs=held, item_bytes=progress.item_bytes or len(items[0]))
    if not _ack_due(progress):
        return progress, [Record(first, kept, None, told)] if kept else []
    progress, (record,) = _acknowledge(progress)
    assert isinstance(record, Record)
    return progress, [replace(record, first=first, items=kept, logprobs=told)]


def _frame_flaw(progress: Progress, event: FrameReceived) -> str:
    """What is wrong with a frame, empty when nothing is."""
    if progress.last_item is not None:
        return "output after the answer was complete"
    flaw = accept_items(progress.plan, progress.items, progress.item_bytes or progress.plan.item_bytes, event.items)
    if flaw:
        return flaw
    units = sum(progress.plan.units_of(progress.items + i) for i in range(len(event.items)))
    if event.units != progress.attempt_units + units:
        return f"a frame that ends at unit {event.units}; expected {progress.attempt_units + units}"
    return logprobs_flaw(progress.plan.top_logprobs, event.items, event.logprobs)


def _ack_due(progress: Progress) -> bool:
    """At least every half window, and before an item that no longer fits into it (a provider must not wait for an ack that never comes)."""
    assert progress.lease is not None
    unacked = progress.attempt_units - progress.acked_units
    if not unacked or progress.last_item is not None:
        return False
    window = progress.lease.window_units
    return 2 * unacked >= window or unacked + progress.plan.units_of(progress.items) > window


def _finished(progress: Progress, event: FinishedReceived) -> Step:
    if event.receipt.outcome is not Outcome.COMPLETED:
        reason = "refused" if event.receipt.outcome is Outcome.REFUSED else "failed"
        return _end(progress, reason, f"the provider's receipt says {event.receipt.outcome.name.lower()}", event.now)
    if progress.phase is not Phase.STREAMING or progress.last_item is None:
        return _end(progress, "bad-output", "the provider says completed, but the answer is not", event.now)
    assert progress.lease is not None and progress.nonce is not None
    first, last = progress.items, progress.last_item
    whole, told = replace(_take(progress, (last,)), last_item=None, last_logprobs=()), progress.last_logprobs
    flaw = receipt_flaw(event.receipt, progress.lease, progress.plan.spec, progress.nonce, whole.output_hash, whole.attempt_units)
    if flaw:
        return _end(progress, "bad-output", f"the receipt does not hold: {flaw}", event.now)
    ack = Ack(progress.lease.struct_hash, whole.attempt_units, whole.output_hash, True, event.will_check)
    end = _attempt_end(whole, "completed", "", whole.attempt_units, complete=True)
    whole = replace(
        whole,
        phase=Phase.DELIVERED,
        acked_units=whole.attempt_units,
        receipt=event.receipt,
        finish_reason=event.finish_reason,
        ends=(*progress.ends, end),
    )
    return whole, [Conclude(first, (last,), ack, event.receipt, told)]


def _broken(progress: Progress, flaw: str) -> Step:
    """The provider broke the protocol: its attempt ends, with what was good of it. `now` 0: a deadline is the scheduler's to enforce."""
    return _end(progress, "bad-output", flaw, 0)


def _end(progress: Progress, reason: str, detail: str, now: int) -> Step:
    end = _attempt_end(progress, reason, detail, progress.attempt_units, complete=False)
    ack = _ack(progress)
    over = now + RETRY_MARGIN_SECONDS > progress.plan.spec.deadline
    last = progress.attempt >= progress.plan.attempts_max or over
    progress = replace(
        progress,
        phase=Phase.FAILED if last else Phase.ORDERED,
        last_item=None,
        last_logprobs=(),
        nonce=None,
        acked_units=progress.attempt_units,
        ends=(*progress.ends, end),
    )
    return progress, [GiveUp(end, ack) if last else RetryElsewhere(end, ack)]


def _leave(progress: Progress, finish_reason: str) -> Step:
    why = "the client left" if not finish_reason else "the client has all it wanted"
    end = _attempt_end(progress, "cancelled", why, progress.attempt_units, complete=False)
    left = replace(progress, phase=Phase.CANCELLED, last_item=None, last_logprobs=(), finish_reason=finish_reason)
    return replace(left, ends=(*progress.ends, end)), [Leave(end, _ack(progress))]


def left_amount(progress: Progress, receipt: Receipt) -> Money:
    """What the last attempt of a job that the client left costs by its provider's receipt: one that had the whole answer out within a
    window of the last ack earns the prompt, too (`counts_as_complete`)."""
    assert progress.lease is not None
    lease, end = progress.lease, progress.ends[-1]
    complete = counts_as_complete(_ack(progress), receipt, lease.window_units)
    earned = attempt_amount(lease, prompt_units=progress.plan.spec.prompt_units, units=end.units, complete=complete)
    return client_amount(earned, lease.fee_ppm)


def _acknowledge(progress: Progress) -> Step:
    ack = _ack(progress)
    return replace(progress, acked_units=progress.attempt_units), [Record(progress.items, (), ack)]


def _ack(progress: Progress) -> Ack | None:
    """The ack of everything taken so far; None when this attempt gave nothing."""
    if progress.lease is None or not progress.attempt_units:
        return None
    return Ack(progress.lease.struct_hash, progress.attempt_units, progress.output_hash, False, False)


def _attempt_end(progress: Progress, reason: str, detail: str, units: int, *, complete: bool) -> AttemptEnd:
    assert progress.lease is not None
    lease = progress.lease
    earned = attempt_amount(lease, prompt_units=progress.plan.spec.prompt_units, units=units, complete=complete)
    return AttemptEnd(progress.attempt, lease.provider, reason, detail, units, client_amount(earned, lease.fee_ppm))


def _take(progress: Progress, items: tuple[bytes, ...]) -> Progress:
    units = sum(progress.plan.units_of(progress.items + i) for i in range(len(items)))
    return replace(
        progress,
        items=progress.items + len(items),
        units=progress.units + units,
        output_hash=output_chain(items, progress.output_hash),
        item_bytes=progress.item_bytes or (len(items[0]) if items else 0),
    )

"""One attempt of one job, from admission to its last ack, as a state machine. Pure: events in, instructions out.

    STREAMING ── Ended, all sent ──────────► CONCLUDED ── last ack, or it never comes ──► CLOSED
        └────── Cancelled, Gone, Late, Broke, Stalled, a false ack ──► CONCLUDED / CLOSED

| event     | meaning                                          | instructions                                            |
|-----------|--------------------------------------------------|---------------------------------------------------------|
| Produced  | the engine gave items                            | Send what the window lets through                       |
| Ended     | the engine gave its last item                    | Conclude(COMPLETED) once all is sent                    |
| Acked     | a signed ack came                                | KeepAck, before the window moves (I2)                   |
| AckKept   | it is in the journal                             | Send more; Close after the last ack                     |
| Cancelled | the client said so and still listens             | Conclude(CANCELLED)                                     |
| Gone      | the client left                                  | Conclude(CANCELLED), Close                              |
| Stalled   | a full window and no ack for too long            | Conclude(CANCELLED), Close                              |
| Late      | the lease's deadline passed                      | Conclude(EXPIRED)                                       |
| Broke     | our engine failed                                | Conclude(FAILED)                                        |

The shell runs instructions in order: `Conclude` means stop the engine, sign the receipt, journal it, then tell the client. Conclude
comes exactly once, Close exactly once.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from gpumarket.core.errors import ProtocolError
from gpumarket.core.terms import Ack, Lease, Outcome, Receipt
from gpumarket.core.units import Hash
from gpumarket.node.meter import Item, Meter

# --- events ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Produced:
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Acked:
    """An ack whose signature holds; `evidence` is the signed message as it came."""

    ack: Ack
    evidence: bytes


@dataclass(frozen=True, slots=True)
class AckKept:
    ack: Ack


@dataclass(frozen=True, slots=True)
class Cancelled:
    pass


@dataclass(frozen=True, slots=True)
class Gone:
    pass


@dataclass(frozen=True, slots=True)
class Stalled:
    pass


@dataclass(frozen=True, slots=True)
class Late:
    pass


@dataclass(frozen=True, slots=True)
class Broke:
    """`reason` is the error's code, told to the client."""

    reason: str


Event = Produced | Ended | Acked | AckKept | Cancelled | Gone | Stalled | Late | Broke

# --- instructions ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Stream these; `units` is the attempt's count with them."""

    items: tuple[Item, ...]
    units: int


@dataclass(frozen=True, slots=True)
class KeepAck:
    ack: Ack
    evidence: bytes


@dataclass(frozen=True, slots=True)
class Conclude:
    outcome: Outcome
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Close:
    pass


Instruction = Send | KeepAck | Conclude | Close


class Phase(enum.Enum):
    STREAMING = "streaming"
    CONCLUDED = "concluded"
    CLOSED = "closed"


# --- the machine ----------------------------------------------------------------------------------------------------------------


class Attempt:
    """State of one attempt. `handle` is the only way to change it; ProtocolError is the client's fault and leaves the state as it was."""

    def __init__(self, lease: Lease, nonce: Hash, request_hash: Hash, prompt_units: int) -> None:
        self.lease, self.lease_hash, self.nonce = lease, lease.struct_hash, nonce
        self.meter = Meter(self.lease_hash, lease.window_units, lease.prefix_hash)
        self.phase = Phase.STREAMING
        self.outcome: Outcome | None = None
        self._request_hash, self._prompt_units = request_hash, prompt_units
        self._pending: deque[Item] = deque()
        self._end: str | None = None

    @property
    def hungry(self) -> bool:
        """Whether the engine should be asked for more: nothing lies unsent, so memory per attempt stays at one batch (I8)."""
        return self.phase is Phase.STREAMING and self._end is None and not self._pending

    @property
    def waiting_for_ack(self) -> bool:
        """Whether only an ack moves this on."""
        return self.phase is Phase.STREAMING and bool(self._pending)

    def handle(self, event: Event) -> Sequence[Instruction]:
        """Apply one event. Raises ProtocolError for an ack that cannot be true."""
        match event:
            case Produced(items):
                if self.phase is not Phase.STREAMING:
                    return ()
                self._pending.extend(items)
                return self._flow()
            case Ended(reason):
                self._end = reason
                return self._flow()
            case Acked(ack, evidence):
                return self._receive(ack, evidence)
            case AckKept(ack):
                self.meter.durable(ack)
                return self._close() if ack.complete else self._flow()
            case Cancelled():
                return self._conclude(Outcome.CANCELLED, "cancelled")
            case Gone() | Stalled():
                return (*self._conclude(Outcome.CANCELLED, "cancelled"), *self._close())
            case Late():
                return self._conclude(Outcome.EXPIRED, "expired")
            case Broke(reason):
                return self._conclude(Outcome.FAILED, reason)

    def receipt(self, finished_at: int) -> Receipt:
        """What this attempt did, for its provider to sign. Only after Conclude: the numbers no longer change."""
        assert self.outcome is not None, "a receipt before the end"
        return Receipt(
            lease=self.lease_hash,
            nonce=self.nonce,
            request_hash=self._request_hash,
            output_hash=self.meter.output_hash,
            prefix_units=self.lease.prefix_units,
            prefix_hash=self.lease.prefix_hash,
            prompt_units=self._prompt_units,
            output_units=self.meter.sent,
            outcome=self.outcome,
            finished_at=finished_at,
        )

    def _flow(self) -> Sequence[Instruction]:
        if self.phase is not Phase.STREAMING:
            return ()
        going: list[Item] = []
        while self._pending and self.meter.fits(self._pending[0]):
            item = self._pending.popleft()
            self.meter.send(item)
            going.append(item)
        out: list[Instruction] = [Send(tuple(going), self.meter.sent)] if going else []
        if self._end is not None and not self._pending:
            out += self._conclude(Outcome.COMPLETED, self._end)
        return out

    def _receive(self, ack: Ack, evidence: bytes) -> Sequence[Instruction]:
        if self.phase is Phase.CLOSED:
            return ()
        if ack.complete and (self.outcome is not Outcome.COMPLETED or ack.units != self.meter.sent):
            raise ProtocolError("an ack that calls the answer complete before it is")
        return (KeepAck(ack, evidence),) if self.meter.receive(ack) else ()

    def _conclude(self, outcome: Outcome, reason: str) -> Sequence[Instruction]:
        if self.phase is not Phase.STREAMING:
            return ()
        self.phase, self.outcome = Phase.CONCLUDED, outcome
        self._pending.clear()
        return (Conclude(outcome, reason),)

    def _close(self) -> Sequence[Instruction]:
        if self.phase is Phase.CLOSED:
            return ()
        self.phase = Phase.CLOSED
        return (Close(),)

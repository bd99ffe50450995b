"""What was sent, what was acknowledged, and what may go next. Pure.

Invariants: nothing goes out further than one window beyond the last durable ack (I4); an ack counts only for output that was sent and
hashes to the same value on both sides (I7); what is acknowledged never goes back.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from gpumarket.core.errors import ProtocolError
from gpumarket.core.terms import Ack
from gpumarket.core.units import Hash
from gpumarket.node.engine.base import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Item:
    """One item of the output chain: a token (uint32 LE) or a row (float32 LE), and the units that it is billed as.

    `logprobs` go beside a token where they were asked for: not hashed, not billed.
    """

    data: bytes
    units: int
    logprobs: TokenLogprobs | None = None


class Meter:
    """Counts one attempt. `sent` and `acked` are output units of this attempt; hashes cover the whole output, prefix included."""

    __slots__ = ("_durable", "_lease", "_marks", "_received", "_window", "output_hash", "sent")

    def __init__(self, lease: Hash, window_units: int, prefix_hash: Hash) -> None:
        self._lease, self._window = lease, window_units
        self.sent = 0
        self.output_hash = prefix_hash
        self._marks: dict[int, Hash] = {0: prefix_hash}
        self._received: Ack | None = None
        self._durable = 0

    @property
    def acked(self) -> int:
        """Units of the last ack that is in the journal."""
        return self._durable

    @property
    def last_ack(self) -> Ack | None:
        """The highest ack that held."""
        return self._received

    def fits(self, item: Item) -> bool:
        """Whether the window has room for one more item.

        An item cannot be split. One of more than half a window waits until less than half a window is unacknowledged: a client owes no ack
        before that, so any stricter rule could wait for ever.
        """
        ahead = self.sent - self._durable
        return ahead + item.units <= self._window or (2 * item.units > self._window and 2 * ahead < self._window)

    def send(self, item: Item) -> None:
        """Count an item as sent. The caller asked `fits`."""
        assert self.fits(item), "an item beyond the window"
        self.sent += item.units
        self.output_hash = Hash(hashlib.sha256(self.output_hash + item.data).digest())
        self._marks[self.sent] = self.output_hash

    def receive(self, ack: Ack) -> bool:
        """Judge an ack whose signature holds; False when it says nothing new. Raises ProtocolError for one that cannot be true."""
        last = self._received
        if ack.lease != self._lease:
            raise ProtocolError("an ack of another lease")
        if last is not None and (ack.units < last.units or (last.complete and ack != last)):
            raise ProtocolError(f"an ack of {ack.units} units after one of {last.units}{' that was the last' if last.complete else ''}")
        if ack == last:
            return False
        expected = self._marks.get(ack.units)
        if expected is None:
            raise ProtocolError(f"an ack of {ack.units} units; {self.sent} were sent, and an item is acknowledged whole")
        if ack.output_hash != expected:
            raise ProtocolError(f"the ack's output hash at {ack.units} units is not that of what was sent")
        self._received = ack
        self._marks = {units: value for units, value in self._marks.items() if units >= ack.units}
        return True

    def durable(self, ack: Ack) -> None:
        """An ack that `receive` took is in the journal: the window moves."""
        self._durable = max(self._durable, ack.units)

"""How far away a provider is: probes that go down its heartbeat stream and come back with its next load, timed here. Pure.

A probe is a random number, so that it cannot be answered before it came. A provider can only seem farther away than it is. The least of the
last few counts: whatever is above it was a busy moment and not the way.
"""

from __future__ import annotations

from collections import deque

ASK_SECONDS = 15.0
REMEMBERED = 8
UNKNOWN_SECONDS = 0.2
"""Taken before the first answer: far, so that being measured is worth it. Half way around the earth and back is 0.2 s in fibre."""


class RoundTrip:
    """Probes of one stream. Times are monotonic seconds."""

    __slots__ = ("_asked_at", "_number", "_seen")

    def __init__(self) -> None:
        self._number, self._asked_at = 0, float("-inf")
        self._seen: deque[float] = deque(maxlen=REMEMBERED)

    def due(self, now: float) -> bool:
        """Whether to ask again."""
        return now - self._asked_at >= ASK_SECONDS

    def ask(self, number: int, now: float) -> None:
        """A probe (not 0) goes out now."""
        self._number, self._asked_at = number, now

    def hear(self, number: int, now: float) -> None:
        """A load came that answers this probe; one that was not asked, or was answered, says nothing."""
        if number and number == self._number:
            self._seen.append(max(0.0, now - self._asked_at))
            self._number = 0

    @property
    def seconds(self) -> float:
        """There and back."""
        return min(self._seen, default=UNKNOWN_SECONDS)

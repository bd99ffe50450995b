"""How fast a model answers here, from what its engine did for the last jobs. Pure.

The rate is units over the seconds that jobs waited for the engine, both decayed with each job, so that a long job counts for more than a
short one and a slow client for nothing. It is the pace of one job among those that run beside it: what the next client will see. The rate
that is told moves only when it is off by a quarter, since every change is a new offer to every peer.
"""

from __future__ import annotations

KEPT = 0.9
"""Of what is known, with each job: the last ten jobs are two thirds of the rate."""
STEP = 0.25
UNITS_MIN = 64
"""Fewer units than this, of all jobs together, say nothing yet."""


class Pace:
    """Pace of one model."""

    __slots__ = ("_seconds", "_told", "_units")

    def __init__(self) -> None:
        self._units = self._seconds = self._told = 0.0

    def add(self, units: int, seconds: float) -> None:
        """One job's units, and the seconds that it waited for its engine to make them."""
        if units <= 0 or seconds <= 0.0:
            return
        self._units = KEPT * self._units + units
        self._seconds = KEPT * self._seconds + seconds
        rate = self._units / self._seconds
        if self._units >= UNITS_MIN and abs(rate - self._told) > STEP * self._told:
            self._told = rate

    @property
    def per_kilosecond(self) -> int:
        """Units in 1,000 seconds, as told to others; 0 while nothing is known."""
        return int(self._told * 1_000)


class Stopwatch:
    """Adds up the time between `start` and `stop`, on a clock that is handed in (seconds, monotonic)."""

    __slots__ = ("_since", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def start(self, now: float) -> None:
        self._since = now

    def stop(self, now: float) -> None:
        self.seconds += max(0.0, now - self._since)
        self._since = now

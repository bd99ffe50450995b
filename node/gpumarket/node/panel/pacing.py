"""When a step may be tried: not again before the view shows the block that took it, and after a failure not at once. Pure."""

from __future__ import annotations

from gpumarket.core.ports import Clock
from gpumarket.core.units import Hash
from gpumarket.settlement.disputes import Step

PAUSE_SECONDS, PAUSE_SECONDS_MAX = 1.0, 60.0


class Pacing:
    """Remembers, for this process only, what was sent: after a restart the chain tells."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._mined: dict[tuple[Hash, Step], int] = {}
        self._failures: dict[tuple[Hash, Step], tuple[int, float]] = {}

    def due(self, dispute: Hash, step: Step, block: int) -> bool:
        """Whether to try now; `block` is how far the view is."""
        key = dispute, step
        if key in self._mined and block < self._mined[key]:
            return False
        return self._clock.monotonic() >= self._failures.get(key, (0, 0.0))[1]

    def done(self, dispute: Hash, step: Step, block: int) -> None:
        """The step is in this block."""
        self._mined[dispute, step] = block
        self._failures.pop((dispute, step), None)

    def failed(self, dispute: Hash, step: Step) -> None:
        """Twice the pause after each failure in a row."""
        count = self._failures.get((dispute, step), (0, 0.0))[0] + 1
        pause = min(PAUSE_SECONDS_MAX, PAUSE_SECONDS * 2 ** (count - 1))
        self._failures[dispute, step] = count, self._clock.monotonic() + pause

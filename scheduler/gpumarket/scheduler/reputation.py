"""Reputation: a Beta posterior over kept and broken promises that forgets with time. Pure.

Only what is a provider's fault counts against it. Evidence weighs by how sure it is: a recomputed rejection far more than a client's word,
an accepted check more than a job that nobody checked. Evidence halves every 30 days, so that neither fame nor shame is for ever.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

HALF_LIFE_SECONDS = 30 * 86_400
PRIOR_KEPT, PRIOR_BROKEN = 4.0, 1.0
"""A newcomer counts as five jobs of which one failed: mean 0.8, lower bound 0.64."""
JAIL_SECONDS = 3_600
JAIL_SECONDS_MAX = 30 * 86_400


class Deed(enum.Enum):
    """What happened, as (kept, broken) evidence."""

    CHECKED = (1.0, 0.0)
    DELIVERED = (0.25, 0.0)
    REJECTED = (0.0, 10.0)
    FAILED = (0.0, 1.0)
    LOST = (0.0, 0.5)
    REFUSED = (0.0, 0.25)
    BLAMELESS = (0.0, 0.0)
    UNDERSTATED = (0.0, 11.0)
    """A client's: it closed an attempt below an ack of its own. Proven by its signature, like a rejection."""


LEFT = "client-left"
"""The reason of `Market.Retry` that opens no further attempt."""
RETRY_DEEDS = {
    "unreachable": Deed.LOST,
    "lost": Deed.LOST,
    "refused": Deed.REFUSED,
    "failed": Deed.LOST,
    "bad-output": Deed.BLAMELESS,
    "client-restart": Deed.BLAMELESS,
    LEFT: Deed.BLAMELESS,
}
WORDS = (Deed.LOST, Deed.REFUSED)
"""Reasons of `Market.Retry`. A client's word alone never weighs more than LOST; bad output is judged when it is reported with evidence."""


@dataclass(frozen=True, slots=True)
class Reputation:
    """Decayed evidence as of `updated_at` (unix seconds)."""

    kept: float = 0.0
    broken: float = 0.0
    updated_at: int = 0
    jailed_until: int = 0
    rejections: int = 0

    def mean_ppm(self, now: int) -> int:
        """Posterior mean, in ppm: what `min_reputation_ppm` is compared with."""
        a, b = self._posterior(now)
        return int(1e6 * a / (a + b))

    def low(self, now: int) -> float:
        """Posterior mean less one standard deviation, at least 0: what the score uses, so that few jobs count for less."""
        a, b = self._posterior(now)
        n = a + b
        deviation = (a * b / (n * n * (n + 1.0))) ** 0.5
        return float(max(0.0, a / n - deviation))

    def observations(self, now: int) -> float:
        """Decayed weight of all evidence."""
        return (self.kept + self.broken) * self._decay(now)

    def after(self, deed: Deed, now: int) -> Reputation:
        """With one more deed. A proven lie jails: an hour, twice as long each time, a month at most."""
        kept, broken = deed.value
        decay = self._decay(now)
        after = replace(self, kept=self.kept * decay + kept, broken=self.broken * decay + broken, updated_at=now)
        if deed not in (Deed.REJECTED, Deed.UNDERSTATED):
            return after
        seconds = min(JAIL_SECONDS << min(self.rejections, 16), JAIL_SECONDS_MAX)
        return replace(after, jailed_until=max(self.jailed_until, now + seconds), rejections=self.rejections + 1)

    def _posterior(self, now: int) -> tuple[float, float]:
        decay = self._decay(now)
        return PRIOR_KEPT + self.kept * decay, PRIOR_BROKEN + self.broken * decay

    def _decay(self, now: int) -> float:
        return float(0.5 ** (max(0, now - self.updated_at) / HALF_LIFE_SECONDS)) if self.updated_at else 1.0

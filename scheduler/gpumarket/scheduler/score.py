"""The published score. Each part lies in [0, 1]; the score is their weighted mean, so it lies in [0, 1] too. Pure.

    price       cheapest candidate's cost / this one's cost of this very job
    latency     1 / (1 + expected seconds / 5): the way there and back, a second for each job queued per place, then units at the speed
                that the provider measured and its offer states
    reputation  posterior mean less one deviation of kept promises (reputation.py)
    stake       stake / (stake + 10 tokens): more stake is better, with less and less effect
    warm        1 when the model is loaded now

Weights are part of the scheduler's terms: changing them is a change that its clients see in `Explain`.
"""

from __future__ import annotations

from dataclasses import dataclass

LATENCY_HALF_SECONDS = 5.0
STAKE_HALF = 10 * 10**18
SHARPNESS = 4.0
"""The draw among candidates is weighted by score to this power: a score of half another's is drawn 1/16 as often."""
NEWCOMER_OBSERVATIONS = 20.0
"""A provider judged on fewer (decayed) jobs than this is a newcomer, for whom the exploration share is kept."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of the parts; they sum to 1."""

    price: float = 0.35
    latency: float = 0.2
    reputation: float = 0.25
    stake: float = 0.1
    warm: float = 0.1

    def __post_init__(self) -> None:
        parts = (self.price, self.latency, self.reputation, self.stake, self.warm)
        if min(parts) < 0 or abs(sum(parts) - 1.0) > 1e-9:
            raise ValueError("score weights are not negative and sum to 1")

    def merit(self, reputation_low: float, stake: int, warm: bool) -> float:
        """The weighted parts that do not depend on the job."""
        return self.reputation * reputation_low + self.stake * stake_part(stake) + self.warm * warm


def stake_part(stake: int) -> float:
    """0 for no stake, half at `STAKE_HALF`."""
    return stake / (stake + STAKE_HALF)


def price_part(cost: float, cheapest: float) -> float:
    """Cost of the cheapest candidate over this one's; where something is free, only the free ones get 1."""
    return cheapest / cost if cost > 0.0 else 1.0


def latency_part(seconds: float) -> float:
    """1 at once, half at `LATENCY_HALF_SECONDS`."""
    return LATENCY_HALF_SECONDS / (LATENCY_HALF_SECONDS + seconds)


def totals(weights: Weights, costs: list[float], seconds: list[float], merits: list[float]) -> list[float]:
    """Scores of candidates, from their costs (money), expected seconds and merits: the parts above, written out for speed."""
    cheapest, price, half = min(costs), weights.price, LATENCY_HALF_SECONDS
    quick = weights.latency * half
    return [
        (price * cheapest / cost if cost > 0.0 else price) + quick / (half + wait) + merit
        for cost, wait, merit in zip(costs, seconds, merits, strict=True)
    ]

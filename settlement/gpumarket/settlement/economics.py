"""What cheating earns. Formulas of the deterrence argument, all pure; amounts are ints of base units or floats of the same unit.

Source: the design's economics (p · d · P(quorum) · (S + R) > g), with the measured detection rates of the verification tables.
"""

from __future__ import annotations

import math
from fractions import Fraction


def cheating_gain(probability: float, detection: float, stake: float, fee: float, gain: float, *, quorum: float = 1.0) -> float:
    """Expected profit of cheating on one job, in the unit of its arguments; negative means that it does not pay.

    probability: that a job is checked, p. detection: that a check sees this cheat, d. quorum: that the punishment follows from it.
    stake: what is lost then, S. fee: the job's payment that is forfeited, R. gain: what the cheat saves or earns when unseen, g.
    """
    for name, value in (("probability", probability), ("detection", detection), ("quorum", quorum)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in 0..1, not {value}")
    caught = probability * detection * quorum
    return gain - caught * (stake + fee)


def required_stake(probability: float, detection: float, fee: float, gain: float, *, quorum: float = 1.0) -> float:
    """Smallest stake at which cheating does not pay. Infinite when it is never caught."""
    caught = probability * detection * quorum
    if caught <= 0:
        return math.inf if gain > 0 else 0.0
    return max(0.0, gain / caught - fee)


def caught_within(jobs: int, probability: float, detection: float) -> float:
    """Chance that a provider that always cheats is caught at least once in `jobs` jobs: 1 - (1 - p*d)^n."""
    return 1.0 - (1.0 - probability * detection) ** jobs


def panel_capture(share: Fraction | float, *, members: int = 5, needed: int = 4) -> float:
    """Chance that `needed` of `members` panel seats, drawn by stake, fall to whoever holds `share` of the stake (binomial tail)."""
    a = float(share)
    return sum(math.comb(members, k) * a**k * (1 - a) ** (members - k) for k in range(needed, members + 1))


def exposure(capacity: int, amount_per_second: int, check_seconds: int) -> int:
    """Value that one provider can have delivered unchecked, in base units: what its stake must back.

    capacity: jobs at once; amount_per_second: what one job earns a second; check_seconds: how long a check may take.
    """
    return capacity * amount_per_second * check_seconds

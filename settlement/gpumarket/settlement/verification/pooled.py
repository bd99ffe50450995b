"""What one job cannot show, many can: a sequential test of a provider's text jobs under one profile (answers too short, int8 weights).

Page's CUSUM over blocks of 128 tokens, the length that the bands were measured at; short answers are joined until they fill a block. A
block's mean gap is taken as exponential: mean `h` for honest runs, `c` for a cheat that hides inside the accept band, so a block adds
ln(h/c) + x (1/h - 1/c), and the sum never falls below 0: a long honest past is no credit. With h = accept / 6 and c = 2/3 accept (measured:
honest median 8e-5 and largest 6.1e-4, int8 median 6.9e-4) honest blocks take 1.4 and give back less, int8 blocks add about 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gpumarket.core.terms import VerificationProfile
from gpumarket.settlement.verification.decide import Verdict

BLOCK_UNITS = 128
LIMIT = 12.0
"""Rejected from here on: e^-12 bounds the rate of false alarms per honest block under the model, 1 in 160,000."""
GREY_FROM = 6.0
BLOCK_MAX = 5.0
"""Most that one block adds: no single job decides here."""


@dataclass(frozen=True, slots=True)
class PooledTest:
    """State of one (provider, profile); keep `score`, `gap_sum` and `units` in the ledger to continue after a restart."""

    profile: VerificationProfile
    score: float = 0.0
    gap_sum: float = 0.0
    """Sum of clipped gaps of the tokens that do not fill a block yet."""
    units: int = 0
    """How many those are, below BLOCK_UNITS."""

    def observe(self, mean_gap: float, units: int) -> PooledTest:
        """The test after one job: its mean clipped gap (`Decision.statistic`) over `units` tokens. A NaN mean adds nothing."""
        if units < 1 or math.isnan(mean_gap):
            return self
        gap_sum, total = self.gap_sum + mean_gap * units, self.units + units
        blocks = total // BLOCK_UNITS
        if not blocks:
            return replace(self, gap_sum=gap_sum, units=total)
        mean = gap_sum / total
        score = self.score
        for _ in range(blocks):
            score = max(0.0, score + min(BLOCK_MAX, self._evidence(mean)))
        rest = total % BLOCK_UNITS
        return replace(self, score=score, gap_sum=mean * rest, units=rest)

    @property
    def verdict(self) -> Verdict:
        """REJECTED means that the provider's jobs together do not fit the profile."""
        if self.score >= LIMIT:
            return Verdict.REJECTED
        return Verdict.GREY if self.score >= GREY_FROM else Verdict.ACCEPTED

    def _evidence(self, mean: float) -> float:
        accept = self.profile.accept_mean_gap_micro / 1e6
        if not accept:
            return 0.0  # a profile without a gap rule (embeddings) decides per job
        honest, cheat = accept / 6, accept * 2 / 3
        return math.log(honest / cheat) + mean * (1 / honest - 1 / cheat)

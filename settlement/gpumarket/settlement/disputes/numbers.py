"""The one number that a panel member reveals: how far the result in dispute lies from what the member computed itself. Pure.

Text: the share of this attempt's tokens whose gap is gross, in millionths. Embeddings: the largest difference of a coordinate, in 1e-9.
The Disputes contract compares it with the bound that the lease's own profile names. Rounding is down: against whoever challenges.
Only the work of the attempt in dispute counts; what earlier attempts delivered is its own providers' affair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpumarket.core.errors import EngineFailed, ProtocolError
from gpumarket.core.seeds import require_disputable
from gpumarket.core.terms import Task, VerificationProfile
from gpumarket.settlement.verification.evidence import Evidence

NUMBER_MAX = 2**64 - 1
"""Revealed for a result that cannot be compared at all: rows of another size, or values that are not finite."""


def bound(profile: VerificationProfile) -> int:
    """Largest number that is still in order. Raises ProtocolError for a task without a rule of what is gross."""
    if profile.task is Task.GENERATE:
        return profile.gross_share_ppm
    if profile.task is Task.EMBED:
        return profile.max_abs_diff_nano
    raise ProtocolError(f"a result of task {profile.task.name} cannot be disputed")


def number(profile: VerificationProfile, evidence: Evidence, computed: Sequence[bytes]) -> int:
    """The member's number for an opened attempt. `computed` is what its own engine gave for `inputs_in_dispute`: the rows, or one item of
    gaps for the whole text. Raises EngineFailed when that is not what an engine gives, ProtocolError for a task that has no number,
    NotDisputable for a text that was drawn from its client's own seed."""
    require_disputable(evidence.request)
    if evidence.lease.task is Task.EMBED:
        return _worst_nano(evidence.output[evidence.own_start :], computed)
    if evidence.lease.task is Task.GENERATE:
        return _gross_ppm(profile, evidence, computed)
    raise ProtocolError(f"a result of task {evidence.lease.task.name} cannot be disputed")


def _gross_ppm(profile: VerificationProfile, evidence: Evidence, computed: Sequence[bytes]) -> int:
    if len(computed) != 1 or len(computed[0]) != 4 * len(evidence.output):
        raise EngineFailed("the engine gave no gap for each token of the text in dispute")
    gaps = np.frombuffer(computed[0], dtype="<f4")[evidence.own_start :]
    if not len(gaps) or np.isnan(gaps).any():
        raise EngineFailed("the engine gave a gap that is no number")
    if len(gaps) < profile.min_units:
        return 0  # the profile rejects nothing so short by itself
    gross = int((gaps > profile.gross_gap_milli / 1e3).sum())
    return gross * 1_000_000 // len(gaps)


def _worst_nano(delivered: Sequence[bytes], computed: Sequence[bytes]) -> int:
    if not delivered or len(delivered) != len(computed):
        raise EngineFailed(f"the engine gave {len(computed)} rows for the {len(delivered)} in dispute")
    worst = 0.0
    for theirs, ours in zip(delivered, computed, strict=True):
        own = np.frombuffer(ours, dtype="<f4").astype(np.float64)
        if not len(own) or not np.isfinite(own).all():
            raise EngineFailed("the engine gave a row that is empty or not finite")
        if len(theirs) != len(ours):
            return NUMBER_MAX
        with np.errstate(invalid="ignore", over="ignore"):  # judged on the next lines
            difference = float(np.abs(np.frombuffer(theirs, dtype="<f4").astype(np.float64) - own).max())
        if not np.isfinite(difference):
            return NUMBER_MAX
        worst = max(worst, difference)
    return min(NUMBER_MAX, int(worst * 1e9))

"""One job's verdict from numbers alone: what was delivered, what a checker computed, and the profile that both sides agreed to.

A decision says that the numbers disagree, not who lies: malformed numbers of a checker are a mismatch like any other, and a second checker
of another owner settles whose they are.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.errors import ProtocolError
from gpumarket.core.tensors import ItemPart, decode_item
from gpumarket.core.terms import Task, VerificationProfile

GAP_CLIP = 2.0
"""A token's gap counts at most this much in the mean (the measured statistic)."""


class Verdict(enum.IntEnum):
    """Values as on the wire (market.proto)."""

    ACCEPTED = 1
    GREY = 2
    REJECTED = 3


@dataclass(frozen=True, slots=True)
class Decision:
    """`statistic`: largest difference (EMBED, INFER) or mean clipped gap (text); NaN where there were no numbers to compare."""

    verdict: Verdict
    statistic: float
    reason: str

    @property
    def accepted(self) -> bool:
        """Paid: accepted or grey."""
        return self.verdict is not Verdict.REJECTED


def decide_embed(profile: VerificationProfile, delivered: Sequence[bytes], recomputed: Sequence[bytes]) -> Decision:
    """Compare rows of float32 little-endian, pairwise in order, within `max_abs_diff_nano` a coordinate."""
    if not delivered or len(delivered) != len(recomputed):
        return _mismatch(f"{len(delivered)} rows delivered, {len(recomputed)} recomputed")
    worst, where = 0.0, 0
    for index, (ours, theirs) in enumerate(zip(delivered, recomputed, strict=True)):
        if not ours or len(ours) % 4 or len(ours) != len(theirs):
            return _mismatch(f"row {index}: {len(ours)} bytes delivered, {len(theirs)} recomputed")
        with np.errstate(invalid="ignore", over="ignore"):  # judged on the next line
            difference = np.abs(_floats(ours) - _floats(theirs)).max()
        if not np.isfinite(difference):
            return _mismatch(f"row {index} holds a value that is not finite")
        if difference > worst:
            worst, where = float(difference), index
    limit = profile.max_abs_diff_nano / 1e9
    if worst > limit:
        return Decision(Verdict.REJECTED, worst, f"row {where} differs by {worst:.3g}, the profile allows {limit:.3g}")
    return Decision(Verdict.ACCEPTED, worst, f"{len(delivered)} rows differ by at most {worst:.3g}, the profile allows {limit:.3g}")


def decide_items(profile: VerificationProfile, delivered: Sequence[bytes], recomputed: Sequence[bytes]) -> Decision:
    """Compare output items of embeddings or tensors, whichever the profile is for."""
    return (decide_tensors if profile.task is Task.INFER else decide_embed)(profile, delivered, recomputed)


def decide_tensors(profile: VerificationProfile, delivered: Sequence[bytes], recomputed: Sequence[bytes]) -> Decision:
    """Compare output items of tensors, pairwise in order: integers and booleans exactly, numbers a and b within `max_abs_diff_nano` of
    max(1, |a|, |b|): absolute for scores and probabilities, relative for what is larger than 1. NaN agrees with NaN alone."""
    if not delivered or len(delivered) != len(recomputed):
        return _mismatch(f"{len(delivered)} rows delivered, {len(recomputed)} recomputed")
    worst, where = 0.0, 0
    for index, (ours, theirs) in enumerate(zip(delivered, recomputed, strict=True)):
        try:
            pairs = list(zip(decode_item(ours), decode_item(theirs), strict=True))
        except (ProtocolError, ValueError):
            return _mismatch(f"row {index}: the tensors delivered are not those recomputed")
        for part, other in pairs:
            if (part.datatype, part.shape) != (other.datatype, other.shape):
                return _mismatch(
                    f"row {index}: {part.datatype} {list(part.shape)} delivered, {other.datatype} {list(other.shape)} recomputed"
                )
            difference = _difference(part, other)
            if difference > worst:
                worst, where = difference, index
    limit = profile.max_abs_diff_nano / 1e9
    if worst > limit:
        return Decision(Verdict.REJECTED, worst, f"row {where} differs by {worst:.3g}, the profile allows {limit:.3g}")
    return Decision(Verdict.ACCEPTED, worst, f"{len(delivered)} rows differ by at most {worst:.3g}, the profile allows {limit:.3g}")


def decide_text(profile: VerificationProfile, gaps: bytes | NDArray[np.float32]) -> Decision:
    """Judge one job's gaps, one per delivered token: float32 >= 0, infinite for a token that could not be drawn at all.

    Gross share above `gross_share_ppm`, or a mean above `reject_mean_gap_micro`: rejected. Shorter than `min_units`: grey at worst.
    """
    values = _floats(gaps) if isinstance(gaps, bytes) and len(gaps) % 4 == 0 else gaps
    if isinstance(values, bytes) or values.ndim != 1 or not len(values):
        return _mismatch("the gaps are not a list of float32")
    if np.isnan(values).any() or (values < 0).any():
        return _mismatch("a gap is negative or not a number")
    mean = float(np.minimum(values, GAP_CLIP).mean(dtype=np.float64))
    gross = float((values > profile.gross_gap_milli / 1e3).mean())
    reason = f"mean gap {mean:.3g}, {gross:.1%} of {len(values)} tokens above {profile.gross_gap_milli / 1e3:g}"
    if gross > profile.gross_share_ppm / 1e6 or mean > profile.reject_mean_gap_micro / 1e6:
        if len(values) < profile.min_units:
            return Decision(Verdict.GREY, mean, f"{reason}; too short to reject alone ({profile.min_units} tokens)")
        return Decision(Verdict.REJECTED, mean, reason)
    return Decision(Verdict.GREY if mean > profile.accept_mean_gap_micro / 1e6 else Verdict.ACCEPTED, mean, reason)


def _floats(raw: bytes) -> NDArray[np.float32]:
    return np.frombuffer(raw, dtype="<f4")


def _difference(part: ItemPart, other: ItemPart) -> float:
    """Largest difference of two tensors of one kind and shape; infinite where it has no measure."""
    if part.contents == other.contents:
        return 0.0
    if not part.datatype.startswith("FP"):
        return float("inf")
    a, b = part.array.astype(np.float64), other.array.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # judged on the next line
        differences = np.abs(a - b) / np.maximum(1.0, np.maximum(np.abs(a), np.abs(b)))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return float(np.where(same, 0.0, np.where(np.isfinite(differences), differences, np.inf)).max(initial=0.0))


def _mismatch(reason: str) -> Decision:
    return Decision(Verdict.REJECTED, float("nan"), reason)

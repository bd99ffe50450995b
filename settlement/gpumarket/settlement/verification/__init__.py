"""How a result is judged: profiles, per-job decisions, pooled decisions, draws, and what two parties agree on from openings. Pure."""

from gpumarket.settlement.verification.decide import Decision, Verdict, decide_embed, decide_items, decide_tensors, decide_text
from gpumarket.settlement.verification.draws import Candidate, draw_check, draw_checker, draw_subset
from gpumarket.settlement.verification.evidence import Evidence, judge, open_evidence
from gpumarket.settlement.verification.pooled import PooledTest
from gpumarket.settlement.verification.profiles import (
    EMBED_BF16,
    EMBED_FP32,
    INFER_FP16,
    INFER_FP32,
    PROFILES,
    TEXT_BF16,
    TEXT_FP32,
    profile_by_digest,
    profile_for,
)
from gpumarket.settlement.verification.subset import check_of, drawn_by

__all__ = [
    "EMBED_BF16",
    "EMBED_FP32",
    "INFER_FP16",
    "INFER_FP32",
    "PROFILES",
    "TEXT_BF16",
    "TEXT_FP32",
    "Candidate",
    "Decision",
    "Evidence",
    "PooledTest",
    "Verdict",
    "check_of",
    "decide_embed",
    "decide_items",
    "decide_tensors",
    "decide_text",
    "draw_check",
    "draw_checker",
    "draw_subset",
    "drawn_by",
    "judge",
    "open_evidence",
    "profile_by_digest",
    "profile_for",
]

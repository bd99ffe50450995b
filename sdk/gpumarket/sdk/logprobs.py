"""What a provider says of each token's probability: judged for shape and sense before anything of it is handed out. Pure.

It is the provider's word alone: not in the output chain, not billed, not recomputed by a checker.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from gpumarket.v1 import provider_pb2 as ppb

ROUNDING = 1e-3
"""By this much the told probabilities of one token may add up to more than 1."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of one token: log-softmax of the model's raw logits, at temperature 1 and before top_p. `top` likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def logprobs_of(frame: ppb.Frame) -> tuple[Logprobs, ...]:
    """As they came, unjudged; where the two lists of a token have different lengths, the rest is missing and `logprobs_flaw` says so."""
    return tuple(Logprobs(m.token, m.logprob, tuple(zip(m.top, m.top_logprobs, strict=False))) for m in frame.logprobs)


def logprobs_flaw(asked: int | None, items: Sequence[bytes], told: Sequence[Logprobs]) -> str:
    """Why these cannot be the logprobs of these tokens, empty when they can. `asked`: how many alternatives; None where none of it was."""
    if asked is None:
        return "logprobs that nobody asked for" if told else ""
    if len(told) != len(items):
        return f"logprobs of {len(told)} tokens beside {len(items)}"
    for item, entry in zip(items, told, strict=True):
        if entry.token != int.from_bytes(item, "little"):
            return f"logprobs of token {entry.token} beside another one"
        if flaw := _entry_flaw(asked, entry):
            return flaw
    return ""


def _entry_flaw(asked: int, entry: Logprobs) -> str:
    if len(entry.top) != asked:
        return f"{len(entry.top)} alternatives to a token; {asked} were asked for"
    ids, values = [token for token, _ in entry.top], [value for _, value in entry.top]
    if not all(math.isfinite(value) and value <= 0 for value in (entry.logprob, *values)):
        return "a logprob that is no logarithm of a probability"
    if len(set(ids)) != len(ids):
        return "the same alternative twice"
    if any(later > earlier for earlier, later in pairwise(values)):
        return "alternatives that do not descend"
    within = dict(entry.top).get(entry.token)
    if within is not None and within != entry.logprob:
        return "two logprobs of one token"
    if within is None and values and entry.logprob > values[-1]:
        return "alternatives that leave out the delivered token, which is likelier"
    if sum(math.exp(value) for value in values) + (0 if within is not None else math.exp(entry.logprob)) > 1 + ROUNDING:
        return "probabilities of more than 1 together"
    return ""

"""How a token is drawn from logits, and how far a delivered token lies from the one that should have been drawn.

The draw, for one row of logits at absolute position i, with temperature T = temperature_milli / 1000:

1. Candidates: the 256 tokens with the largest float32 logits; among equal logits the lower id goes first.
2. Nucleus (only if T > 0 and top_p < 1): order the candidates by (logit descending, id ascending), take softmax(logit / T) over them,
   and keep those whose preceding mass is below top_p. The first is always kept.
3. score = logit + T * gumbel(seed, i, token), in float64; the token is the kept candidate with the largest score, the lowest id among
   equals. T = 0 is greedy. This is the Gumbel-max draw of softmax(logit / T), with scores in units of logits.

The gap of a delivered token is the least amount, in logits, by which two logits must move towards or apart from one another for that
token to be drawn: 0 when it is the drawn one; in general the best score minus its score. A candidate that the same small move would push
out of the candidates or the nucleus does not count against it, and a token just outside counts by how far outside it is; otherwise honest
machines with other rounding would look like cheaters each time the edge falls differently. Gaps are clipped at 2.

Measured on a random 3.4M model in bf16 at T = 1: no honest token had a gap over 0.071, int4 weights had 20-40 % over 0.1.

Invariant: pure; provider and checker call the same functions with the same numbers. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gpumarket.node.engine.base import TOP_P_PPM_MAX, Sampling
from gpumarket.node.engine.noise import gumbel_noise

CANDIDATES: Final = 256
GAP_CLIP: Final = 2.0

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
Wide = NDArray[np.float64]
Flags = NDArray[np.bool_]


def candidates(logits: Logits) -> tuple[Ids, Logits]:
    """The candidates of each row of logits [N, V]: ids [N, K] ascending and their logits [N, K], K = min(256, V)."""
    rows, vocabulary = logits.shape
    count = min(CANDIDATES, vocabulary)
    edge = np.partition(logits, vocabulary - count, axis=1)[:, vocabulary - count, None]
    above, at = logits > edge, logits == edge
    wanted = count - above.sum(1, keepdims=True)
    chosen = above | (at & (np.cumsum(at, axis=1) <= wanted))
    ids: Ids = np.nonzero(chosen)[1].reshape(rows, count)
    return ids, np.take_along_axis(logits, ids, axis=1)


def choose(ids: Ids, logits: Logits, positions: Ids, samplings: Sequence[Sampling]) -> Ids:
    """The token drawn for each row, int64 [N], from its candidates [N, K] (ids ascending), its position and its parameters."""
    temperature, top_p = _parameters(samplings)
    scores = _scores(ids, logits, positions, samplings, temperature)
    if ((top_p < 1) & (temperature > 0)).any():
        kept, _ = _nucleus(logits.astype(np.float64), temperature, top_p)
        scores = np.where(kept, scores, -np.inf)
    picked: Ids = np.take_along_axis(ids, scores.argmax(1)[:, None], axis=1)[:, 0]
    return picked


def gaps(
    ids: Ids,
    logits: Logits,
    tokens: Ids,
    token_logits: Logits,
    positions: Ids,
    samplings: Sequence[Sampling],
    *,
    vocabulary: int,
) -> Logits:
    """The gap of each delivered token, float32 [N] in [0, 2], in logits.

    `ids`, `logits` [N, K] are the row's candidates, `tokens`, `token_logits` [N] the delivered token and its logit (which may lie
    outside the candidates), `vocabulary` the number of logits that the candidates were taken from.
    """
    temperature, top_p = _parameters(samplings)
    wide, own = logits.astype(np.float64), token_logits.astype(np.float64)[:, None]
    scores = _scores(ids, logits, positions, samplings, temperature)
    own_score = _scores(tokens[:, None], token_logits[:, None], positions, samplings, temperature)
    kept, mass = _nucleus(wide, temperature, top_p)

    depth = _nucleus_depth(mass, temperature, top_p)
    slack = _slack(wide, kept, depth, whole=(temperature == 0) | (vocabulary <= ids.shape[1]))
    overtaken = np.where(kept, np.minimum(np.maximum(scores - own_score, 0.0), slack), 0.0).max(1)
    missing = _missing(wide, own, kept, depth, ids == tokens[:, None])
    gap = np.maximum(overtaken, np.where(temperature[:, 0] == 0, 0.0, missing))
    clipped: Logits = np.clip(gap, 0.0, GAP_CLIP).astype(np.float32)
    return clipped


def score_gap(row: Logits, token: int, position: int, sampling: Sampling) -> float:
    """The gap of one delivered token, from the whole row of logits [V]."""
    ids, logits = candidates(row[None, :])
    at = np.array([position], dtype=np.int64)
    chosen = np.array([token], dtype=np.int64)
    return float(gaps(ids, logits, chosen, row[token][None], at, [sampling], vocabulary=len(row))[0])


def draw(row: Logits, position: int, sampling: Sampling) -> int:
    """The token drawn from one whole row of logits [V]."""
    ids, logits = candidates(row[None, :])
    return int(choose(ids, logits, np.array([position], dtype=np.int64), [sampling])[0])


def _parameters(samplings: Sequence[Sampling]) -> tuple[Wide, Wide]:
    """Temperature and top_p of each row, float64 [N, 1]."""
    temperature = np.array([s.temperature_milli for s in samplings], dtype=np.float64)[:, None] / 1000
    top_p = np.array([s.top_p_ppm for s in samplings], dtype=np.float64)[:, None] / TOP_P_PPM_MAX
    return temperature, top_p


def _scores(ids: Ids, logits: Logits, positions: Ids, samplings: Sequence[Sampling], temperature: Wide) -> Wide:
    """logit + T * gumbel, float64 [N, K]. Rows at T = 0 get no noise, and a batch of only such rows never computes any."""
    wide = logits.astype(np.float64)
    if not temperature.any():
        return wide
    noise = gumbel_noise([s.seed for s in samplings], positions, ids).astype(np.float64)
    scores: Wide = wide + temperature * noise
    return scores


def _nucleus(wide: Wide, temperature: Wide, top_p: Wide) -> tuple[Flags, Wide]:
    """Which candidates are kept, and the mass that precedes each in the order of (logit descending, id ascending)."""
    order = np.argsort(-wide, axis=1, kind="stable")
    ordered = np.take_along_axis(wide, order, axis=1)
    weights = np.exp((ordered - ordered[:, :1]) / np.where(temperature == 0, 1.0, temperature))
    cumulative = np.cumsum(weights, axis=1)
    preceding = np.empty_like(wide)
    np.put_along_axis(preceding, order, (cumulative - weights) / cumulative[:, -1:], axis=1)
    return (preceding < top_p) | (temperature == 0) | (top_p >= 1), preceding


def _nucleus_depth(mass: Wide, temperature: Wide, top_p: Wide) -> Wide:
    """By how many logits a candidate lies inside the nucleus (negative: outside).

    Moving the logits of what precedes it and of the rest apart by d multiplies the odds of the preceding mass by exp(d / T), so the edge
    is reached at d = T * (log-odds(top_p) - log-odds(mass)), exactly.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.log(top_p) - np.log1p(-top_p) - np.log(mass) + np.log1p(-np.minimum(mass, 1.0))
        depth = temperature * inside
    unbounded = (temperature == 0) | (top_p >= 1) | (mass <= 0)
    bounded: Wide = np.where(unbounded, np.inf, depth)
    return bounded


def _slack(wide: Wide, kept: Flags, depth: Wide, *, whole: Flags) -> Wide:
    """The move that would take a kept candidate out: below the last of the 256 (unless these are `whole`, all that could be drawn),
    below the first that the nucleus leaves out, or out of the nucleus by mass."""
    slack = np.where(whole, np.inf, wide - wide.min(1, keepdims=True))
    first_out = np.where(kept, -np.inf, wide).max(1, keepdims=True)
    slack = np.minimum(slack, wide - first_out)
    least: Wide = np.minimum(slack, np.maximum(depth, 0.0))
    return least


def _missing(wide: Wide, own: Wide, kept: Flags, depth: Wide, inside: Flags) -> Wide:
    """The move that would bring a delivered token in, [N]: 0 if it is kept; else up to the last one kept, or into the nucleus by mass."""
    below = np.where(kept, wide, np.inf).min(1) - own[:, 0]
    by_mass = np.where(inside, -depth, -np.inf).max(1)
    short = np.where(inside.any(1), np.minimum(by_mass, below), below)
    move: Wide = np.where((inside & kept).any(1), 0.0, np.maximum(short, 0.0))
    return move

"""From a tensor of logits to what `sampling` needs: candidates on the model's device, the draw itself on the processor in numpy.

Invariant: the same candidates as `sampling.candidates`, ties included, and nothing random: the draw is numpy's alone, on 256 values a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpumarket.core.errors import EngineFailed
from gpumarket.node.engine import sampling
from gpumarket.node.engine.base import Sampling, TokenLogprobs

LOGPROB_MIN = -9999.0
"""Told for a token that the model masks altogether, whose logarithm is -inf."""


def pick_tokens(logits: Tensor, positions: Sequence[int], samplings: Sequence[Sampling]) -> list[int]:
    """The token drawn for each row of logits [N, V]. EngineFailed when the model computed something that is no number."""
    wide = logits.float()
    best, first = wide.max(-1)
    if not bool(torch.isfinite(best).all()):
        raise EngineFailed("the model computed logits that are not finite", hint="try compute dtype float32")
    if all(s.temperature_milli == 0 for s in samplings):
        return [int(token) for token in first.tolist()]
    ids, values = top_candidates(wide)
    tokens = sampling.choose(ids, values, np.array(positions, dtype=np.int64), samplings)
    return [int(token) for token in tokens]


def pick_gaps(logits: Tensor, tokens: Sequence[int], positions: Sequence[int], samplings: Sequence[Sampling]) -> NDArray[np.float32]:
    """The gap of each delivered token, float32 [N], from logits [N, V]."""
    wide = logits.float()
    ids, values = top_candidates(wide)
    chosen = torch.tensor(tokens, device=wide.device)
    own = wide.gather(1, chosen[:, None])[:, 0].cpu().numpy()
    return sampling.gaps(
        ids,
        values,
        np.array(tokens, dtype=np.int64),
        own,
        np.array(positions, dtype=np.int64),
        samplings,
        vocabulary=wide.shape[1],
    )


def pick_logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int | None]) -> list[TokenLogprobs | None]:
    """Log-softmax of the raw logits [N, V] for the drawn token of each row and as many of the likeliest as `counts` says; None where it
    says None, which costs nothing."""
    asked = [i for i, count in enumerate(counts) if count is not None]
    wide = logits[torch.tensor(asked, device=logits.device)].float().log_softmax(-1)
    drawn = torch.tensor([tokens[i] for i in asked], device=wide.device)
    own = wide.gather(1, drawn[:, None])[:, 0].tolist()
    best, ids = (found.tolist() for found in wide.topk(max(counts[i] or 0 for i in asked), dim=1))
    told: list[TokenLogprobs | None] = [None] * len(counts)
    for row, i in enumerate(asked):
        count = counts[i] or 0
        top = tuple((int(token), _at_most_0(value)) for token, value in zip(ids[row][:count], best[row][:count], strict=True))
        told[i] = TokenLogprobs(tokens[i], _at_most_0(own[row]), top)
    return told


def _at_most_0(value: float) -> float:
    """A probability of 1 may be rounded above it, and one of 0 has no logarithm that JSON knows."""
    return min(0.0, max(value, LOGPROB_MIN))


def top_candidates(logits: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """`sampling.candidates` for a float32 tensor [N, V] on any device."""
    count = min(sampling.CANDIDATES, logits.shape[1])
    edge = torch.topk(logits, count, dim=1).values[:, -1:]
    chosen = logits >= edge
    if int(chosen.sum()) != count * len(logits):
        above = logits > edge
        at = logits == edge
        wanted = count - above.sum(1, keepdim=True)
        chosen = above | (at & (at.cumsum(1) <= wanted))
    ids = chosen.nonzero()[:, 1].view(len(logits), count)
    return ids.cpu().numpy(), logits.gather(1, ids).cpu().numpy()

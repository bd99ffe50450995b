"""Replaying an answer: one prefill pass over prompt and output, and the gap of every output token.

Invariant: reads the request and the output only; what the provider computed is never an input.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpumarket.core.errors import ProtocolError
from gpumarket.node.engine.base import GenerateRequest, Sampling, Segment
from gpumarket.node.engine.kv_cache import SlotCache
from gpumarket.node.engine.pick import pick_gaps

Gaps = NDArray[np.float32]


def samplings_of(request: GenerateRequest, count: int, segments: Sequence[Segment]) -> list[Sampling]:
    """The parameters that drew each of `count` output tokens. ProtocolError unless the segments start at 0 and rise."""
    starts = [segment.start for segment in segments]
    if segments and (starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts))):
        raise ProtocolError(f"the attempts of an answer start at {starts}", hint="the first starts at 0, the others rise")
    drawn = [request.sampling] * count
    for segment in segments:
        sampling = dataclasses.replace(request.sampling, seed=segment.seed)
        drawn[segment.start :] = [sampling] * max(0, count - segment.start)
    return drawn


def check_output(request: GenerateRequest, output: Sequence[int]) -> None:
    """ProtocolError when the output could not be an answer to the request."""
    if not output:
        raise ProtocolError("there is no output to replay", hint="an empty answer is refused without a replay")
    if len(output) > request.max_tokens:
        raise ProtocolError(f"the output has {len(output)} tokens, the request allows {request.max_tokens}", hint="reject the result")


@torch.inference_mode()
def replay_steps(
    model: Any, request: GenerateRequest, output: Sequence[int], segments: Sequence[Segment], piece: int
) -> Generator[None, None, Gaps]:
    """Gaps of the whole output, float32 [len(output)]; yields after each piece of the pass, so that others get their turn."""
    samplings = samplings_of(request, len(output), segments)
    context = [*request.prompt, *output]
    first = len(request.prompt)
    cache = SlotCache(int(model.config.get_text_config().num_hidden_layers), cells_max=1 << 62)
    cache.reserve(1, len(context))
    found: list[Gaps] = []
    for start in range(0, len(context) - 1, piece):
        stop = min(start + piece, len(context) - 1)
        positions, mask = cache.extend(0, start, stop - start, model.device)
        # The logits at position i - 1 draw the token at position i; those that draw prompt tokens are not computed.
        wanted = range(max(start + 1, first), stop + 1)
        keep = torch.tensor([i - 1 - start for i in wanted] or [0])
        tokens = torch.tensor([context[start:stop]], device=model.device)
        logits = model(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits[0]
        if wanted:
            drawn = samplings[wanted[0] - first : wanted[-1] - first + 1]
            found.append(pick_gaps(logits, [context[i] for i in wanted], list(wanted), drawn))
        yield
    return np.concatenate(found)

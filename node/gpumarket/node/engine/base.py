"""The Engine interface and its requests. The wire is token ids: clients tokenize, an engine never sees text.

Invariant: a request that could be constructed is well formed; whether its ids fit the model is the engine's own check.
This module must never import torch: parents of engine processes use it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.errors import ProtocolError
from gpumarket.core.tensor_requests import TensorRequest

SEED_BYTES: Final = 32
TEMPERATURE_MILLI_MAX: Final = 2000
TOP_P_PPM_MAX: Final = 1_000_000
STOP_TOKENS_MAX: Final = 64
TOP_LOGPROBS_MAX: Final = 20

FINISH_STOP: Final = "stop"
FINISH_LENGTH: Final = "length"


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Texts as token ids, special tokens included."""

    inputs: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ProtocolError("an embedding request has no input", hint="send at least one sequence of token ids")
        for i, ids in enumerate(self.inputs):
            if not ids:
                raise ProtocolError(f"input {i} of the embedding request has no tokens", hint="leave empty texts out")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Integers on the wire, so that both sides compute with the same numbers."""

    temperature_milli: int
    """Temperature times 1000, in [0, 2000]. 0 is greedy: the noise and top_p are unused."""
    top_p_ppm: int
    """Nucleus mass in millionths, in [1, 1,000,000]; 1,000,000 keeps every candidate."""
    seed: bytes
    """32 bytes that neither side could choose alone; fixes every draw."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature_milli <= TEMPERATURE_MILLI_MAX:
            raise ProtocolError(f"temperature_milli is {self.temperature_milli}", hint=f"use 0 (greedy) to {TEMPERATURE_MILLI_MAX}")
        if not 1 <= self.top_p_ppm <= TOP_P_PPM_MAX:
            raise ProtocolError(f"top_p_ppm is {self.top_p_ppm}", hint=f"use 1 to {TOP_P_PPM_MAX} (off)")
        if len(self.seed) != SEED_BYTES:
            raise ProtocolError(f"the sampling seed has {len(self.seed)} bytes", hint=f"use {SEED_BYTES} bytes")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One text to continue.

    Token number i of the sequence prompt + output has position i; the noise that draws it uses that position, so an answer that
    moves to another provider in the middle keeps its positions.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    """Bound on the whole output, `prefix` included."""
    stop_tokens: tuple[int, ...]
    """Generation ends after any of these. The stop token itself is delivered, as the last token: it proves the stop."""
    sampling: Sampling
    prefix: tuple[int, ...] = ()
    """Tokens that an earlier attempt delivered; generation continues after them."""
    top_logprobs: int | None = None
    """With each token its `TokenLogprobs`, with so many alternatives, in [0, 20]; None is without, and costs nothing."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ProtocolError("the prompt has no tokens", hint="send at least a beginning-of-text token")
        if self.max_tokens <= len(self.prefix):
            raise ProtocolError(
                f"max_tokens is {self.max_tokens} and {len(self.prefix)} tokens were delivered already",
                hint="nothing is left to generate: do not open another attempt",
            )
        if len(self.stop_tokens) > STOP_TOKENS_MAX:
            raise ProtocolError(f"{len(self.stop_tokens)} stop tokens", hint=f"use at most {STOP_TOKENS_MAX}")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= TOP_LOGPROBS_MAX:
            raise ProtocolError(f"top_logprobs is {self.top_logprobs}", hint=f"use 0 to {TOP_LOGPROBS_MAX}, or leave it out")
        if any(token in self.stop_tokens for token in self.prefix[-1:]):
            raise ProtocolError("the delivered prefix ends in a stop token", hint="the answer is complete already")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model itself thought of a token that was drawn: log-softmax of its raw logits, at temperature 1 and before top_p.

    Natural logarithms, at most 0. `top` are the ids of the likeliest tokens with theirs, likeliest first; the drawn one may be missing.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some delivered tokens. `finish_reason` is "" until the last chunk, then "stop" or "length".

    `logprobs` has one entry for each token where the request asked for them, and is empty otherwise.
    """

    tokens: tuple[int, ...]
    finish_reason: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """From output index `start` on, tokens were drawn with `seed`: each attempt of a job has a seed of its own."""

    start: int
    seed: bytes


class Engine(Protocol):
    """What serves jobs. Iterators may be closed at any time, which ends the work within one step.

    Every method raises `EngineFailed` when the engine is not running or breaks, `Busy` when its queue is full, and `ProtocolError`
    when the request does not fit the model.
    """

    @property
    def task(self) -> str:
        """ "embed", "generate" or "infer"."""
        ...

    async def start(self) -> None:
        """Load the model; returns when the first request would be served at full speed."""
        ...

    def embed(self, request: EmbedRequest) -> AsyncIterator[NDArray[np.float32]]:
        """Vectors in input order, in batches of rows: each item is float32 [rows, dimensions]."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """New tokens (not the prefix), as they are drawn; what a slow reader left unread is delivered together."""
        ...

    def infer(self, request: TensorRequest) -> AsyncIterator[tuple[NDArray[Any], ...]]:
        """The wanted outputs in their order, in batches of rows: each item one array [rows, ...] an output; without rows one item."""
        ...

    async def replay(self, request: GenerateRequest, output: Sequence[int], segments: Sequence[Segment] = ()) -> NDArray[np.float32]:
        """The gap of each output token (`sampling.gaps`), float32 [len(output)], in one prefill pass.

        `segments` names the seed of each attempt, in order, the first with start 0; without any, the request's seed drew everything.
        """
        ...

    async def stats(self) -> Mapping[str, object]:
        """Counters and gauges, JSON-able: requests, tokens, queue depth, sandbox."""
        ...

    async def close(self) -> None:
        """Stop now; open calls fail with `EngineFailed`. Closing twice is fine."""
        ...

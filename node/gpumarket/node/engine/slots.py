"""The slots engine: the continuous-batching decoder in a thread of its own, behind the Engine interface.

A slow reader costs nothing but its own unread tokens, which are delivered together and are bounded by its max_tokens.

Invariant: every open call ends, with its last chunk or with an error; a failing pass fails the calls that were in it and no later ones.
Must never log or keep a prompt beyond its call.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from gpumarket.core.errors import Busy, EngineFailed, GpumarketError, ProtocolError
from gpumarket.core.tensor_requests import TensorRequest
from gpumarket.node.engine.base import Chunk, EmbedRequest, GenerateRequest, Segment, TokenLogprobs
from gpumarket.node.engine.decoder import Emission, SlotDecoder
from gpumarket.node.engine.loading import load_decoder
from gpumarket.node.engine.replay import check_output, replay_steps
from gpumarket.node.engine.thread import ModelThread

Gaps = NDArray[np.float32]

REPLAYS_OPEN_MAX: Final = 8


@dataclass(slots=True)
class _Stream:
    """What the loop holds for one open generate call."""

    ready: asyncio.Event = field(default_factory=asyncio.Event)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str = ""
    error: GpumarketError | None = None


@dataclass(slots=True)
class _Replay:
    """A replay in work."""

    steps: Generator[None, None, Gaps]
    done: asyncio.Future[Gaps]


class SlotEngine:
    """Text generation. Reads `folder` (safetensors) and computes in `compute_dtype`.

    `rows_max` sequences decode at once and `queue_max` more wait; `cache_tokens_max` bounds rows times longest sequence, which is the
    memory of the key/value cache; `prefill_tokens` is the size of one prefill pass.
    """

    task = "generate"

    def __init__(
        self,
        folder: Path,
        *,
        compute_dtype: str = "float32",
        rows_max: int = 32,
        queue_max: int = 64,
        cache_tokens_max: int = 32_768,
        prefill_tokens: int = 512,
    ) -> None:
        self._folder = folder
        self._compute_dtype = compute_dtype
        self._rows_max, self._queue_max = rows_max, queue_max
        self._cache_tokens_max, self._prefill_tokens = cache_tokens_max, prefill_tokens
        self._decoder: SlotDecoder | None = None
        self._thread: ModelThread | None = None
        self._replays: deque[_Replay] = deque()
        self._streams: dict[int, _Stream] = {}
        self._replays_open = 0
        self._next_key = 0
        self._counts = {"requests": 0, "replays": 0, "tokens_in": 0, "tokens_out": 0}

    async def start(self) -> None:
        """Load the model and start the thread. ConfigError for an unsafe folder, EngineFailed when it does not load."""
        if self._decoder is not None:
            return
        model = await asyncio.to_thread(load_decoder, self._folder, self._compute_dtype)
        self._decoder = SlotDecoder(
            model,
            rows_max=self._rows_max,
            cache_tokens_max=self._cache_tokens_max,
            prefill_tokens=self._prefill_tokens,
        )
        self._thread = ModelThread("slots", self._work, self._decoder.release, lambda error: self._fail(_as_failure(error)))

    async def embed(self, request: EmbedRequest) -> AsyncGenerator[NDArray[np.float32], None]:
        """This engine generates text."""
        raise ProtocolError("this model generates text and makes no embeddings", hint="choose a model of task embed")
        yield np.empty((0, 0), dtype=np.float32)

    async def infer(self, request: TensorRequest) -> AsyncGenerator[tuple[NDArray[Any], ...], None]:
        """This engine generates text."""
        raise ProtocolError("this model generates text", hint="choose a model of task infer")
        yield ()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """New tokens as they are drawn. Busy when rows and queue are full."""
        decoder, thread = self._running()
        decoder.check(request)
        if len(self._streams) >= self._rows_max + self._queue_max:
            raise Busy(f"{len(self._streams)} generations are running or waiting", hint="retry later or at another provider")
        self._next_key += 1
        key, stream = self._next_key, _Stream()
        self._streams[key] = stream
        self._counts["requests"] += 1
        self._counts["tokens_in"] += len(request.prompt) + len(request.prefix)
        thread.post(lambda: decoder.submit(key, request))
        try:
            while True:
                await stream.ready.wait()
                stream.ready.clear()
                tokens, stream.tokens = tuple(stream.tokens), []
                logprobs, stream.logprobs = tuple(stream.logprobs), []
                # Taken before the yield: while the reader holds this chunk, the stream goes on.
                finish_reason, error = stream.finish_reason, stream.error
                if tokens or finish_reason:
                    yield Chunk(tokens, finish_reason, logprobs)
                if error is not None:
                    raise error
                if finish_reason:
                    return
        finally:
            del self._streams[key]
            if not stream.finish_reason:
                thread.post(lambda: decoder.cancel(key))

    async def replay(self, request: GenerateRequest, output: Sequence[int], segments: Sequence[Segment] = ()) -> NDArray[np.float32]:
        """Gaps of the output, in pieces between the decode passes."""
        decoder, thread = self._running()
        decoder.check(request)
        decoder.check_ids(tuple(output))
        check_output(request, output)
        if self._replays_open >= REPLAYS_OPEN_MAX:
            raise Busy(f"{self._replays_open} replays are waiting", hint="retry later or at another provider")
        steps = replay_steps(decoder.model, request, tuple(output), tuple(segments), self._prefill_tokens)
        replay = _Replay(steps, asyncio.get_running_loop().create_future())
        self._replays_open += 1
        self._counts["replays"] += 1
        thread.post(lambda: self._replays.append(replay))
        try:
            return await replay.done
        finally:
            self._replays_open -= 1

    async def stats(self) -> Mapping[str, int | str]:
        """Counters since the start, and what runs now."""
        decoder, _ = self._running()
        return {
            "task": self.task,
            "compute_dtype": self._compute_dtype,
            "device": str(decoder.device),
            **self._counts,
            "open": len(self._streams),
            "running": len(decoder.running),
            "waiting": len(decoder.waiting),
            "rows_max": self._rows_max,
            "steps": decoder.steps,
        }

    async def close(self) -> None:
        """Stop the thread after its pass; open calls fail."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await thread.stop()
            self._fail(EngineFailed("the engine was closed", hint="retry at another provider"))

    def _running(self) -> tuple[SlotDecoder, ModelThread]:
        if self._decoder is None or self._thread is None or not self._thread.alive:
            raise EngineFailed("the slots engine is not running", hint="start it first")
        return self._decoder, self._thread

    # --- on the thread ----------------------------------------------------------------------------------------------

    def _work(self) -> bool:
        decoder, thread = self._running()
        try:
            if not decoder.idle:
                thread.tell(self._deliver, decoder.step())
        except Exception as error:  # whatever torch raises: out of memory, a bad kernel, our own bug
            decoder.clear()
            thread.tell(self._fail_streams, _as_failure(error))
        self._advance_replay(thread)
        return bool(self._replays) or not decoder.idle

    def _advance_replay(self, thread: ModelThread) -> None:
        if not self._replays:
            return
        replay = self._replays.popleft()
        if replay.done.cancelled():
            return
        try:
            next(replay.steps)
            self._replays.append(replay)
        except StopIteration as finished:
            thread.tell(_resolve, replay.done, finished.value)
        except Exception as error:
            thread.tell(_reject, replay.done, _as_failure(error))

    # --- back on the loop -------------------------------------------------------------------------------------------

    def _deliver(self, emissions: list[Emission]) -> None:
        for emission in emissions:
            stream = self._streams.get(emission.key)
            if stream is None:
                continue
            self._counts["tokens_out"] += 1
            stream.tokens.append(emission.token)
            if emission.logprobs is not None:
                stream.logprobs.append(emission.logprobs)
            stream.finish_reason = emission.finish_reason
            stream.ready.set()

    def _fail(self, error: GpumarketError) -> None:
        self._fail_streams(error)
        while self._replays:
            _reject(self._replays.popleft().done, error)

    def _fail_streams(self, error: GpumarketError) -> None:
        for stream in self._streams.values():
            if not stream.finish_reason:
                stream.error = error
                stream.ready.set()


def _as_failure(error: Exception) -> GpumarketError:
    if isinstance(error, GpumarketError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return EngineFailed("the device has no memory left for this batch", hint="lower rows_max or cache_tokens_max")
    return EngineFailed(f"a pass over the model failed: {type(error).__name__}", hint="see the provider's log")


def _resolve(done: asyncio.Future[Gaps], value: Gaps) -> None:
    if not done.done():
        done.set_result(value)


def _reject(done: asyncio.Future[Gaps], error: GpumarketError) -> None:
    if not done.done():
        done.set_exception(error)

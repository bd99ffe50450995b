"""What a leased request asks of an engine, and its answer as items of the output chain. Pure but for the engine that it drives.

Invariant: the number of input tokens that the order states is the number that is here; whoever states fewer would pay for fewer.
Units (docs/protocol.md): a generated token is one; a vector, or the gaps of a checked text, are the input tokens that it took.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.codec import parse
from gpumarket.core.errors import EngineFailed, ProtocolError
from gpumarket.core.seeds import drawing_seed
from gpumarket.core.tensor_requests import TensorRequest, from_bytes, from_proto
from gpumarket.core.tensors import Signature
from gpumarket.core.terms import JobSpec, Lease, ModelManifest, Task, output_chain, token_item
from gpumarket.core.units import ZERO_HASH, Hash
from gpumarket.node.attempt import Ended, Produced
from gpumarket.node.engine.base import Chunk, EmbedRequest, Engine, GenerateRequest, Sampling, Segment
from gpumarket.node.meter import Item
from gpumarket.node.tensor_work import items_of, open_tensors
from gpumarket.v1 import terms_pb2 as pb

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EmbedWork:
    """Vectors of the inputs that no earlier attempt delivered."""

    request: EmbedRequest


@dataclass(frozen=True, slots=True)
class GenerateWork:
    request: GenerateRequest


@dataclass(frozen=True, slots=True)
class ReplayWork:
    """The gaps of a delivered text."""

    request: GenerateRequest
    output: tuple[int, ...]
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class InferWork:
    """Rows that no earlier attempt delivered."""

    request: TensorRequest


Work = EmbedWork | GenerateWork | InferWork | ReplayWork


def open_work(
    lease: Lease,
    spec: JobSpec,
    manifest: ModelManifest,
    request: bytes,
    prefix: Sequence[int],
    nonce: Hash,
    signature: Signature | None = None,
) -> Work:
    """The work inside a request whose hash was checked; `signature` is a tensor model's. Raises ProtocolError when it is not what the
    order says or the model takes."""
    match lease.task:
        case Task.GENERATE:
            _require_task(manifest, Task.GENERATE, lease.task)
            return _generate(lease, spec, manifest, parse(pb.GenerateRequest, request), prefix, nonce)
        case Task.EMBED:
            _require_task(manifest, Task.EMBED, lease.task)
            return _embed(lease, spec, manifest, parse(pb.EmbedRequest, request))
        case Task.INFER:
            _require_task(manifest, Task.INFER, lease.task)
            return InferWork(open_tensors(lease, spec, manifest, signature, from_bytes(request)))
        case Task.CHECK:
            return _check(lease, spec, manifest, parse(pb.CheckRequest, request), signature)


async def run(work: Work, engine: Engine) -> AsyncGenerator[Produced | Ended, None]:
    """Drive the engine. Closing this iterator closes the engine's, which ends the work. Raises EngineFailed when the answer has a hole."""
    match work:
        case EmbedWork(request):
            done = 0
            async with _closing(engine.embed(request)) as batches:
                async for rows in batches:
                    lengths = [len(ids) for ids in request.inputs[done : done + len(rows)]]
                    done += len(rows)
                    yield Produced(tuple(Item(_float32(row), length) for row, length in zip(rows, lengths, strict=True)))
            if done != len(request.inputs):
                raise EngineFailed(f"the engine gave {done} vectors for {len(request.inputs)} inputs")
            yield Ended("")
        case GenerateWork(request):
            reason = ""
            async with _closing(engine.generate(request)) as chunks:
                async for chunk in chunks:
                    reason = chunk.finish_reason
                    yield Produced(_tokens(request, chunk))
            if not reason:
                raise EngineFailed("the engine stopped without a reason in the middle of a text")
            yield Ended(reason)
        case InferWork(tensors):
            done = 0
            async with _closing(engine.infer(tensors)) as arrays:
                async for batch in arrays:
                    items = tuple(items_of(tensors, batch))
                    done += len(items)
                    yield Produced(items)
            if done != tensors.items:
                raise EngineFailed(f"the engine gave {done} rows for the {tensors.items} it took")
            yield Ended("")
        case ReplayWork(request, output, segments):
            gaps = await engine.replay(request, output, segments)
            if gaps.shape != (len(output),):
                raise EngineFailed(f"the engine gave gaps of shape {gaps.shape} for {len(output)} tokens")
            yield Produced((Item(_float32(gaps), len(request.prompt) + len(output)),))
            yield Ended("")


def _generate(
    lease: Lease, spec: JobSpec, manifest: ModelManifest, body: pb.GenerateRequest, prefix: Sequence[int], nonce: Hash
) -> GenerateWork:
    _require_count(spec, len(body.prompt))
    if body.max_tokens > spec.max_output_units:
        raise ProtocolError(f"the request wants {body.max_tokens} tokens; the order pays for {spec.max_output_units}")
    _require_length(manifest, len(body.prompt) + body.max_tokens, "the prompt with its answer")
    delivered = output_chain(token_item(token) for token in _uint32(prefix))
    if len(prefix) != lease.prefix_units or delivered != lease.prefix_hash:
        raise ProtocolError(f"the {len(prefix)} delivered tokens are not the {lease.prefix_units} that the lease continues from")
    return GenerateWork(_generate_request(body, drawing_seed(body, lease.struct_hash, nonce), tuple(prefix)))


def _embed(lease: Lease, spec: JobSpec, manifest: ModelManifest, body: pb.EmbedRequest) -> EmbedWork:
    inputs = tuple(tuple(entry.ids) for entry in body.inputs)
    request = EmbedRequest(inputs)
    _require_count(spec, sum(len(ids) for ids in inputs))
    _require_whole(spec)
    _require_length(manifest, max(len(ids) for ids in inputs), "an input")
    skipped, rest = 0, list(inputs)
    while rest and skipped < lease.prefix_units:
        skipped += len(rest.pop(0))
    if skipped != lease.prefix_units:
        raise ProtocolError(f"the lease continues after {lease.prefix_units} units, which is in the middle of an input")
    if not rest:
        raise ProtocolError("every input was delivered by earlier attempts; nothing is left to do")
    return EmbedWork(request if not skipped else EmbedRequest(tuple(rest)))


def _check(lease: Lease, spec: JobSpec, manifest: ModelManifest, body: pb.CheckRequest, signature: Signature | None) -> Work:
    if body.HasField("embed") + body.HasField("generate") + body.HasField("infer") != 1:
        raise ProtocolError("a check is of embeddings, of a text or of tensors: exactly one of them")
    if body.HasField("infer"):
        _require_task(manifest, Task.INFER, lease.task)
        return InferWork(open_tensors(lease, spec, manifest, signature, from_proto(body.infer)))
    if body.HasField("embed"):
        _require_task(manifest, Task.EMBED, lease.task)
        return _embed(lease, spec, manifest, body.embed)
    _require_task(manifest, Task.GENERATE, lease.task)
    prompt, output = tuple(body.generate.prompt), tuple(body.output)
    _require_count(spec, len(prompt) + len(output))
    _require_whole(spec)
    _require_length(manifest, len(prompt) + len(output), "the text")
    if lease.prefix_units or lease.prefix_hash != ZERO_HASH:
        raise ProtocolError("the check of a text is one item; no part of it can have been delivered before")
    if not output:
        raise ProtocolError("a check of an empty text")
    segments = tuple(Segment(segment.start, segment.seed) for segment in body.segments)
    starts = [segment.start for segment in segments]
    if not segments or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= len(output):
        raise ProtocolError("the seed segments of a check must ascend from 0 and lie inside the text")
    if any(len(segment.seed) != 32 for segment in segments):
        raise ProtocolError("a seed of a check is not 32 bytes")
    return ReplayWork(_generate_request(body.generate, segments[0].seed, ()), output, segments)


def _generate_request(body: pb.GenerateRequest, seed: bytes, prefix: tuple[int, ...]) -> GenerateRequest:
    sampling = Sampling(body.temperature_milli, body.top_p_ppm, seed)
    top_logprobs = body.top_logprobs if body.HasField("top_logprobs") else None
    return GenerateRequest(tuple(body.prompt), body.max_tokens, tuple(body.stop_tokens), sampling, prefix, top_logprobs)


def _tokens(request: GenerateRequest, chunk: Chunk) -> tuple[Item, ...]:
    """Raises EngineFailed for a chunk whose logprobs are not those of its tokens: the client would blame this provider."""
    if request.top_logprobs is None:
        return tuple(Item(token_item(token), 1) for token in chunk.tokens)
    told = chunk.logprobs
    if tuple(t.token for t in told) != chunk.tokens or any(len(t.top) != request.top_logprobs for t in told):
        raise EngineFailed(f"the engine gave {len(told)} logprobs that are not those of the {len(chunk.tokens)} tokens that it drew")
    return tuple(Item(token_item(t.token), 1, t) for t in told)


def _require_task(manifest: ModelManifest, task: Task, asked: Task) -> None:
    if manifest.task is not task:
        raise ProtocolError(f"{asked.name} does not go with {manifest.name}, a model of task {manifest.task.name}")


def _require_count(spec: JobSpec, tokens: int) -> None:
    if spec.prompt_units != tokens:
        raise ProtocolError(f"the order states {spec.prompt_units} input tokens, the request has {tokens}")


def _require_whole(spec: JobSpec) -> None:
    if spec.max_output_units != spec.prompt_units:
        raise ProtocolError(f"the order states {spec.max_output_units} output units where they equal the {spec.prompt_units} input tokens")


def _require_length(manifest: ModelManifest, tokens: int, what: str) -> None:
    if tokens > manifest.max_input_tokens:
        raise ProtocolError(f"{what} has {tokens} tokens; {manifest.name} takes {manifest.max_input_tokens}", hint="shorten it")


def _uint32(tokens: Sequence[int]) -> Iterator[int]:
    for token in tokens:
        if not 0 <= token < 2**32:
            raise ProtocolError("a token that is no uint32")
        yield token


def _float32(row: NDArray[np.float32]) -> bytes:
    return np.ascontiguousarray(row, dtype="<f4").tobytes()


@asynccontextmanager
async def _closing(iterator: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """The interface promises AsyncIterator; an engine's are generators, and closing them is what cancels."""
    try:
        yield iterator
    finally:
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()

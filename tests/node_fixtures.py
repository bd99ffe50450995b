"""What tests of a provider share: keys, a lease with its order, a scripted engine, and a chain view filled in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.codec import signed_ack, signed_lease, signed_order
from gpumarket.core.errors import EngineFailed
from gpumarket.core.signing import LocalKey, market_domain
from gpumarket.core.tensor_requests import Tensor, TensorRequest
from gpumarket.core.tensor_requests import to_proto as tensor_to_proto
from gpumarket.core.tensors import DTYPES, Signature, TensorSpec
from gpumarket.core.terms import (
    Ack,
    JobSpec,
    Lease,
    ManifestFile,
    ModelManifest,
    Task,
    keccak256,
    output_chain,
    request_hash,
    token_item,
)
from gpumarket.core.units import ZERO_HASH, Address, Hash, Money
from gpumarket.node.admission import House, OnSale
from gpumarket.node.engine.base import Chunk, EmbedRequest, GenerateRequest, Segment
from gpumarket.v1 import provider_pb2 as pb
from gpumarket.v1 import terms_pb2 as terms

NOW = 1_800_000_000
CHAIN_ID = 31_337
DOMAIN = market_domain(CHAIN_ID, Address(b"\x11" * 20))
CLIENT = LocalKey(keccak256(b"client"))
SCHEDULER = LocalKey(keccak256(b"scheduler"))
PROVIDER = LocalKey(keccak256(b"provider"))
STRANGER = LocalKey(keccak256(b"stranger"))
CHANNEL = Hash(b"\xc1" * 32)
SALT = b"\x5a" * 32
TOKEN = 10**18


class FixedClock:
    """A clock that tests turn."""

    def __init__(self, now: int = NOW) -> None:
        self.at = float(now)

    def now(self) -> int:
        return int(self.at)

    def monotonic(self) -> float:
        return self.at


@dataclass
class Channel:
    payer: Address = SCHEDULER.address
    payee: Address = PROVIDER.address
    signer: Address = SCHEDULER.address
    deposit: int = 50 * TOKEN
    expires_at: int = NOW + 30 * 86_400
    closes_at: int = 0
    closed: bool = False


@dataclass
class Node:
    roles: int = 2
    endpoint: str = ""
    tls_key_hash: Hash = ZERO_HASH


def manifest(task: Task, name: str = "", max_input_tokens: int = 512) -> ModelManifest:
    label = name or task.name.lower()
    file = ManifestFile("config.json", Hash(keccak256(label.encode())), 3)
    return ModelManifest(label, task, "float32", "none", "Apache-2.0", max_input_tokens, (file,))


def on_sale(task: Task, *, slots: int = 2, prompt: int = 2 * 10**16, output: int = 10**17) -> OnSale:
    return OnSale(manifest(task), Hash(keccak256(b"profile" + task.name.encode())), Money(prompt), Money(output), slots)


def house(*models: OnSale, **changes: Any) -> House:
    rules = House(PROVIDER.address, DOMAIN, {m.manifest.digest: m for m in models}, True, 64, 32_768, 600)
    return replace(rules, **changes)


@dataclass
class Job:
    """An order with its lease and request; `open` is what a client sends."""

    model: OnSale
    task: Task
    request: bytes
    prompt_units: int
    max_output_units: int
    window: int
    name: bytes = b"job"
    attempt: int = 1
    prefix: tuple[int, ...] = ()
    prefix_units: int = 0
    prefix_hash: Hash = ZERO_HASH
    lease_changes: Mapping[str, Any] = field(default_factory=dict)
    spec_changes: Mapping[str, Any] = field(default_factory=dict)
    now: int = NOW
    channel: Hash = CHANNEL

    @property
    def spec(self) -> JobSpec:
        spec = JobSpec(
            client=CLIENT.address,
            scheduler=SCHEDULER.address,
            job_id=keccak256(self.name),
            task=self.task,
            model=self.model.manifest.digest,
            request_hash=request_hash(SALT, self.request),
            prompt_units=self.prompt_units,
            max_output_units=self.max_output_units,
            max_amount=Money(TOKEN),
            constraints_hash=keccak256(b""),
            profile=self.model.profile,
            deadline=self.now + 600,
        )
        return replace(spec, **self.spec_changes)

    @property
    def lease(self) -> Lease:
        spec = self.spec
        lease = Lease(
            job=spec.key,
            spec=spec.struct_hash,
            attempt=self.attempt,
            client=spec.client,
            scheduler=spec.scheduler,
            provider=PROVIDER.address,
            model=spec.model,
            task=spec.task,
            prompt_price_per_mtok=self.model.prompt_price,
            output_price_per_mtok=self.model.output_price,
            maximum=Money(TOKEN // 100),
            fee_ppm=10_000,
            client_channel=Hash(b"\xc0" * 32),
            provider_channel=self.channel,
            profile=spec.profile,
            window_units=self.window,
            prefix_units=self.prefix_units,
            prefix_hash=self.prefix_hash,
            issued_at=self.now,
            deadline=self.now + 600,
        )
        return replace(lease, **self.lease_changes)

    def open(self, lease_signer: LocalKey = SCHEDULER, order_signer: LocalKey = CLIENT) -> pb.InferOpen:
        return pb.InferOpen(
            lease=signed_lease(lease_signer, DOMAIN, self.lease),
            order=signed_order(order_signer, DOMAIN, self.spec, b""),
            request=self.request,
            salt=SALT,
            prefix=self.prefix,
        )

    def ack(
        self, units: int, output_hash: Hash, *, complete: bool = False, will_check: bool = False, key: LocalKey = CLIENT
    ) -> terms.SignedAck:
        return signed_ack(key, DOMAIN, Ack(self.lease.struct_hash, units, output_hash, complete, will_check))


def generate_job(model: OnSale, prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 40, window: int = 8, **changes: Any) -> Job:
    body = terms.GenerateRequest(prompt=prompt, max_tokens=max_tokens, temperature_milli=0, top_p_ppm=1_000_000)
    job = Job(model, Task.GENERATE, body.SerializeToString(), len(prompt), max_tokens, window)
    return replace(job, **changes)


def embed_job(model: OnSale, inputs: Sequence[Sequence[int]] = ((1, 2), (3, 4, 5)), window: int = 1_000, **changes: Any) -> Job:
    body = terms.EmbedRequest(inputs=[terms.TokenList(ids=ids) for ids in inputs])
    units = sum(len(ids) for ids in inputs)
    job = Job(model, Task.EMBED, body.SerializeToString(), units, units, window)
    return replace(job, **changes)


TENSOR_SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1,)), TensorSpec("n", "INT64", (-1,))), True)


def tensor_model(**changes: Any) -> OnSale:
    return replace(on_sale(Task.INFER), signature=TENSOR_SIGNATURE, **changes)


def tensor_request(rows: int) -> TensorRequest:
    array = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
    return TensorRequest((Tensor("x", "FP32", array.shape, array.tobytes()),), TENSOR_SIGNATURE.outputs, rows)


def tensor_job(model: OnSale, rows: int = 5, window: int = 64, **changes: Any) -> Job:
    raw = tensor_to_proto(tensor_request(rows)).SerializeToString()
    return replace(Job(model, Task.INFER, raw, rows, rows, window), **changes)


def text_hash(tokens: Sequence[int], start: Hash = ZERO_HASH) -> Hash:
    return output_chain((token_item(token) for token in tokens), start)


class ScriptedEngine:
    """Counts upwards. `gate` holds it back; `alive` False makes every call fail."""

    def __init__(self, task: str, *, chunk: int = 4, tokens: int | None = None) -> None:
        self.task = task
        self.chunk, self.tokens = chunk, tokens
        self.gate = asyncio.Event()
        self.gate.set()
        self.alive = True
        self.starts = 0
        self.jobs = 0
        self.cancelled = 0
        self.produced = 0
        self.replayed: list[tuple[tuple[int, ...], tuple[Segment, ...]]] = []

    async def start(self) -> None:
        self.starts += 1
        if not self.alive:
            raise EngineFailed("scripted: does not start")

    async def embed(self, request: EmbedRequest) -> AsyncIterator[NDArray[np.float32]]:
        async with _Running(self):
            for ids in request.inputs:
                await self._step()
                yield np.array([[len(ids), ids[0], 0.5]], dtype=np.float32)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        async with _Running(self):
            want = min(self.tokens or request.max_tokens, request.max_tokens)
            at = len(request.prefix)
            while at < want:
                await self._step()
                tokens = tuple(range(at, min(at + self.chunk, want)))
                at += len(tokens)
                self.produced += len(tokens)
                yield Chunk(tokens, ("length" if at >= request.max_tokens else "stop") if at >= want else "")

    async def infer(self, request: TensorRequest) -> AsyncIterator[tuple[NDArray[Any], ...]]:
        """Every output full of the row's first number."""
        async with _Running(self):
            for row in request.inputs[0].array.reshape(request.items, -1)[:, 0]:
                await self._step()
                shapes = [tuple(max(1, size) for size in spec.shape) for spec in request.outputs]
                yield tuple(np.full(shape, row, DTYPES[spec.datatype]) for shape, spec in zip(shapes, request.outputs, strict=True))

    async def replay(self, request: GenerateRequest, output: Sequence[int], segments: Sequence[Segment] = ()) -> NDArray[np.float32]:
        await self._step()
        self.replayed.append((tuple(output), tuple(segments)))
        return np.linspace(0, 0.01, len(output), dtype=np.float32)

    async def stats(self) -> Mapping[str, object]:
        if not self.alive:
            raise EngineFailed("scripted: dead")
        return {"sandbox": "process"}

    async def close(self) -> None:
        self.alive = False

    async def _step(self) -> None:
        await self.gate.wait()
        if not self.alive:
            raise EngineFailed("scripted: died")


class _Running:
    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine = engine

    async def __aenter__(self) -> None:
        self.engine.jobs += 1

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.engine.jobs -= 1
        if kind in (GeneratorExit, asyncio.CancelledError):
            self.engine.cancelled += 1

"""The scheduler's side of a GPU proof: pose, time, check (arithmetic: gpumarket.settlement.gpu_proof).

A proof says: whoever answers at the offer's TLS key computed this product in this time. It does not say whose GPU it was; a provider that
rents the answers still has to rent them at every random repetition.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import grpc.aio

from gpumarket.core.codec import signed_call
from gpumarket.core.errors import BadProof, GpumarketError, ProtocolError, Unreachable
from gpumarket.core.ports import Clock, Random
from gpumarket.core.rpc import from_rpc, pinned_channel
from gpumarket.core.signing import Domain, Signer
from gpumarket.core.units import Address, Hash
from gpumarket.scheduler.settings import SchedulerSettings
from gpumarket.settlement import gpu_proof
from gpumarket.settlement.gpu_classes import PEAK_MARGIN, class_of, flaw_of_memory, flaw_of_rate
from gpumarket.v1 import provider_pb2 as pb
from gpumarket.v1 import provider_pb2_grpc as grpc_stubs
from gpumarket.v1 import terms_pb2

ROWS_OPENED = 16
"""A tenth of the rows made up passes with (0.9)^16 = 18 %, half of them with 1.5e-5; repetitions do the rest."""
READS, ROWS_READ = 5, 8
CPU = "CPU"


@dataclass(frozen=True, slots=True)
class Measured:
    """A proof that holds: at least `mflops`, transfer and hashing included, in `seconds` from seed to commitment."""

    mflops: int
    seconds: float


class Challenger:
    """Poses challenges; checks the answers a few at a time."""

    def __init__(self, signer: Signer, domain: Domain, clock: Clock, random: Random, settings: SchedulerSettings) -> None:
        self._signer, self._domain, self._clock, self._random, self._settings = signer, domain, clock, random, settings
        self._checking = asyncio.Semaphore(settings.challenges_at_once)

    async def prove(self, offer: terms_pb2.OfferBody) -> Measured:
        """Challenge every GPU of an offer in turn; the slowest rate counts. Raises BadProof, Unreachable or ProtocolError.

        Waiting for a provider takes nobody's place: some that never answer must not keep others from being proven.
        """
        try:
            async with asyncio.timeout(self._settings.challenge_seconds), self._channel(offer) as channel:
                stub = grpc_stubs.ProviderStub(channel)
                measured = [await self._prove_one(stub, offer, gpu) for gpu in offer.gpus]
        except TimeoutError as error:
            raise BadProof(f"no answer to the GPU challenge within {self._settings.challenge_seconds:.0f} s") from error
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, f"the provider at {offer.endpoint}") from error
        return min(measured, key=lambda m: m.mflops)

    def _channel(self, offer: terms_pb2.OfferBody) -> Any:
        return pinned_channel(offer.endpoint, offer.tls_key_hash)

    async def _prove_one(self, stub: Any, offer: terms_pb2.OfferBody, gpu: terms_pb2.GpuClaim) -> Measured:
        s = self._settings
        size, repeats, keep = plan_of(gpu, s)
        seed, vector_seed = self._random.token(32), self._random.token(32)
        rows = sorted({int.from_bytes(self._random.token(4), "little") % size for _ in range(ROWS_OPENED)})
        call = stub.ProveGpu()
        try:
            started = self._clock.monotonic()
            await call.write(pb.GpuChallenge(seed=self._seed(Address(offer.provider), seed, size, repeats, gpu.uuid, keep)))
            commitment = (await _answer(call, "commitment")).commitment
            seconds = self._clock.monotonic() - started
            if commitment.gpu_class != gpu.gpu_class:
                raise BadProof(f"the offer says {gpu.gpu_class!r}, the proof was made on {commitment.gpu_class!r}")
            kept = await self._read(call, gpu, repeats, keep, size)
            await call.write(pb.GpuChallenge(opening=pb.GpuOpening(vector_seed=vector_seed, rows=rows)))
            proof = (await _answer(call, "proof")).proof
            await call.done_writing()
        finally:
            call.cancel()
        opened = [gpu_proof.Row(row.index, row.values, tuple(row.path)) for row in proof.rows]
        async with self._checking:
            await asyncio.to_thread(gpu_proof.check, seed, size, repeats, commitment.root, vector_seed, rows, proof.product, opened, kept)
        return _rated(gpu, size, repeats, seconds, s.cpu_floor_mflops if gpu.gpu_class == CPU else s.gpu_floor_mflops)

    async def _read(self, call: Any, gpu: terms_pb2.GpuClaim, repeats: int, keep: int, size: int) -> list[gpu_proof.KeptRow]:
        """Rows of kept products from random places, each read answered in time: what is not in memory would have to be computed first.

        The vector that they are checked with is told after them.
        """
        if not keep:
            return []
        kept, times = list[gpu_proof.KeptRow](), list[float]()
        for _ in range(READS):
            links = [repeats - self._below(keep) for _ in range(ROWS_READ)]
            rows = [self._below(size) for _ in range(ROWS_READ)]
            started = self._clock.monotonic()
            await call.write(pb.GpuChallenge(read=pb.GpuRead(links=links, rows=rows)))
            values = (await _answer(call, "kept")).kept.rows
            times.append(self._clock.monotonic() - started)
            if len(values) != ROWS_READ:
                raise BadProof(f"{len(values)} rows were read from memory where {ROWS_READ} were asked for")
            kept += [gpu_proof.KeptRow(*one) for one in zip(links, rows, values, strict=True)]
        usual = sorted(times)[READS // 2]
        if gpu.gpu_class != CPU and usual > self._settings.gpu_read_seconds:
            raise BadProof(f"reading {ROWS_READ} rows of what was filled took {usual:.2f} s; in memory it takes less than "
                           f"{self._settings.gpu_read_seconds:.2f}")  # fmt: skip
        return kept

    def _below(self, end: int) -> int:
        return int.from_bytes(self._random.token(8), "little") % end

    def _seed(self, provider: Address, seed: bytes, size: int, repeats: int, uuid: str, keep: int) -> pb.GpuSeed:
        nonce = Hash(self._random.token(32))
        empty = terms_pb2.TokenList()  # serializes to nothing: the call has no body
        call = signed_call(self._signer, self._domain, "Provider/ProveGpu", empty, provider, self._clock.now(), nonce)
        return pb.GpuSeed(seed=seed, size=size, uuid=uuid, repeats=repeats, call=call, keep=keep)


async def _answer(call: Any, field: str) -> pb.GpuAnswer:
    answer = await call.read()  # raises AioRpcError when the provider ended the call with an error
    if not isinstance(answer, pb.GpuAnswer) or answer.WhichOneof("message") != field:
        raise ProtocolError(f"the provider ended the GPU proof, or said something else, where its {field} belongs")
    return answer


def plan_of(gpu: terms_pb2.GpuClaim, settings: SchedulerSettings) -> tuple[int, int, int]:
    """(size, products, products to keep) of the challenge for a device: enough of them to fill the share of its stated memory.

    Raises BadProof for a claim that its class cannot have.
    """
    flaw = flaw_of_memory(gpu.gpu_class, gpu.vram_bytes)
    if flaw:
        raise BadProof(flaw)
    if gpu.measured_mflops > class_of(gpu.gpu_class).peak_tflops * PEAK_MARGIN * 1e6:
        raise BadProof(flaw_of_rate(gpu.gpu_class, gpu.measured_mflops, 0))
    if gpu.gpu_class == CPU:
        return settings.cpu_challenge_size, settings.cpu_challenge_repeats, settings.cpu_challenge_repeats
    size = settings.gpu_challenge_size
    keep = min(int(gpu.vram_bytes * settings.gpu_fill_share) // (4 * size * size), gpu_proof.REPEATS_MAX)
    return size, max(settings.gpu_challenge_repeats, keep), keep


def _rated(gpu: terms_pb2.GpuClaim, size: int, repeats: int, seconds: float, floor_mflops: int) -> Measured:
    mflops = int(gpu_proof.operations(size, repeats) / max(seconds, 1e-6) / 1e6)
    if mflops < floor_mflops:
        raise BadProof(f"{mflops:,} MFLOP/s were measured, the class shows at least {floor_mflops:,}")
    flaw = flaw_of_rate(gpu.gpu_class, mflops, gpu_proof.operations(size, repeats))
    if flaw:
        raise BadProof(flaw)
    return Measured(mflops, seconds)


def is_passing(error: GpumarketError) -> bool:
    """Whether a failed challenge says nothing about the GPU (network), so that it is soon tried again."""
    return isinstance(error, Unreachable) or error.retryable

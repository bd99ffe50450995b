"""Posing GPU challenges: some providers that never answer keep nobody else from being proven."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from scheduler_world import DOMAIN, SCHEDULER, HandClock, key, settings

from gpumarket.core.errors import BadProof
from gpumarket.core.ports import SystemRandom
from gpumarket.core.units import Hash
from gpumarket.scheduler.challenge import Challenger
from gpumarket.settlement import gpu_proof
from gpumarket.v1 import provider_pb2 as pb
from gpumarket.v1 import terms_pb2 as terms


class Answering:
    """A call to a provider that proves, or to one that only waits."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._answers: asyncio.Queue[pb.GpuAnswer] = asyncio.Queue()

    async def write(self, message: pb.GpuChallenge) -> None:
        if self._silent:
            return
        if message.HasField("seed"):
            self._rows = gpu_proof.product(message.seed.seed, message.seed.size, message.seed.repeats)
            root, self._tree = gpu_proof.commit(self._rows)
            self._answers.put_nowait(pb.GpuAnswer(commitment=pb.GpuCommitment(root=root, gpu_class="CPU")))
            return
        opened = gpu_proof.open_rows(self._rows, self._tree, list(message.opening.rows))
        rows = [pb.GpuRow(index=r.index, values=r.values, path=r.path) for r in opened]
        product = gpu_proof.answer(self._rows, message.opening.vector_seed)
        self._answers.put_nowait(pb.GpuAnswer(proof=pb.GpuProof(product=product, rows=rows)))

    async def read(self) -> pb.GpuAnswer:
        return await self._answers.get()

    async def done_writing(self) -> None:
        return None

    def cancel(self) -> None:
        return None


def challenger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Challenger:
    made = Challenger(SCHEDULER, DOMAIN, HandClock(), SystemRandom(), settings(tmp_path, **changes))

    @asynccontextmanager
    async def channel(offer: terms.OfferBody) -> Any:
        yield offer.endpoint

    class Stub:
        def __init__(self, endpoint: str) -> None:
            self._endpoint = endpoint

        def ProveGpu(self) -> Answering:
            return Answering(silent=self._endpoint == "silent")

    monkeypatch.setattr(made, "_channel", channel)
    monkeypatch.setattr("gpumarket.scheduler.challenge.grpc_stubs.ProviderStub", Stub)
    return made


def offer(endpoint: str, gpus: int = 1) -> terms.OfferBody:
    claims = [terms.GpuClaim(gpu_class="CPU", uuid=str(i)) for i in range(gpus)]
    return terms.OfferBody(provider=key(endpoint).address, endpoint=endpoint, tls_key_hash=Hash(b"t" * 32), gpus=claims)


async def test_provers_that_never_answer_keep_nobody_from_being_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = challenger(tmp_path, monkeypatch, challenges_at_once=2)
    silent = [asyncio.create_task(made.prove(offer("silent"))) for _ in range(3)]
    await asyncio.sleep(0)
    measured = await asyncio.wait_for(made.prove(offer("honest")), 30)
    assert measured.mflops > 0
    for task in silent:
        task.cancel()
    await asyncio.gather(*silent, return_exceptions=True)


async def test_many_gpus_share_one_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = challenger(tmp_path, monkeypatch, challenge_seconds=0.1)
    with pytest.raises(BadProof, match="no answer"):
        await asyncio.wait_for(made.prove(offer("silent", gpus=600)), 30)

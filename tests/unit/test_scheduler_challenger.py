"""Posing GPU challenges: some providers that never answer keep nobody else from being proven."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scheduler_world import DOMAIN, SCHEDULER, HandClock, key, settings

from gpumarket.core.errors import BadProof
from gpumarket.core.ports import SystemRandom
from gpumarket.core.units import Hash
from gpumarket.scheduler.challenge import Challenger
from gpumarket.settlement import gpu_proof
from gpumarket.v1 import provider_pb2 as pb
from gpumarket.v1 import terms_pb2 as terms

COMMIT_SECONDS = 1e-3
"""What computing takes on the scheduler's clock, which only these tests move."""


class Answering:
    """A call to a provider that proves, or to one that only waits. `read_seconds` pass on the scheduler's clock with each read."""

    def __init__(self, clock: HandClock, *, silent: bool, read_seconds: float = 0.0, forge: bool = False) -> None:
        self._silent, self._clock, self._read_seconds, self._forge = silent, clock, read_seconds, forge
        self.reads: list[pb.GpuRead] = []
        self._answers: asyncio.Queue[pb.GpuAnswer] = asyncio.Queue()

    async def write(self, message: pb.GpuChallenge) -> None:
        if self._silent:
            return
        if message.HasField("seed"):
            seed = message.seed
            self._kept = gpu_proof.products(seed.seed, seed.size, seed.repeats, seed.keep)
            self._rows, self._clock.mono = self._kept[seed.repeats], self._clock.mono + COMMIT_SECONDS
            root, self._tree = gpu_proof.commit(self._rows)
            self._answers.put_nowait(pb.GpuAnswer(commitment=pb.GpuCommitment(root=root, gpu_class=seed.uuid.rstrip("0123456789"))))
            return
        if message.HasField("read"):
            self.reads.append(message.read)
            self._clock.mono += self._read_seconds
            values = [self._kept[link][row] for link, row in zip(message.read.links, message.read.rows, strict=True)]
            if self._forge:
                values[-1] = values[-1] * np.float32(1.01)
            self._answers.put_nowait(pb.GpuAnswer(kept=pb.GpuKept(rows=[v.tobytes() for v in values])))
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


def challenger(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answering: dict[str, Any] | None = None,
    calls: list[Answering] | None = None,
    **changes: Any,
) -> Challenger:
    clock = HandClock()
    made = Challenger(SCHEDULER, DOMAIN, clock, SystemRandom(), settings(tmp_path, **changes))

    @asynccontextmanager
    async def channel(offer: terms.OfferBody) -> Any:
        yield offer.endpoint

    class Stub:
        def __init__(self, endpoint: str) -> None:
            self._endpoint = endpoint

        def ProveGpu(self) -> Answering:
            call = Answering(clock, silent=self._endpoint == "silent", **(answering or {}))
            if calls is not None:
                calls.append(call)
            return call

    monkeypatch.setattr(made, "_channel", channel)
    monkeypatch.setattr("gpumarket.scheduler.challenge.grpc_stubs.ProviderStub", Stub)
    return made


def offer(endpoint: str, gpus: int = 1, gpu_class: str = "CPU", **claim: Any) -> terms.OfferBody:
    claims = [terms.GpuClaim(gpu_class=gpu_class, uuid=f"{gpu_class}{i}", **claim) for i in range(gpus)]
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


# --- plausible for the class, and filled -----------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"gpu_challenge_size": 64, "gpu_challenge_repeats": 6, "gpu_floor_mflops": 1, "gpu_fill_share": 0.5}
OPERATIONS = gpu_proof.operations(64, 8)
VRAM = 16 * 4 * 64 * 64
"""Half of it is eight products."""


async def test_proof_fills_the_share_of_the_stated_memory_and_reads_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Answering] = []
    made = challenger(tmp_path, monkeypatch, {"read_seconds": 0.01}, calls, **SMALL)
    measured = await made.prove(offer("honest", gpu_class="NVIDIA T", vram_bytes=VRAM))
    assert measured.mflops == int(OPERATIONS / measured.seconds / 1e6)
    links = {link for read in calls[0].reads for link in read.links}
    assert links <= set(range(1, 9))
    assert len(links) > 4, "forty draws of eight"


async def test_proof_whose_memory_answers_late_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = challenger(tmp_path, monkeypatch, {"read_seconds": 0.6}, gpu_read_seconds=0.5, **SMALL)
    with pytest.raises(BadProof, match=r"took 0\.60 s"):
        await made.prove(offer("honest", gpu_class="NVIDIA T", vram_bytes=VRAM))


async def test_proof_with_a_forged_row_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = challenger(tmp_path, monkeypatch, {"forge": True}, **SMALL)
    with pytest.raises(BadProof, match="read from memory"):
        await made.prove(offer("honest", gpu_class="NVIDIA T", vram_bytes=VRAM))


async def test_proof_on_a_cpu_reads_back_its_few_products_in_its_own_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Answering] = []
    made = challenger(tmp_path, monkeypatch, {"read_seconds": 30.0}, calls, cpu_challenge_repeats=3)
    await made.prove(offer("honest", vram_bytes=2**40))
    assert {link for read in calls[0].reads for link in read.links} <= {1, 2, 3}


@pytest.mark.parametrize(
    ("claim", "match"),
    [
        ({"gpu_class": "NVIDIA H200", "vram_bytes": 200 * 2**30}, "200.0 GiB are offered"),
        ({"gpu_class": "Tesla T4", "measured_mflops": 60_000_000}, "the class ends at"),
    ],
)
async def test_claims_that_their_class_cannot_have_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claim: dict[str, Any], match: str
) -> None:
    calls: list[Answering] = []
    made = challenger(tmp_path, monkeypatch, None, calls, **SMALL)
    with pytest.raises(BadProof, match=match):
        await made.prove(offer("honest", **claim))
    assert not calls or not calls[0].reads

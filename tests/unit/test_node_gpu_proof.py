"""The provider's side of a GPU proof: computes, commits, keeps and reads back; in the daemon on a CPU, in its own process on a GPU."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from node_fixtures import SCHEDULER, STRANGER, FixedClock
from provider_market import CPU

from gpumarket.core.errors import BadProof, Busy, ProtocolError
from gpumarket.node.gpu_device import DONE, DROP, MULTIPLY, NOT_KEPT, PLACE, READ, REQUEST, Device, serve
from gpumarket.node.gpu_process import DeviceProcess
from gpumarket.node.gpu_proof import Prover
from gpumarket.settlement import gpu_proof


async def test_prover_answers_a_challenge_that_the_checker_accepts() -> None:
    prover = Prover(CPU, FixedClock(), pause_seconds=5, size_max=256)
    commitment = await prover.commit(SCHEDULER.address, b"\x01" * 32, 128, 4, "")
    product, rows = commitment.open(b"\x02" * 32, [0, 77])
    gpu_proof.check(b"\x01" * 32, 128, 4, commitment.root, b"\x02" * 32, [0, 77], product, rows)
    with pytest.raises(BadProof):
        gpu_proof.check(b"\x03" * 32, 128, 4, commitment.root, b"\x02" * 32, [0, 77], product, rows)
    assert prover.measured_mflops[""] > 0


async def test_prover_refuses_what_is_too_large_unknown_or_too_often() -> None:
    clock = FixedClock()
    prover = Prover(CPU, clock, pause_seconds=5, size_max=128)
    for size, uuid in ((256, ""), (100, ""), (64, "GPU-1")):
        with pytest.raises(ProtocolError):
            await prover.commit(SCHEDULER.address, b"\x01" * 32, size, 1, uuid)
    commitment = await prover.commit(SCHEDULER.address, b"\x01" * 32, 64, 1, "")
    with pytest.raises(Busy):
        await prover.commit(SCHEDULER.address, b"\x01" * 32, 64, 1, "")
    await prover.commit(STRANGER.address, b"\x01" * 32, 64, 1, "")
    clock.at += 6
    await prover.commit(SCHEDULER.address, b"\x01" * 32, 64, 1, "")
    with pytest.raises(ProtocolError):
        commitment.open(b"\x02" * 32, list(range(65)))


async def test_prover_reads_back_what_it_was_told_to_keep_and_nothing_else() -> None:
    prover = Prover(CPU, FixedClock(), pause_seconds=5, size_max=4_096)
    seed = b"\x01" * 32
    commitment = await prover.commit(SCHEDULER.address, seed, 64, 4, "", keep=2)
    read = await commitment.read([3, 4], [5, 63])
    product, rows = commitment.open(b"\x02" * 32, [0])
    kept = [gpu_proof.KeptRow(link, row, values) for link, row, values in zip((3, 4), (5, 63), read, strict=True)]
    gpu_proof.check(seed, 64, 4, commitment.root, b"\x02" * 32, [0], product, rows, kept)
    with pytest.raises(BadProof, match="read from memory"):
        gpu_proof.check(seed, 64, 4, commitment.root, b"\x02" * 32, [0], product, rows, [kept[0], replace(kept[1], link=3)])
    for links, at in (([2], [0]), ([3], [64]), ([3, 4], [0]), ([], []), ([4] * 65, [0] * 65)):
        with pytest.raises(ProtocolError):
            await commitment.read(links, at)
    await commitment.release()
    with pytest.raises(ProtocolError):
        await commitment.read([4], [0])
    with pytest.raises(ProtocolError, match="room for"):
        await prover.commit(STRANGER.address, seed, 4_096, 2, "", keep=2)
    with pytest.raises(ProtocolError, match="keeps 5 of 4"):
        await prover.commit(STRANGER.address, seed, 64, 4, "", keep=5)


def test_device_computes_the_same_chain_with_torch_and_keeps_its_end() -> None:
    pytest.importorskip("torch")
    device, seed = Device(), b"\x01" * 32
    ours, theirs = device.multiply(seed, 64, 3, -1, 2), gpu_proof.products(seed, 64, 3, 2)
    assert float(np.linalg.norm(ours - theirs[3]) / np.linalg.norm(theirs[3])) < gpu_proof.RELATIVE_ERROR_MAX
    row = np.frombuffer(device.read([(2, 7)]), "<f4")
    assert float(np.linalg.norm(row - theirs[2][7]) / np.linalg.norm(theirs[2][7])) < gpu_proof.ROW_ERROR_MAX
    with pytest.raises(KeyError):
        device.read([(1, 7)])
    device.drop()
    with pytest.raises(KeyError):
        device.read([(2, 7)])


def test_device_answers_records_until_its_pipe_ends() -> None:
    pytest.importorskip("torch")
    multiply, drop = REQUEST.pack(MULTIPLY, b"\x01" * 32, 64, 2, -1, 1), REQUEST.pack(DROP, bytes(32), 0, 0, 0, 0)
    read = REQUEST.pack(READ, bytes(32), 1, 0, 0, 0) + PLACE.pack(2, 9)
    sink = io.BytesIO()
    serve(io.BytesIO(multiply + multiply + read + drop + read + b"half"), sink)
    answers, size = sink.getvalue(), 1 + 4 * 64 * 64
    expected = Device().multiply(b"\x01" * 32, 64, 2, -1, 0)
    assert answers[:size] == answers[size : 2 * size] == bytes([DONE]) + expected.tobytes()
    assert answers[2 * size :] == bytes([DONE]) + expected[9].tobytes() + bytes([DONE, NOT_KEPT])


async def test_device_process_holds_one_challenge_and_gives_its_memory_to_the_next() -> None:
    pytest.importorskip("torch")
    process, seed = DeviceProcess(), b"\x01" * 32
    try:
        first, product = await process.multiply(seed, 64, 3, -1, 2)
        (row,) = await process.read(first, [(3, 5)], 64)
        assert row == product[5].tobytes()
        second, _ = await process.multiply(b"\x02" * 32, 64, 3, -1, 2)
        with pytest.raises(Busy, match="dropped"):
            await process.read(first, [(3, 5)], 64)
        await process.drop(first)  # another's: nothing
        assert len(await process.read(second, [(2, 0), (3, 1)], 64)) == 2
        await process.drop(second)
        with pytest.raises(Busy):
            await process.read(second, [(3, 1)], 64)
    finally:
        await process.close()

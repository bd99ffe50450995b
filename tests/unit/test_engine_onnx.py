"""The tensor engine: batches of strangers, bounds that end a pass and never the daemon, nothing of torch and nothing of the numbers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_corpus
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto as T
from onnx import helper

from gpumarket.core.errors import ConfigError, EngineFailed, ProtocolError
from gpumarket.core.tensor_requests import Tensor, TensorRequest
from gpumarket.core.tensors import SIGNATURE_FILE, Signature, datatype_of
from gpumarket.node.engine.onnx import OnnxEngine
from gpumarket.node.engine.process import EngineProcess
from gpumarket.node.models.store import ModelStore
from gpumarket.node.tensor_work import items_of
from gpumarket.testnet.tensor_models import make_telemetry_anomaly, telemetry


class Sold:
    """A model in a store, its signature, and requests to it."""

    def __init__(self, folder: Path, made: onnx.ModelProto, *, batched: bool = True) -> None:
        (folder / "m.onnx").write_bytes(made.SerializeToString())
        self._open(folder, batched)

    def _open(self, folder: Path, batched: bool) -> None:
        store = ModelStore(folder / "store")
        self.manifest = store.add_onnx(folder / "m.onnx", "m", licence="MIT", batched=batched)
        self.folder, self.signature = store.materialise(self.manifest.digest), store.signature(self.manifest)

    def request(self, **arrays: NDArray[Any]) -> TensorRequest:
        return request(self.signature, arrays)


def request(signature: Signature, arrays: Mapping[str, NDArray[Any]]) -> TensorRequest:
    tensors = tuple(Tensor(name, datatype_of(a.dtype), a.shape, a.tobytes()) for name, a in arrays.items())
    return TensorRequest(tensors, signature.outputs, tensors[0].shape[0] if signature.batched else 0)


async def answer(engine: OnnxEngine | EngineProcess, asked: TensorRequest) -> list[NDArray[Any]]:
    """Whole outputs."""
    batches = [batch async for batch in engine.infer(asked)]
    return [np.concatenate(parts) if asked.rows else parts[0] for parts in zip(*batches, strict=True)]


@asynccontextmanager
async def running(engine: Any) -> AsyncIterator[Any]:
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture
def sold(tmp_path: Path) -> Sold:
    return Sold(tmp_path, onnx_corpus.sound())


def expanding(*, products: int = 0) -> onnx.ModelProto:
    """x expanded to the shape s, which the request sets, then multiplied with itself: how much work it is, only data says."""
    names = [f"h{i}" for i in range(products + 1)]
    nodes = [helper.make_node("Expand", ["x", "s"], ["h0"])]
    nodes += [helper.make_node("MatMul", [a, "h0"], [b]) for a, b in pairwise(names)]
    nodes += [helper.make_node("ReduceMax", [names[-1]], ["y"], keepdims=0)]
    inputs = [onnx_corpus.value("x", T.FLOAT, [1, 1]), onnx_corpus.value("s", T.INT64, [2])]
    return onnx_corpus.model(nodes, inputs=inputs, outputs=[onnx_corpus.value("y", T.FLOAT, [])])


def grown(bomb: Sold, side: int) -> TensorRequest:
    return bomb.request(x=np.ones((1, 1), np.float32) / side, s=np.array([side, side], np.int64))


async def test_requests_at_once_share_passes_and_get_their_own_rows(sold: Sold) -> None:
    async with running(OnnxEngine(sold.folder)) as engine:
        inputs = [np.full((rows, 4), rows, np.float32) for rows in range(1, 12)]
        found = await asyncio.gather(*(answer(engine, sold.request(x=array)) for array in inputs))
        for array, (y,) in zip(inputs, found, strict=True):
            np.testing.assert_array_equal(y, array)
        stats = await engine.stats()
    assert (stats["requests"], stats["rows"], stats["open"]) == (11, 66, 0)
    assert stats["batches"] < 11


async def test_rows_do_not_depend_on_their_batch(tmp_path: Path) -> None:
    make_telemetry_anomaly(tmp_path / "m.onnx")
    made = Sold.__new__(Sold)
    made._open(tmp_path, True)
    readings, _ = telemetry(150, 3)
    async with running(OnnxEngine(made.folder)) as engine:
        whole = await answer(engine, made.request(telemetry=readings))
        alone = [await answer(engine, made.request(telemetry=readings[i : i + 1])) for i in range(0, 150, 10)]
    np.testing.assert_allclose(whole[0][::10], np.concatenate([a[0] for a in alone]), rtol=1e-5)
    np.testing.assert_array_equal(whole[1][::10], np.concatenate([a[1] for a in alone]))


async def test_model_whose_rows_depend_on_each_other_is_refused_and_served_whole(tmp_path: Path) -> None:
    nodes = [helper.make_node("ReduceMean", ["x"], ["m"], axes=[0]), helper.make_node("Sub", ["x", "m"], ["y"])]
    (tmp_path / "rows").mkdir()
    mixing = Sold(tmp_path / "rows", onnx_corpus.model(nodes))
    with pytest.raises(ConfigError, match="depends on the other rows"):
        await OnnxEngine(mixing.folder).start()
    whole = Sold(tmp_path, onnx_corpus.model(nodes), batched=False)
    assert (whole.signature.batched, whole.manifest.max_input_tokens) == (False, 1)
    async with running(OnnxEngine(whole.folder)) as engine:
        (y,) = await answer(engine, whole.request(x=np.arange(8, dtype=np.float32).reshape(2, 4)))
    np.testing.assert_array_equal(y, [[-2] * 4, [2] * 4])


async def test_signature_other_than_the_files_own_is_refused(sold: Sold, tmp_path: Path) -> None:
    folder = tmp_path / "lying"
    folder.mkdir()
    (folder / "model.onnx").write_bytes((sold.folder / "model.onnx").read_bytes())
    (folder / SIGNATURE_FILE).write_bytes((sold.folder / SIGNATURE_FILE).read_bytes().replace(b"FP32", b"FP64"))
    with pytest.raises(ConfigError, match="not the file's own"):
        await OnnxEngine(folder).start()
    (folder / SIGNATURE_FILE).unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        await OnnxEngine(folder).start()
    with pytest.raises(ConfigError, match="sold as float16"):
        await OnnxEngine(sold.folder, compute_dtype="float16").start()


async def test_request_that_does_not_fit_the_model_is_the_clients_fault(sold: Sold) -> None:
    async with running(OnnxEngine(sold.folder)) as engine:
        for arrays in ({"x": np.zeros((2, 5), np.float32)}, {"x": np.zeros((2, 4))}, {"z": np.zeros((2, 4), np.float32)}):
            with pytest.raises(ProtocolError):
                await answer(engine, sold.request(**arrays))
        with pytest.raises(ProtocolError, match="no output"):
            await answer(
                engine, request(Signature(sold.signature.inputs, sold.signature.inputs, True), {"x": np.zeros((2, 4), np.float32)})
            )


def test_modules_of_the_engine_process_load_no_torch() -> None:
    code = "import sys, gpumarket.node.engine.serve, gpumarket.node.engine.onnx; print('torch' in sys.modules, 'onnx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


async def test_engine_process_serves_the_same_as_the_engine(sold: Sold) -> None:
    array = np.random.default_rng(1).normal(0, 1, (200, 4)).astype(np.float32)
    async with running(EngineProcess("onnx", sold.folder)) as process:
        (y,) = await answer(process, sold.request(x=array))
        stats = await process.stats()
    np.testing.assert_array_equal(y, np.maximum(array, 0))
    assert (stats["device"], stats["task"]) == ("cpu", "infer") and process.task == "infer"


async def test_pass_that_wants_more_memory_than_is_granted_fails_and_the_next_one_is_served(tmp_path: Path) -> None:
    bomb = Sold(tmp_path, expanding())
    async with running(EngineProcess("onnx", bomb.folder, options={"memory_mib": 1024})) as process:
        with pytest.raises(EngineFailed) as failed:
            await answer(process, grown(bomb, 1 << 17))
        assert failed.value.retryable
        await process.start()  # as its seat does, should the process have ended
        (y,) = await answer(process, grown(bomb, 10))
        assert y == pytest.approx(0.1)


async def test_pass_that_takes_too_long_ends_its_process_and_another_is_started(tmp_path: Path) -> None:
    bomb = Sold(tmp_path, expanding(products=3))
    async with running(EngineProcess("onnx", bomb.folder, options={"pass_seconds": 1})) as process:
        pid = process.pid
        with pytest.raises(EngineFailed, match=r"did not end|took longer"):
            await answer(process, grown(bomb, 12_000))
        await process.start()
        (y,) = await answer(process, grown(bomb, 4))
        assert y == pytest.approx(0.25)
        assert (await process.stats())["starts"] == 1 + (process.pid != pid)


async def test_client_that_leaves_interrupts_the_pass_that_nobody_waits_for(tmp_path: Path) -> None:
    slow = Sold(tmp_path, expanding(products=400))
    async with running(EngineProcess("onnx", slow.folder, options={"pass_seconds": 300})) as process:
        async with aclosing(process.infer(grown(slow, 1_500))) as answers:
            waiting = asyncio.ensure_future(anext(answers))
            for _ in range(500):
                if (await process.stats())["open"]:
                    break
            await asyncio.sleep(0.5)
            waiting.cancel()
            await asyncio.wait([waiting])
        (y,) = await answer(process, grown(slow, 4))
        stats = await process.stats()
    assert y == pytest.approx(0.25)
    assert (stats["interrupted"], stats["open"], stats["starts"]) == (1, 0, 1)


async def test_failure_of_a_pass_tells_nothing_of_the_numbers(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gather", ["x", "i"], ["y"])]
    inputs = [onnx_corpus.value("x", T.FLOAT, [4]), onnx_corpus.value("i", T.INT64, [1])]
    made = Sold(tmp_path, onnx_corpus.model(nodes, inputs=inputs, outputs=[onnx_corpus.value("y", T.FLOAT, [1])]))
    async with running(EngineProcess("onnx", made.folder)) as process:
        with pytest.raises(EngineFailed) as failed:
            await answer(process, made.request(x=np.zeros(4, np.float32), i=np.array([31337], np.int64)))
    assert "31337" not in failed.value.message + failed.value.hint


async def test_device_that_is_there_and_cannot_be_used_is_an_error(sold: Sold, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(EngineFailed, match="CUDA"):
        await OnnxEngine(sold.folder).start()


@pytest.mark.parametrize(
    "batch",
    [
        (np.zeros((2, 4), np.float64),),
        (np.zeros((2, 5), np.float32),),
        (np.zeros((0, 4), np.float32),),
        (np.zeros((9, 4), np.float32),),
        (np.zeros(4, np.float32),),
        (np.zeros((2, 4), np.float32),) * 2,
        (),
    ],
)
def test_arrays_of_an_engine_that_are_not_what_was_asked_for_are_its_failure(sold: Sold, batch: tuple[NDArray[Any], ...]) -> None:
    with pytest.raises(EngineFailed):
        list(items_of(sold.request(x=np.zeros((8, 4), np.float32)), batch))

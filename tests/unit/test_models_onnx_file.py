"""Model files of strangers: each of the corpus refused for its own reason before onnxruntime is handed a byte, and sound ones taken."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_corpus
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto as T
from onnx import helper

from gpumarket.core.errors import ConfigError
from gpumarket.core.tensors import SIGNATURE_FILE, TensorSpec, signature_to_json
from gpumarket.node.engine.onnx import OnnxEngine
from gpumarket.node.models import onnx_file, onnx_schema
from gpumarket.node.models.onnx_file import RefusedModel, read_onnx
from gpumarket.node.models.store import ModelStore

CANARY = Path(tempfile.gettempdir()) / "gpumarket-canary"
CASES = onnx_corpus.corpus(CANARY)


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counter[str]:
    """Counts what must not happen: a session of onnxruntime, a socket, a canary."""
    counts: Counter[str] = Counter()

    def session(*_: Any, **__: Any) -> None:
        counts["onnxruntime"] += 1

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: counts.update(["socket"]))
    return counts


def test_corpus_is_large_and_knows_many_reasons() -> None:
    assert len(CASES) >= 80
    assert len({reason for reason, _ in CASES.values()}) >= 30


@pytest.mark.parametrize("name", CASES)
async def test_hostile_file_is_refused_for_its_own_reason_and_nothing_runs(name: str, handed: Counter[str], tmp_path: Path) -> None:
    reason, raw = CASES[name]
    with pytest.raises(RefusedModel) as refused:
        read_onnx(raw)
    assert refused.value.reason == reason, refused.value.message
    assert reason in refused.value.message and refused.value.hint

    file, store = tmp_path / "evil.onnx", ModelStore(tmp_path / "store")
    file.write_bytes(raw)
    with pytest.raises(RefusedModel):
        store.add_onnx(file, "evil", licence="MIT")
    assert store.list() == () and not (tmp_path / "store").exists()

    folder = tmp_path / "sold"  # as a provider's own store may hold it, by whatever way it came there
    await asyncio.to_thread(folder.mkdir)
    (folder / "model.onnx").write_bytes(raw)
    (folder / SIGNATURE_FILE).write_bytes(signature_to_json(read_onnx(onnx_corpus.sound().SerializeToString()).signature))
    engine = OnnxEngine(folder)
    with pytest.raises(RefusedModel):
        await engine.start()
    await engine.close()
    assert not handed and not CANARY.exists()


def test_file_over_the_limit_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "FILE_BYTES_MAX", 10)
    with pytest.raises(RefusedModel) as refused:
        read_onnx(onnx_corpus.sound().SerializeToString())
    assert refused.value.reason == "too-large"


def test_sound_file_gives_its_signature() -> None:
    found = read_onnx(onnx_corpus.sound().SerializeToString())
    assert found.signature.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    assert found.signature.outputs == (TensorSpec("y", "FP32", (-1, 4)),)
    assert (found.signature.batched, found.dtype, found.opset) == (True, "float32", onnx_corpus.OPSET)


def relu(shape_in: list[Any], shape_out: list[Any], kind: int = T.FLOAT) -> bytes:
    node = helper.make_node("Relu", ["x"], ["y"])
    made = onnx_corpus.model([node], inputs=[onnx_corpus.value("x", kind, shape_in)], outputs=[onnx_corpus.value("y", kind, shape_out)])
    return made.SerializeToString()


@pytest.mark.parametrize(
    ("shape_in", "shape_out", "batched"),
    [
        (["n", 4], ["n", 4], True),
        ([None, 4], [None, 4], True),
        (["n", "seq"], ["n", "seq"], True),
        (["n"], ["n"], True),
        ([1, 4], [1, 4], False),
        (["n", 4], ["m", 4], False),
        (["n", 4], ["n", "found"], False),
        ([], [], False),
    ],
)
def test_batch_dimension_is_common_or_there_is_none(shape_in: list[Any], shape_out: list[Any], batched: bool) -> None:
    assert read_onnx(relu(shape_in, shape_out)).signature.batched is batched


def test_half_precision_is_read_from_the_file() -> None:
    assert read_onnx(relu(["n", 4], ["n", 4], T.FLOAT16)).dtype == "float16"


def test_weights_listed_as_inputs_by_old_files_are_no_inputs() -> None:
    made = onnx_corpus.sound()
    made.graph.input.append(onnx_corpus.value("w", T.FLOAT, [4, 4]))
    assert [spec.name for spec in read_onnx(made.SerializeToString()).signature.inputs] == ["x"]


def test_weights_outside_raw_data_are_counted() -> None:
    made = onnx_corpus.sound()
    made.graph.initializer[0].CopyFrom(helper.make_tensor("w", T.FLOAT, [4, 4], [0.5] * 16))
    assert read_onnx(made.SerializeToString()).signature.batched


def test_schema_lists_every_field_of_onnx() -> None:
    """Fields that it does not list are refused, too; but then nobody thought about them."""
    pairs: dict[str, Any] = {
        "Model": onnx.ModelProto, "Graph": onnx.GraphProto, "Node": onnx.NodeProto, "Attribute": onnx.AttributeProto,
        "Tensor": onnx.TensorProto,
        "ValueInfo": onnx.ValueInfoProto, "Type": onnx.TypeProto, "TensorType": onnx.TypeProto.Tensor, "Shape": onnx.TensorShapeProto,
        "Dimension": onnx.TensorShapeProto.Dimension, "Opset": onnx.OperatorSetIdProto, "Entry": onnx.StringStringEntryProto,
    }  # fmt: skip
    assert pairs.keys() == onnx_schema.SCHEMAS.keys()
    for name, message in pairs.items():
        expected = {f.number: (f.name, f.is_repeated) for f in message.DESCRIPTOR.fields}
        assert {number: (f.name, f.repeated) for number, f in onnx_schema.SCHEMAS[name].items()} == expected, name


def test_served_operators_exist_and_the_refused_are_not_among_them() -> None:
    for domain, served in onnx_schema.OPERATORS.items():
        assert served <= {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == domain}
        for refused in (onnx_schema.CONTROL_FLOW, onnx_schema.RANDOM, onnx_schema.STRINGS, onnx_schema.SEQUENCES):
            assert not served & refused


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_bent_bytes_are_refused_or_mean_the_same_to_onnx(data: st.DataObject) -> None:
    """What passes must be what the library reads: same inputs, outputs, operators and weights."""
    raw = bytearray(onnx_corpus.sound().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"])):
            case "flip":
                raw[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del raw[at : at + data.draw(st.integers(1, 9))]
            case "insert":
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=6))
            case "repeat":
                raw[at:at] = raw[at : at + data.draw(st.integers(1, 60))]
        if not raw:
            return
    try:
        found = read_onnx(bytes(raw))
    except ConfigError:
        return
    theirs = onnx.ModelProto.FromString(bytes(raw))
    assert [s.name for s in found.signature.outputs] == [v.name for v in theirs.graph.output]
    weights = {w.name for w in theirs.graph.initializer}
    assert [s.name for s in found.signature.inputs] == [v.name for v in theirs.graph.input if v.name not in weights]
    assert all(node.op_type in onnx_schema.OPERATORS[""] for node in theirs.graph.node)
    for tensor in theirs.graph.initializer:
        assert len(tensor.raw_data) in (0, int(np.prod(tensor.dims)) * 4) or tensor.data_type != T.FLOAT


numbers = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9).map(lambda values: np.array(values, np.int64)),
    st.lists(st.floats(width=32), max_size=9).map(lambda values: np.array(values, np.float32)),
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["Expand", "Tile", "Pad", "Resize", "Upsample", "Range", "OneHot", "ConstantOfShape", "Col2Im", "DFT"]), st.data())
def test_shapes_of_any_numbers_are_refused_or_read_and_never_break_the_reader(operator: str, data: st.DataObject) -> None:
    """And what passes is not larger than what is served, as far as the file says."""
    arrays = [data.draw(numbers) for _ in range(3)]
    weights = [onnx_corpus.weight(name, array) for name, array in zip("abc", arrays, strict=True)]
    inputs = data.draw(st.permutations(["x", "a", "b", "c"]))[: data.draw(st.integers(1, 4))]
    try:
        read_onnx(onnx_corpus.one(operator, inputs, weights=weights))
    except RefusedModel:
        return
    if operator == "ConstantOfShape" and inputs[0] != "x" and arrays["abc".index(inputs[0])].dtype == np.int64:
        assert np.prod(np.maximum(arrays["abc".index(inputs[0])], 1).astype(object)) <= onnx_file.ELEMENTS_MAX


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused_or_read_and_never_break_the_reader(raw: bytes) -> None:
    with pytest.raises(RefusedModel):
        read_onnx(raw)

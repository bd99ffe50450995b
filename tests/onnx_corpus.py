"""Hostile model files, made on the spot: name → (why it must be refused, the bytes). And a sound one to bend.

Each is wrong in one place. `canary` is a file that the ones which carry code would leave, were any of it run.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

OPSET = 17
Case = tuple[str, bytes]


class Touch:
    """Unpickled, it leaves the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.canary), "w")


def value(name: str, kind: int = T.FLOAT, shape: list[Any] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, ["n", 4] if shape is None else shape)


def weight(name: str, array: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def model(
    nodes: list[onnx.NodeProto],
    *,
    inputs: list[onnx.ValueInfoProto] | None = None,
    outputs: list[onnx.ValueInfoProto] | None = None,
    weights: list[onnx.TensorProto] | None = None,
    opsets: dict[str, int] | None = None,
    **more: Any,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs or [value("x")], outputs or [value("y")], weights or [])
    imports = [helper.make_opsetid(domain, version) for domain, version in (opsets or {"": OPSET}).items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, **more)


def sound() -> onnx.ModelProto:
    """y = relu(x @ w): x FP32 [n, 4] to y FP32 [n, 4]."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    return model(nodes, weights=[weight("w", np.eye(4, dtype=np.float32))])


def bent(bend: Callable[[onnx.ModelProto], Any]) -> bytes:
    """The sound model after one change."""
    made = sound()
    bend(made)
    return made.SerializeToString()


def one(operator: str, inputs: list[str], *, weights: list[onnx.TensorProto] | None = None, domain: str = "", **attributes: Any) -> bytes:
    """A model of one node."""
    node = helper.make_node(operator, inputs, ["y"], domain=domain, **attributes)
    opsets = {"": OPSET, domain: 1} if domain else None
    return model([node], weights=weights, opsets=opsets).SerializeToString()


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field on the wire."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def corpus(canary: Path) -> dict[str, Case]:
    """All of them."""
    return {
        **foreign_files(canary),
        **wire(),
        **headers(),
        **external(canary),
        **tensors(),
        **graphs(),
        **operators(),
        **bombs(),
        **edges(),
    }


def foreign_files(canary: Path) -> dict[str, Case]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Touch(canary)))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return {
        "a pickle": ("not-onnx", pickle.dumps(Touch(canary))),
        "an old pickle": ("not-onnx", pickle.dumps(Touch(canary), protocol=2)),
        "a torch archive": ("not-onnx", archive.getvalue()),
        "safetensors": ("not-onnx", len(header).to_bytes(8, "little") + header + bytes(4)),
        "gzip": ("not-onnx", gzip.compress(sound().SerializeToString())),
        "a program": ("not-onnx", b"\x7fELF" + bytes(60)),
        "an ort file": ("not-onnx", b"ORTM" + bytes(60)),
        "nothing": ("not-onnx", b""),
        "text": ("malformed", b"this is not a model at all\n" * 20),
        "noise": ("malformed", b"\x08" + b"\xff" * 40),
    }


def wire() -> dict[str, Case]:
    good = sound().SerializeToString()
    return {
        "truncated": ("malformed", good[:-7]),
        "two graphs, which a library would merge": ("repeated-field", good + field(7, sound().graph.SerializeToString())),
        "a group": ("malformed", good + bytes([7 << 3 | 3, 7 << 3 | 4])),
        "a field that onnx does not have": ("unknown-field", good + field(99, b"x")),
        "a name that is no UTF-8": ("malformed", good + field(6, b"\xff\xfe")),
        "too many messages": ("too-many-messages", good + field(14, b"") * 400_001),
        "too many numbers": ("too-many-numbers", _many_numbers()),
    }


def _many_numbers() -> bytes:
    node = helper.make_node("Relu", ["x"], ["y"]).SerializeToString()
    attribute = field(1, b"ints") + varint(20 << 3) + varint(7) + field(8, bytes(2_000_001))
    return (
        varint(1 << 3)
        + varint(8)
        + field(8, field(1, b"") + varint(2 << 3) + varint(OPSET))
        + field(7, field(1, node + field(5, attribute)))
    )


def headers() -> dict[str, Case]:
    function = helper.make_function(
        "own", "F", ["a"], ["b"], [helper.make_node("F", ["a"], ["b"], domain="own")], [helper.make_opsetid("own", 1)]
    )
    return {
        "no graph": ("no-graph", bent(lambda m: m.ClearField("graph"))),
        "no nodes": ("no-graph", bent(lambda m: m.graph.ClearField("node"))),
        "an IR of the future": ("ir-version", bent(lambda m: setattr(m, "ir_version", 99))),
        "an opset of the future": ("opset", bent(lambda m: setattr(m.opset_import[0], "version", 1_000))),
        "no opset": ("opset", bent(lambda m: m.ClearField("opset_import"))),
        "two opsets": ("duplicate-name", bent(lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 7)))),
        "an import of a custom domain": ("custom-domain", bent(lambda m: m.opset_import.append(helper.make_opsetid("com.evil", 1)))),
        "microsoft's own operators": ("custom-domain", one("Inverse", ["x"], domain="com.microsoft")),
        "a function that calls itself": ("local-functions", bent(lambda m: m.functions.append(function))),
        "a training graph": ("training", bent(lambda m: m.training_info.add())),
        "settings for onnxruntime": ("runtime-settings", bent(lambda m: m.metadata_props.add(key="ort_config", value="{}"))),
    }


def external(canary: Path) -> dict[str, Case]:
    places = {"beside it": "weights.bin", "above it": "../../../etc/passwd", "absolute": str(canary), "in memory": "*/_ORT_MEM_ADDR_/*"}

    def moved(location: str) -> bytes:
        def bend(made: onnx.ModelProto) -> None:
            tensor = made.graph.initializer[0]
            tensor.ClearField("raw_data")
            tensor.data_location = T.EXTERNAL
            tensor.external_data.add(key="location", value=location)

        return bent(bend)

    found = {f"external data {where}": ("external-data", moved(location)) for where, location in places.items()}
    found["external data, called internal"] = (
        "external-data",
        bent(lambda m: m.graph.initializer[0].external_data.add(key="location", value="x")),
    )
    hidden = T(data_type=T.FLOAT, dims=[4], data_location=T.EXTERNAL)
    hidden.external_data.add(key="location", value="/etc/passwd")
    found["external data in an attribute"] = (
        "external-data",
        model([helper.make_node("Constant", [], ["y"], value=hidden)]).SerializeToString(),
    )
    return found


def tensors() -> dict[str, Case]:
    def tensor(**fields: Any) -> bytes:
        def bend(made: onnx.ModelProto) -> None:
            made.graph.initializer[0].CopyFrom(T(**{"name": "w", "data_type": T.FLOAT, **fields}))

        return bent(bend)

    return {
        "a weight that claims the whole memory": ("giant-tensor", tensor(dims=[1 << 40, 1 << 20])),
        "a weight that claims a little too much": ("tensor-size", tensor(dims=[4, 5], raw_data=bytes(64))),
        "a weight of negative size": ("tensor-shape", tensor(dims=[-4, -4], raw_data=bytes(64))),
        "a weight of nine dimensions": ("tensor-shape", tensor(dims=[1] * 9, raw_data=bytes(4))),
        "a weight with data in two places": ("tensor-size", tensor(dims=[1], raw_data=bytes(4), float_data=[1.0])),
        "a weight with data of another type": ("tensor-size", tensor(dims=[1], int64_data=[1])),
        "a weight of strings": ("strings", tensor(data_type=T.STRING, dims=[1], string_data=[b"x"])),
        "a weight of complex numbers": ("tensor-type", tensor(data_type=T.COMPLEX64, dims=[2], float_data=[0.0] * 4)),
        "a part of a weight": ("tensor-segment", tensor(dims=[1], raw_data=bytes(4), segment=T.Segment(begin=0, end=1))),
        "sparse weights": ("sparse", bent(lambda m: m.graph.sparse_initializer.add())),
    }


def graphs() -> dict[str, Case]:
    relu = helper.make_node
    circle = [relu("Add", ["x", "b"], ["a"]), relu("Relu", ["a"], ["b"]), relu("Relu", ["b"], ["y"])]
    return {
        "a circle": ("cycle", model(circle).SerializeToString()),
        "a value made twice": ("duplicate-name", model([relu("Relu", ["x"], ["y"])] * 2).SerializeToString()),
        "an input made again": ("duplicate-name", model([relu("Relu", ["x"], ["x"]), relu("Relu", ["x"], ["y"])]).SerializeToString()),
        "a value from nowhere": ("undefined-name", model([relu("Add", ["x", "z"], ["y"])]).SerializeToString()),
        "an output from nowhere": ("undefined-name", model([relu("Relu", ["x"], ["z"])]).SerializeToString()),
        "two inputs of one name": (
            "duplicate-name",
            model([relu("Relu", ["x"], ["y"])], inputs=[value("x"), value("x")]).SerializeToString(),
        ),
        "too many nodes": ("too-many-nodes", _chain(20_001)),
        "too many weights": ("too-many-initializers", _weights(20_001)),
        "too many inputs of a node": ("too-many-edges", one("Sum", ["x"] * 513)),
        "a name of a megabyte": ("bad-name", bent(lambda m: _rename(m, "y" * 1_000_000))),
        "a name of control characters": ("bad-name", bent(lambda m: _rename(m, "y\x1b[2J"))),
    }


def _rename(made: onnx.ModelProto, name: str) -> None:
    made.graph.node[1].output[0] = made.graph.output[0].name = name


def _chain(count: int) -> bytes:
    names = ["x", *(f"v{i}" for i in range(count - 1)), "y"]
    return model([helper.make_node("Relu", [a], [b]) for a, b in pairwise(names)]).SerializeToString()


def _weights(count: int) -> bytes:
    return model(
        [helper.make_node("Relu", ["x"], ["y"])], weights=[weight(f"w{i}", np.float32(0)) for i in range(count)]
    ).SerializeToString()


def operators() -> dict[str, Case]:
    body = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])], "body", [], [value("b")])
    deep = body
    for _ in range(12):
        deep = helper.make_graph([helper.make_node("If", ["c"], ["b"], then_branch=deep, else_branch=body)], "deep", [], [value("b")])
    yes = weight("c", np.array(True))
    return {
        "a loop": ("control-flow", one("Loop", ["", "c", "x"], weights=[yes], body=body)),
        "a scan": ("control-flow", one("Scan", ["x"], body=body, num_scan_inputs=1)),
        "a branch in a branch in a branch": ("control-flow", one("If", ["c"], weights=[yes], then_branch=deep, else_branch=body)),
        "a graph in an honest operator": ("subgraph", one("Relu", ["x"], hidden=body)),
        "random numbers": ("random", one("RandomNormalLike", ["x"])),
        "a dropout in training": ("random", one("Dropout", ["x", "r", "c"], weights=[weight("r", np.float32(0.5)), yes])),
        "a batch normalization in training": ("training", _training_norm()),
        "work on strings": ("strings", one("StringNormalizer", ["x"])),
        "labels of strings": ("strings", _string_labels()),
        "a sequence": ("sequences", one("SequenceConstruct", ["x"])),
        "a map": ("sequences", one("ZipMap", ["x"], domain="ai.onnx.ml")),
        "an operator of nobody": ("unknown-operator", one("Exfiltrate", ["x"], library="/tmp/evil.so")),
        "a decoder of image files": ("unknown-operator", one("ImageDecoder", ["x"])),
        "an operator of a custom domain": ("custom-domain", one("Evil", ["x"], domain="com.evil")),
        "a domain that is not imported": ("custom-domain", bent(lambda m: setattr(m.graph.node[0], "domain", "com.evil"))),
        "a function's attribute": ("local-functions", bent(lambda m: m.graph.node[1].attribute.add(name="a", ref_attr_name="b", type=1))),
    }


def _training_norm() -> bytes:
    four = [weight(name, np.ones(4, np.float32)) for name in "sbmv"]
    return one("BatchNormalization", ["x", *"sbmv"], weights=four, training_mode=1)


def _string_labels() -> bytes:
    node = helper.make_node("LabelEncoder", ["x"], ["y"], domain="ai.onnx.ml", keys_floats=[1.0], values_strings=["a"])
    return model([node], opsets={"": OPSET, "ai.onnx.ml": 2}).SerializeToString()


def bombs() -> dict[str, Case]:
    def shaped(operator: str, numbers: list[int], *before: str) -> bytes:
        return one(operator, [*before, "s"], weights=[weight("s", np.array(numbers, np.int64))])

    huge = [1 << 20, 1 << 20]
    tiles = [helper.make_node("Tile", [f"t{i}", "s"], [f"t{i + 1}"]) for i in range(6)]
    chain = model(
        [*tiles, helper.make_node("Identity", ["t6"], ["y"])],
        weights=[weight("t0", np.ones((1, 1), np.float32)), weight("s", np.array([100, 100], np.int64))],
    )
    outer = [helper.make_node("Mul", ["a", "b"], ["y"])]
    long = 1 << 16
    sides = [weight("a", np.ones((long, 1), np.float32)), weight("b", np.ones((1, long), np.float32))]
    ranges = [weight(name, np.int64(number)) for name, number in (("a", 0), ("b", 1 << 40), ("d", 1))]
    literal = [helper.make_node("Constant", [], ["s"], value_ints=huge), helper.make_node("Expand", ["x", "s"], ["y"])]
    return {
        "a constant of a terabyte": ("growth-bomb", shaped("ConstantOfShape", huge)),
        "an expansion to a terabyte": ("growth-bomb", shaped("Expand", huge, "x")),
        "an expansion by a literal": ("growth-bomb", model(literal).SerializeToString()),
        "tiles upon tiles": ("growth-bomb", chain.SerializeToString()),
        "an endless range": ("growth-bomb", one("Range", ["a", "b", "d"], weights=ranges)),
        "a range without a step": ("growth-bomb", one("Range", ["a", "b", "d"], weights=[*ranges[:2], weight("d", np.int64(0))])),
        "an endless expansion": ("growth-bomb", one("Expand", ["x", "s"], weights=[weight("s", np.array([np.inf], np.float32))])),
        "a picture blown up without end": (
            "growth-bomb",
            one("Resize", ["x", "", "f"], weights=[weight("f", np.full(2, 3e38, np.float32))]),
        ),
        "a border of a terabyte": ("growth-bomb", shaped("Pad", [1 << 30, 1 << 30, 0, 0], "x")),
        "an outer product of weights": ("growth-bomb", model(outer, weights=sides).SerializeToString()),
        "a blown up picture": ("growth-bomb", one("Resize", ["x", "", "f"], weights=[weight("f", np.array([1e6, 1e6], np.float32))])),
        "a kernel that never ends": ("growth-bomb", one("AveragePool", ["x"], kernel_shape=[1 << 30, 1 << 30])),
        "one of a trillion": (
            "growth-bomb",
            one("OneHot", ["x", "s", "v"], weights=[weight("s", np.int64(1 << 40)), weight("v", np.zeros(2, np.float32))]),
        ),
    }


def edges() -> dict[str, Case]:
    def of_type(make: Callable[[], onnx.TypeProto], side: str) -> bytes:
        def bend(made: onnx.ModelProto) -> None:
            getattr(made.graph, side)[0].type.CopyFrom(make())

        return bent(bend)

    tensor = helper.make_tensor_type_proto(T.FLOAT, [1])
    return {
        "an output that is a sequence": ("sequence-output", of_type(lambda: helper.make_sequence_type_proto(tensor), "output")),
        "an output that is a map": ("map-output", of_type(lambda: helper.make_map_type_proto(T.INT64, tensor), "output")),
        "an optional output": ("optional-output", of_type(lambda: helper.make_optional_type_proto(tensor), "output")),
        "a sparse input": ("sparse-input", of_type(lambda: helper.make_sparse_tensor_type_proto(T.FLOAT, [1]), "input")),
        "an input of strings": ("strings", of_type(lambda: helper.make_tensor_type_proto(T.STRING, ["n"]), "input")),
        "an input of bfloat16": ("input-type", of_type(lambda: helper.make_tensor_type_proto(T.BFLOAT16, ["n"]), "input")),
        "an input without a shape": ("input-shape", of_type(lambda: helper.make_tensor_type_proto(T.FLOAT, None), "input")),
        "an input of a negative size": ("input-shape", of_type(lambda: helper.make_tensor_type_proto(T.FLOAT, ["n", -3]), "input")),
        "an input of a terabyte": (
            "giant-tensor",
            of_type(lambda: helper.make_tensor_type_proto(T.FLOAT, ["n", 1 << 20, 1 << 20]), "input"),
        ),
        "no input": ("no-signature", bent(_without_input)),
        "too many outputs": ("too-many-outputs", bent(lambda m: m.graph.output.extend([value(f"y{i}") for i in range(65)]))),
    }


def _without_input(made: onnx.ModelProto) -> None:
    made.graph.ClearField("input")
    made.graph.node[0].input[0] = "w"

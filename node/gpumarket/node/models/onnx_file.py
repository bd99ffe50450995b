"""An ONNX file, judged before onnxruntime opens it: read strictly, refused by name, or turned into the signature of a model.

Attackers: whoever publishes a model. A file may point at other files, bring operators or functions of its own, claim memory that nobody
has, or mean one thing here and another in the library that runs it. Invariant: what passes holds all of its data, runs each of its nodes
once, and uses operators of OPERATORS alone. What only data decides (the size of a NonZero, say) is bounded by the engine process instead.
Must never import onnx or onnxruntime.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Final

from gpumarket.core.errors import ConfigError, ProtocolError
from gpumarket.core.tensors import DTYPES, NAME_LENGTH_MAX, RANK_MAX, TENSORS_MAX, Signature, TensorSpec
from gpumarket.node.models import onnx_schema as schema
from gpumarket.node.models.onnx_growth import Growth, GrowthError
from gpumarket.node.models.protobuf_reader import Limits, Message, Reader, WireError

FILE_BYTES_MAX: Final = 512 * 1024 * 1024
NODES_MAX: Final = 20_000
INITIALIZERS_MAX: Final = 20_000
EDGES_MAX: Final = 512
"""Inputs, or outputs, or attributes of one node."""
LIMITS: Final = Limits(messages=400_000, numbers=2_000_000)
ELEMENTS_MAX: Final = 1 << 28
"""Elements of one tensor that the file fixes: 1 GiB of float32."""
_VIEWED: Final = {"float_data": 4, "double_data": 8}
_PLACES: Final = {"FP32": "float_data", "FP64": "double_data", "INT64": "int64_data", "UINT32": "uint64_data", "UINT64": "uint64_data"}
"""Datatype → where its elements are when they are not raw; int32_data for the others."""
_FOREIGN: Final = (
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"PK\x03\x04", "a zip archive, as torch.save makes them"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"ORTM", "an onnxruntime (.ort) file"),
    (b"\x7fELF", "a program"),
)


class RefusedModel(ConfigError):
    """A model file that is not served. `reason` is one word for why."""

    def __init__(self, reason: str, detail: str, *, hint: str = "export the model again, with standard operators and its weights inside"):
        super().__init__(f"the model file is refused ({reason}): {detail}", hint=hint)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """What a file that passed declares. `dtype` is the computation's: float16 where a tensor of the file is, else float32."""

    signature: Signature
    dtype: str
    opset: int


def read_onnx(raw: bytes) -> OnnxModel:
    """Judge a whole file. Raises RefusedModel."""
    if len(raw) > FILE_BYTES_MAX:
        raise RefusedModel("too-large", f"{len(raw)} bytes; at most {FILE_BYTES_MAX} are served")
    _refuse_foreign(raw)
    try:
        model = Reader(schema.SCHEMAS, LIMITS).read(memoryview(raw), "Model")
    except WireError as error:
        raise RefusedModel(error.reason, str(error)) from error
    opset = _header(model)
    graph = model["graph"]
    _bounds(graph)
    weights = _weights(graph)
    _names(graph, weights)
    growth = Growth(ELEMENTS_MAX, {t["name"]: t for t in graph.get("initializer", ())})
    for node in graph["node"]:
        _node(node)
        try:
            growth.follow(node)
        except GrowthError as error:
            raise RefusedModel("growth-bomb", str(error)) from error
    signature = _signature(graph, weights.keys())
    datatypes = {*weights.values(), *(spec.datatype for spec in (*signature.inputs, *signature.outputs))}
    return OnnxModel(signature, "float16" if "FP16" in datatypes else "float32", opset)


def _refuse_foreign(raw: bytes) -> None:
    for magic, what in _FOREIGN:
        if raw.startswith(magic):
            raise RefusedModel("not-onnx", f"it is {what}")
    if len(raw) >= 9 and raw[8:9] == b"{" and int.from_bytes(raw[:8], "little") < len(raw):
        raise RefusedModel("not-onnx", "it is a safetensors file")
    if not raw:
        raise RefusedModel("not-onnx", "it is empty")


def _header(model: Message) -> int:
    """The opset of the default domain."""
    for field, reason, what in (
        ("functions", "local-functions", "it brings functions of its own"),
        ("training_info", "training", "it holds a training graph"),
        ("configuration", "device-configuration", "it names devices to run on"),
    ):
        if field in model:
            raise RefusedModel(reason, what)
    if "graph" not in model:
        raise RefusedModel("no-graph", "there is no graph in it")
    least, most = schema.IR_VERSIONS
    if not least <= model.get("ir_version", 0) <= most:
        raise RefusedModel("ir-version", f"IR version {model.get('ir_version', 0)}; {least} to {most} are read")
    if any(entry.get("key", "").startswith("ort_config") for entry in model.get("metadata_props", ())):
        raise RefusedModel("runtime-settings", "it brings settings for onnxruntime")
    found: dict[str, int] = {}
    for entry in model.get("opset_import", ()):
        domain, version = entry.get("domain", ""), entry.get("version", 0)
        if domain not in schema.OPSETS:
            raise RefusedModel("custom-domain", f"operators of domain {domain[:60]!r}")
        key = "" if domain == "ai.onnx" else domain
        if key in found:
            raise RefusedModel("duplicate-name", f"two versions of domain {domain!r}")
        least, most = schema.OPSETS[domain]
        if not least <= version <= most:
            raise RefusedModel("opset", f"opset {version} of domain {domain!r}; {least} to {most} are served")
        found[key] = version
    if "" not in found:
        raise RefusedModel("opset", "it imports no standard operators")
    return found[""]


def _bounds(graph: Message) -> None:
    for field, reason, what in (
        ("sparse_initializer", "sparse", "sparse weights"),
        ("quantization_annotation", "quantization-annotation", "quantization annotations; use QuantizeLinear nodes"),
    ):
        if field in graph:
            raise RefusedModel(reason, what)
    counts = (("node", NODES_MAX), ("initializer", INITIALIZERS_MAX), ("input", INITIALIZERS_MAX + TENSORS_MAX), ("output", TENSORS_MAX))
    for field, most in counts:
        if len(graph.get(field, ())) > most:
            raise RefusedModel(f"too-many-{field}s", f"{len(graph[field])} {field}s; at most {most} are served")
    if not graph.get("node"):
        raise RefusedModel("no-graph", "the graph has no nodes")


# --- tensors -------------------------------------------------------------------------------------------------------------------


def _weights(graph: Message) -> dict[str, str]:
    """Datatype of each initializer by its name."""
    found: dict[str, str] = {}
    for tensor in graph.get("initializer", ()):
        name = _named(tensor, "initializer")
        if name in found:
            raise RefusedModel("duplicate-name", f"{name!r} is made twice")
        found[name] = _tensor(tensor)
    return found


def _tensor(tensor: Message) -> str:
    """The datatype of a tensor of the file whose data is there to the byte."""
    if tensor.get("data_location", 0) or "external_data" in tensor:
        raise RefusedModel("external-data", "a weight lies in another file", hint="save the model as one file, its weights inside")
    if "segment" in tensor:
        raise RefusedModel("tensor-segment", "a weight is only a part of a tensor")
    kind = tensor.get("data_type", 0)
    if kind == schema.STRING_TYPE or "string_data" in tensor:
        raise RefusedModel("strings", "a weight of strings")
    if kind not in schema.DATATYPES:
        raise RefusedModel("tensor-type", f"a weight of data type {kind}, which is not served")
    datatype = schema.DATATYPES[kind]
    dims = tensor.get("dims", [])
    if len(dims) > RANK_MAX or any(size < 0 for size in dims):
        raise RefusedModel("tensor-shape", f"a weight of {len(dims)} dimensions, or with a negative one")
    elements = math.prod(dims)
    if elements > ELEMENTS_MAX:
        raise RefusedModel("giant-tensor", f"a weight of {elements} elements; at most {ELEMENTS_MAX} are served")
    if _stored(tensor, datatype) != elements:
        raise RefusedModel("tensor-size", f"a weight of {elements} elements, whose data holds {_stored(tensor, datatype)}")
    return datatype


def _stored(tensor: Message, datatype: str) -> float:
    """Elements whose data is in the file."""
    places = [name for name in ("raw_data", *_VIEWED, "int32_data", "int64_data", "uint64_data") if name in tensor]
    if not places:
        return 0
    if len(places) > 1 or places[0] not in ("raw_data", _PLACES.get(datatype, "int32_data")):
        raise RefusedModel("tensor-size", f"a weight of {datatype} with its data in {' and '.join(places)}")
    place = places[0]
    if place == "raw_data":
        return len(tensor[place]) / DTYPES[datatype].itemsize
    if place in _VIEWED:
        return sum(len(view) for view in tensor[place]) / _VIEWED[place]
    return len(tensor[place])


def _named(tensor: Message, what: str) -> str:
    name = tensor.get("name", "")
    _require_name(name, what)
    return str(name)


def _require_name(name: str, what: str) -> None:
    if not 0 < len(name) <= NAME_LENGTH_MAX or not name.isprintable():
        raise RefusedModel("bad-name", f"the name of an {what} is empty, over {NAME_LENGTH_MAX} characters, or not printable")


# --- nodes ---------------------------------------------------------------------------------------------------------------------


def _names(graph: Message, weights: Collection[str]) -> None:
    """Each value is made once, and before it is used: so there is no cycle. Old files list their weights among the inputs, too."""
    made: set[str] = set()
    for value in graph.get("input", ()):
        _make(made, _named(value, "input"), "input")
    made |= set(weights)
    later = {name for node in graph["node"] for name in node.get("output", ())}
    for node in graph["node"]:
        for name in filter(None, node.get("input", ())):
            if name not in made:
                raise RefusedModel(*_not_made(name, later))
        for name in filter(None, node.get("output", ())):
            _make(made, name, "output of a node")
    for value in graph.get("output", ()):
        if _named(value, "output") not in made:
            raise RefusedModel("undefined-name", f"the output {value['name']!r} is made by no node")


def _make(made: set[str], name: str, what: str) -> None:
    _require_name(name, what)
    if name in made:
        raise RefusedModel("duplicate-name", f"{name!r} is made twice")
    made.add(name)


def _not_made(name: str, later: set[str]) -> tuple[str, str]:
    if name in later:
        return "cycle", f"{name[:60]!r} is used before it is made: the nodes are in a circle, or not in order"
    return "undefined-name", f"{name[:60]!r} is used and never made"


def _node(node: Message) -> None:
    operator, domain = node.get("op_type", ""), node.get("domain", "")
    domain = "" if domain == "ai.onnx" else domain
    if domain not in schema.OPERATORS:
        raise RefusedModel("custom-domain", f"operator {operator[:60]!r} of domain {domain[:60]!r}")
    for group, reason, what in (
        (schema.CONTROL_FLOW, "control-flow", "runs other nodes, as often as data says"),
        (schema.RANDOM, "random", "draws at random, so that nobody can check its result"),
        (schema.STRINGS, "strings", "works on strings"),
        (schema.SEQUENCES, "sequences", "works on sequences, maps or optional values"),
    ):
        if operator in group:
            raise RefusedModel(reason, f"operator {operator} {what}")
    if operator not in schema.OPERATORS[domain]:
        raise RefusedModel("unknown-operator", f"operator {operator[:60]!r} of domain {domain!r}")
    if operator == "Dropout" and len(node.get("input", ())) > 2:
        raise RefusedModel("random", "a Dropout that may be in training mode")
    if operator == "BatchNormalization" and any(a.get("name") == "training_mode" and a.get("i") for a in node.get("attribute", ())):
        raise RefusedModel("training", "a BatchNormalization in training mode, whose rows depend on each other")
    if "overload" in node or "device_configurations" in node:
        raise RefusedModel("device-configuration", f"operator {operator} names an overload or a device")
    edges = (node.get("input", ()), node.get("output", ()), node.get("attribute", ()))
    if any(len(values) > EDGES_MAX for values in edges):
        raise RefusedModel("too-many-edges", f"operator {operator} has over {EDGES_MAX} inputs, outputs or attributes")
    for attribute in node.get("attribute", ()):
        _attribute(operator, attribute)


def _attribute(operator: str, attribute: Message) -> None:
    name = attribute.get("name", "")
    _require_name(name, "attribute")
    for field, reason, what in (
        ("g", "subgraph", "holds a graph"),
        ("graphs", "subgraph", "holds graphs"),
        ("ref_attr_name", "local-functions", "refers to a function's attribute"),
        ("sparse_tensor", "sparse", "holds a sparse tensor"),
        ("sparse_tensors", "sparse", "holds sparse tensors"),
        ("tp", "sequences", "holds a type"),
        ("type_protos", "sequences", "holds types"),
    ):
        if field in attribute:
            raise RefusedModel(reason, f"attribute {name!r} of {operator} {what}")
    if name.endswith("strings") or (operator == "Constant" and name.startswith("value_string")):
        raise RefusedModel("strings", f"attribute {name!r} of {operator} makes strings")
    for tensor in (*attribute.get("tensors", ()), *([attribute["t"]] if "t" in attribute else ())):
        _tensor(tensor)


# --- what it takes and gives -----------------------------------------------------------------------------------------------------


def _signature(graph: Message, weights: Collection[str]) -> Signature:
    inputs = [_value(v, "input") for v in graph.get("input", ()) if v["name"] not in weights]
    outputs = [_value(v, "output") for v in graph.get("output", ())]
    if not inputs or not outputs:
        raise RefusedModel("no-signature", f"{len(inputs)} inputs and {len(outputs)} outputs")
    try:
        return Signature(tuple(v.spec for v in inputs), tuple(v.spec for v in outputs), _batched(inputs, outputs))
    except ProtocolError as error:
        raise RefusedModel("no-signature", error.message) from error


@dataclass(frozen=True, slots=True)
class _Value:
    spec: TensorSpec
    symbols: tuple[str, ...]
    """Name of each dimension that is not fixed; "" for a fixed one, "?" for one without a name."""


def _value(value: Message, what: str) -> _Value:
    kind = value.get("type", {})
    for field, reason in (
        ("sequence_type", "sequence"),
        ("map_type", "map"),
        ("optional_type", "optional"),
        ("sparse_tensor_type", "sparse"),
        ("opaque_type", "opaque"),
    ):
        if field in kind:
            raise RefusedModel(f"{reason}-{what}", f"{what} {value['name']!r} is a {reason}, not a tensor")
    tensor = kind.get("tensor_type", {})
    element = tensor.get("elem_type", 0)
    if element == schema.STRING_TYPE:
        raise RefusedModel("strings", f"{what} {value['name']!r} holds strings")
    if element not in schema.DATATYPES:
        raise RefusedModel(f"{what}-type", f"{what} {value['name']!r} is of data type {element}, which is not served")
    if "shape" not in tensor:
        raise RefusedModel(f"{what}-shape", f"{what} {value['name']!r} does not say how many dimensions it has")
    dims = list(tensor["shape"].get("dim", ()))
    if len(dims) > RANK_MAX or any(not 1 <= d.get("dim_value", 1) <= ELEMENTS_MAX for d in dims):
        raise RefusedModel(
            f"{what}-shape", f"{what} {value['name']!r} has too many dimensions, or one that is not from 1 to {ELEMENTS_MAX}"
        )
    shape = tuple(_dimension(d) for d in dims)
    if math.prod(size for size in shape if size > 0) > ELEMENTS_MAX:
        raise RefusedModel("giant-tensor", f"{what} {value['name']!r} has over {ELEMENTS_MAX} elements")
    symbols = tuple(d.get("dim_param", "") or "?" if size == -1 else "" for d, size in zip(dims, shape, strict=True))
    return _Value(TensorSpec(value["name"], schema.DATATYPES[element], shape), symbols)


def _dimension(dim: Message) -> int:
    if "dim_value" in dim and "dim_param" in dim:
        raise RefusedModel("malformed", "a dimension with a value and a name")
    return int(dim.get("dim_value", -1))


def _batched(inputs: list[_Value], outputs: list[_Value]) -> bool:
    """Whether all tensors begin with one open dimension of one name, and no output has a size that only data decides."""
    values = (*inputs, *outputs)
    if len({v.symbols[0] if v.symbols else "" for v in values}) != 1 or not values[0].symbols or not values[0].symbols[0]:
        return False
    known = {symbol for v in inputs for symbol in v.symbols[1:]} - {"?"}
    return all(symbol in known or not symbol for symbol in _inner(outputs))


def _inner(values: list[_Value]) -> Iterator[Any]:
    return (symbol for value in values for symbol in value.symbols[1:])

"""Tensors as they are named, bounded and hashed: the datatypes and specs of the Open Inference Protocol v2, and output items of rows.

An output item is one row of every output tensor, or the whole outputs of a model without a batch dimension. Its bytes, which the output
chain hashes: for each output in the request's order the datatype's code (uint8), the rank (uint8), the dimensions (uint32 little-endian)
and the elements (little-endian, row-major). One value has one form. Everything that is read here is a stranger's.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gpumarket.core import hostile_json
from gpumarket.core.errors import ProtocolError

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""Datatype → how its elements lie in memory. BYTES is left out: strings have neither a tolerance nor a fixed size."""
_CODES: Final = {name: code for code, name in enumerate(DTYPES, start=1)}
_NAMES: Final = {code: name for name, code in _CODES.items()}

REQUEST_BYTES_MAX: Final = 6 * 1024 * 1024
OUTPUT_BYTES_MAX: Final = 4 * 1024 * 1024
"""A rejection carries a result and two checks of it, request and output each, in one message of 32 MiB: three times these two fit."""
TENSORS_MAX: Final = 64
RANK_MAX: Final = 8
NAME_LENGTH_MAX: Final = 256
ROWS_MAX: Final = 65_536
"""Output items that one report may open."""
SIGNATURE_FILE: Final = "signature.json"
_SIGNATURE_BYTES_MAX: Final = 128 * 1024
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, datatype and shape of an input or output; -1 is a dimension that each request sets."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        require_name(self.name)
        if self.datatype not in DTYPES:
            raise ProtocolError(_unknown(self.name, self.datatype), hint=f"use one of {', '.join(DTYPES)}")
        if len(self.shape) > RANK_MAX or any(size != -1 and not 1 <= size < 2**31 for size in self.shape):
            raise ProtocolError(f"tensor {self.name!r} has the shape {list(self.shape)}", hint=f"at most {RANK_MAX} dimensions of 1 and up")

    def item_bytes(self, batched: bool) -> int:
        """Its bytes in one output item, where every dimension is known; 0 where one is not."""
        shape = self.shape[1:] if batched else self.shape
        return 0 if -1 in shape else 2 + 4 * len(shape) + math.prod(shape) * DTYPES[self.datatype].itemsize

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape is meant."""
        return len(shape) == len(self.shape) and all(wanted in (-1, size) for wanted, size in zip(self.shape, shape, strict=True))


@dataclass(frozen=True, slots=True)
class Signature:
    """What a tensor model takes and gives. `batched`: the first dimension of every input and output counts independent rows."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool

    def __post_init__(self) -> None:
        for kind, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [spec.name for spec in specs]
            if not 1 <= len(names) <= TENSORS_MAX or len(set(names)) != len(names):
                raise ProtocolError(f"a signature needs 1 to {TENSORS_MAX} {kind}, each name once; here are {len(names)}")
        if self.batched and any(spec.shape[:1] != (-1,) for spec in (*self.inputs, *self.outputs)):
            raise ProtocolError("a batched signature with a tensor whose first dimension is fixed")


def signature_to_json(signature: Signature) -> bytes:
    """The content of a model's signature.json: one signature has one form."""
    rows = {kind: [_spec_row(s) for s in specs] for kind, specs in (("inputs", signature.inputs), ("outputs", signature.outputs))}
    document = {"version": _VERSION, "batched": signature.batched, **rows}
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def signature_from_json(raw: bytes) -> Signature:
    """Inverse of `signature_to_json`. Raises ProtocolError for anything that it would not have written."""
    if len(raw) > _SIGNATURE_BYTES_MAX:
        raise ProtocolError(f"a signature of {len(raw)} bytes; at most {_SIGNATURE_BYTES_MAX} are read")
    try:
        document = hostile_json.loads(raw)
        inputs, outputs = (tuple(_spec(row) for row in document[kind]) for kind in ("inputs", "outputs"))
        signature = Signature(inputs, outputs, document["batched"] is True)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ProtocolError(f"a signature that is none ({type(error).__name__})") from error
    if signature_to_json(signature) != raw:
        raise ProtocolError("a signature that is not in its one form")
    return signature


# --- items ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ItemPart:
    """One output tensor's part of an item."""

    datatype: str
    shape: tuple[int, ...]
    contents: bytes

    @property
    def array(self) -> NDArray[Any]:
        """The elements, read-only."""
        return np.frombuffer(self.contents, DTYPES[self.datatype]).reshape(self.shape)


def encode_item(arrays: Sequence[NDArray[Any]]) -> bytes:
    """The item of these arrays. Raises ProtocolError for a dtype that no datatype has."""
    parts = []
    for array in arrays:
        header = struct.pack(f"<BB{array.ndim}I", _CODES[datatype_of(array.dtype)], array.ndim, *array.shape)
        parts += [header, np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()]
    return b"".join(parts)


def decode_item(item: bytes) -> tuple[ItemPart, ...]:
    """The parts of an item. Raises ProtocolError for bytes that `encode_item` does not make."""
    parts: list[ItemPart] = []
    at = 0
    while at < len(item):
        try:
            code, rank = struct.unpack_from("<BB", item, at)
            shape = struct.unpack_from(f"<{rank}I", item, at + 2) if rank <= RANK_MAX else None
        except struct.error as error:
            raise ProtocolError("an output item that ends in the middle of a shape") from error
        if code not in _NAMES or shape is None or len(parts) == TENSORS_MAX:
            raise ProtocolError("an output item with an unknown datatype, or too many tensors or dimensions")
        at += 2 + 4 * rank
        size = math.prod(shape) * DTYPES[_NAMES[code]].itemsize
        contents = item[at : at + size]
        if len(contents) != size or (_NAMES[code] == "BOOL" and contents.strip(b"\0\1")):
            raise ProtocolError("an output item whose elements are not what its shape says")
        parts.append(ItemPart(_NAMES[code], shape, contents))
        at += size
    return tuple(parts)


def item_flaw(outputs: Sequence[TensorSpec], batched: bool, item: bytes) -> str:
    """Why an item is not one of these outputs; empty when it is."""
    try:
        parts = decode_item(item)
    except ProtocolError as error:
        return error.message
    if len(parts) != len(outputs):
        return f"an item of {len(parts)} tensors; {len(outputs)} were asked for"
    for spec, part in zip(outputs, parts, strict=True):
        if part.datatype != spec.datatype or not spec.fits((1, *part.shape) if batched else part.shape):
            return f"output {spec.name!r} came as {part.datatype} {list(part.shape)}, not as {spec.datatype} {list(spec.shape)}"
    return ""


def join_items(outputs: Sequence[TensorSpec], batched: bool, items: Sequence[bytes]) -> dict[str, NDArray[Any]]:
    """Read-only arrays by output name. Raises ProtocolError for items that are not of these outputs, or rows of different shapes."""
    rows = []
    for item in items:
        if flaw := item_flaw(outputs, batched, item):
            raise ProtocolError(flaw)
        rows.append(decode_item(item))
    found: dict[str, NDArray[Any]] = {}
    for index, spec in enumerate(outputs):
        arrays = [row[index].array for row in rows]
        if len({array.shape for array in arrays}) != 1:
            raise ProtocolError(f"the rows of output {spec.name!r} differ in shape")
        whole = np.stack(arrays) if batched else arrays[0]
        whole.flags.writeable = False
        found[spec.name] = whole
    return found


def datatype_of(dtype: np.dtype[Any]) -> str:
    """The datatype of a numpy dtype, whatever its byte order. Raises ProtocolError for one that has none."""
    for name, known in DTYPES.items():
        if dtype.newbyteorder("<") == known:
            return name
    raise ProtocolError(f"arrays of dtype {dtype} are not sent", hint=f"convert it to one of {', '.join(map(str, DTYPES.values()))}")


def require_name(name: str) -> None:
    """Raises ProtocolError for a tensor name that is empty, too long or not printable."""
    if not 0 < len(name) <= NAME_LENGTH_MAX or not name.isprintable():
        raise ProtocolError(f"a tensor name of {len(name)} characters that is empty, too long or not printable")


def _unknown(name: str, datatype: str) -> str:
    if datatype == "BYTES":
        return f"tensor {name!r} is of datatype BYTES: strings are not served"
    return f"tensor {name!r} is of an unknown datatype"


def _spec_row(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _spec(row: Any) -> TensorSpec:
    shape = tuple(row["shape"])
    if not all(type(size) is int for size in shape):
        raise TypeError("a shape of other things than integers")
    return TensorSpec(str(row["name"]), str(row["datatype"]), shape)

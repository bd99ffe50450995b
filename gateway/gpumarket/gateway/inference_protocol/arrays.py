"""Tensors as callers send them, and as they get them: JSON lists, raw bytes, typed contents. Pure.

Invariant: a number is taken only where the datatype holds it exactly, or, of a float, as nearly as its precision allows; nothing wraps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.tensors import DTYPES, RANK_MAX, datatype_of
from gpumarket.gateway.problems import invalid
from gpumarket.v1 import inference_pb2 as ipb

Array = NDArray[Any]
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
"""Where the elements of a datatype lie in typed contents. FP16 has no place there: it goes raw."""


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Array:
    """Little-endian, row-major elements. Raises Problem (400) where bytes and shape do not fit."""
    dtype = _dtype(name, datatype)
    count = _count(name, shape)
    if len(raw) != count * dtype.itemsize:
        raise invalid(f"input {name!r}: {len(raw)} bytes are no {count} elements of {datatype}", name)
    if datatype == "BOOL" and not set(raw) <= {0, 1}:
        raise invalid(f"input {name!r}: a BOOL is a byte of 0 or 1", name)
    return np.frombuffer(raw, dtype).reshape(tuple(shape))


def from_list(name: str, datatype: str, shape: Sequence[int], data: Sequence[Any]) -> Array:
    """Numbers or truth values, flat or nested. Raises Problem (400)."""
    dtype = _dtype(name, datatype)
    count = _count(name, shape)
    try:
        found = np.asarray(data)
    except (ValueError, OverflowError):
        raise invalid(f"input {name!r}: the data are no regular array", name) from None
    if dtype == np.uint64 and found.dtype.kind == "f":  # what numpy makes of whole numbers some of which are 2**63 or more
        found = _whole_numbers(data, found)
    if found.size != count:
        raise invalid(f"input {name!r}: {found.size} elements do not fill the shape {list(shape)}", name)
    return _exact(name, datatype, found, dtype).reshape(tuple(shape))


def from_contents(name: str, datatype: str, shape: Sequence[int], contents: ipb.InferTensorContents) -> Array:
    """Typed contents. Raises Problem (400) for elements in the place of another datatype."""
    _dtype(name, datatype)
    place = _CONTENTS.get(datatype)
    if place is None:
        raise invalid(f"input {name!r}: {datatype} has no typed contents; send raw_input_contents", name)
    strange = [field.name for field, _ in contents.ListFields() if field.name != place]
    if strange:
        raise invalid(f"input {name!r}: {datatype} goes into {place}, not {strange[0]}", name)
    return from_list(name, datatype, shape, list(getattr(contents, place)))


def to_list(array: Array) -> list[Any]:
    """Flat, for JSON; what JSON has no number for (NaN, infinities) becomes null."""
    flat: list[Any] = array.reshape(-1).tolist()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return [value if math.isfinite(value) else None for value in flat]
    return flat


def to_contents(array: Array) -> ipb.InferTensorContents | None:
    """Typed contents; None for a datatype that has none."""
    place = _CONTENTS.get(datatype_of(array.dtype))
    return None if place is None else ipb.InferTensorContents(**{place: array.reshape(-1).tolist()})


def to_raw(array: Array) -> bytes:
    """Little-endian, row-major."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()


def _dtype(name: str, datatype: str) -> np.dtype[Any]:
    if datatype not in DTYPES:
        raise invalid(f"input {name!r} has the datatype {datatype[:40]!r}; there are {', '.join(DTYPES)}", name)
    return DTYPES[datatype]


def _count(name: str, shape: Sequence[int]) -> int:
    if len(shape) > RANK_MAX or any(not 0 <= size < 2**31 for size in shape):
        raise invalid(f"input {name!r}: a shape has at most {RANK_MAX} dimensions, none negative", name)
    return math.prod(shape)


def _whole_numbers(data: Sequence[Any], otherwise: Array) -> Array:
    """As UINT64 where each is one, else as it was."""
    each = np.asarray(data, dtype=object)
    return each.astype(np.uint64) if all(type(value) is int and 0 <= value < 2**64 for value in each.flat) else otherwise


def _exact(name: str, datatype: str, found: Array, dtype: np.dtype[Any]) -> Array:
    """`found` as the datatype. Empty lists have no kind of their own."""
    kinds = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}[dtype.kind]
    if found.size and found.dtype.kind not in kinds:
        raise invalid(f"input {name!r}: the data are not all {datatype}", name)
    with np.errstate(over="ignore"):
        made = found.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(made.astype(object), found.astype(object)):
        raise invalid(f"input {name!r}: a number is outside {datatype}", name)
    if dtype.kind == "f" and not np.array_equal(np.isfinite(made), np.isfinite(found)):
        raise invalid(f"input {name!r}: a number is outside {datatype}", name)
    return made

"""A tensor request: named inputs, the outputs that are wanted, and the rows that it is billed by. The same in client, engine and verifier.

Invariant: a request that could be constructed is whole: every input has the bytes that its shape promises, the first dimension of each
is the stated number of rows, and all of it is within the bounds. Whether it fits a model is `require_fits`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.codec import parse
from gpumarket.core.errors import ProtocolError
from gpumarket.core.tensors import (
    DTYPES,
    OUTPUT_BYTES_MAX,
    RANK_MAX,
    REQUEST_BYTES_MAX,
    ROWS_MAX,
    TENSORS_MAX,
    Signature,
    TensorSpec,
    require_name,
)
from gpumarket.v1 import terms_pb2 as pb


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named array: `contents` little-endian and row-major."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    contents: bytes

    def __post_init__(self) -> None:
        require_name(self.name)
        if self.datatype not in DTYPES:
            raise ProtocolError(f"input {self.name!r} is of a datatype that is not served", hint=f"use one of {', '.join(DTYPES)}")
        if len(self.shape) > RANK_MAX or any(not 1 <= size < 2**31 for size in self.shape):
            raise ProtocolError(f"input {self.name!r} has the shape {list(self.shape)}", hint=f"at most {RANK_MAX} dimensions of 1 and up")
        promised = math.prod(self.shape) * DTYPES[self.datatype].itemsize
        if promised != len(self.contents):
            raise ProtocolError(f"input {self.name!r} has {len(self.contents)} bytes; its shape {list(self.shape)} takes {promised}")
        if self.datatype == "BOOL" and self.contents.strip(b"\0\1"):
            raise ProtocolError(f"input {self.name!r} has bytes that are no BOOL", hint="use 0 and 1")

    @property
    def array(self) -> NDArray[Any]:
        """The elements, read-only."""
        return np.frombuffer(self.contents, DTYPES[self.datatype]).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class TensorRequest:
    """What to compute. `rows` 0: a model without a batch dimension, whose whole answer is one item."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[TensorSpec, ...]
    rows: int

    def __post_init__(self) -> None:
        for kind, names in (("input", [t.name for t in self.inputs]), ("output", [s.name for s in self.outputs])):
            if not 1 <= len(names) <= TENSORS_MAX or len(set(names)) != len(names):
                raise ProtocolError(f"a tensor request needs 1 to {TENSORS_MAX} {kind}s, each name once; here are {len(names)}")
        if not 0 <= self.rows <= ROWS_MAX:
            raise ProtocolError(f"a request of {self.rows} rows", hint=f"send at most {ROWS_MAX} at a time")
        for tensor in self.inputs if self.rows else ():
            if tensor.shape[:1] != (self.rows,):
                raise ProtocolError(f"input {tensor.name!r} has the shape {list(tensor.shape)}; its first dimension must be {self.rows}")
        if self.rows and any(spec.shape[:1] != (-1,) for spec in self.outputs):
            raise ProtocolError("an output without a row of its own for each row of the input")
        size = sum(len(tensor.contents) for tensor in self.inputs)
        if size > REQUEST_BYTES_MAX:
            raise ProtocolError(f"{size} bytes of input; a request has at most {REQUEST_BYTES_MAX}", hint="send fewer rows at a time")
        if self.items * sum(spec.item_bytes(bool(self.rows)) for spec in self.outputs) > OUTPUT_BYTES_MAX:
            raise ProtocolError(f"the answer would be over {OUTPUT_BYTES_MAX} bytes", hint="send fewer rows at a time")

    @property
    def items(self) -> int:
        """Output items, which are the units that it is billed by."""
        return max(1, self.rows)

    def take(self, rows: Sequence[int]) -> TensorRequest:
        """The request for some of its rows, in this order. A request without rows has item 0 alone, and is whole."""
        if not self.rows:
            if list(rows) != [0]:
                raise ProtocolError("a request without a batch dimension has one item")
            return self
        if not rows or min(rows) < 0 or max(rows) >= self.rows:
            raise ProtocolError(f"rows that a request of {self.rows} does not have")
        index = np.asarray(rows)
        inputs = (Tensor(t.name, t.datatype, (len(rows), *t.shape[1:]), t.array[index].tobytes()) for t in self.inputs)
        return TensorRequest(tuple(inputs), self.outputs, len(rows))


def require_fits(signature: Signature, request: TensorRequest) -> None:
    """Raise ProtocolError unless the request gives each input of the model and asks for outputs that it has."""
    given = {tensor.name: tensor for tensor in request.inputs}
    known = {spec.name for spec in signature.inputs}
    if missing := sorted(known - given.keys()):
        raise ProtocolError(f"input {missing[0]!r} is missing", hint=f"the model takes {', '.join(sorted(known))}")
    if unknown := sorted(given.keys() - known):
        raise ProtocolError(f"the model has no input {unknown[0]!r}", hint=f"it takes {', '.join(sorted(known))}")
    if bool(request.rows) is not signature.batched:
        raise ProtocolError("the request counts rows, the model has none" if request.rows else "the request counts no rows")
    for spec in signature.inputs:
        tensor = given[spec.name]
        if tensor.datatype != spec.datatype or not spec.fits(tensor.shape):
            raise ProtocolError(
                f"input {spec.name!r} is {tensor.datatype} {list(tensor.shape)}; the model takes {spec.datatype} {list(spec.shape)}"
            )
    for wanted in request.outputs:
        if wanted not in signature.outputs:
            raise ProtocolError(
                f"the model has no output {wanted.name!r} of that datatype and shape",
                hint=f"it gives {', '.join(spec.name for spec in signature.outputs)}",
            )


def smallest(signature: Signature) -> TensorRequest:
    """A request of zeros, one row, every open dimension 1."""
    inputs = []
    for spec in signature.inputs:
        shape = tuple(max(1, size) for size in spec.shape)
        inputs.append(Tensor(spec.name, spec.datatype, shape, bytes(math.prod(shape) * DTYPES[spec.datatype].itemsize)))
    return TensorRequest(tuple(inputs), signature.outputs, int(signature.batched))


def to_proto(request: TensorRequest) -> pb.TensorRequest:
    """The request body."""
    return pb.TensorRequest(
        inputs=[pb.Tensor(name=t.name, datatype=t.datatype, shape=t.shape, contents=t.contents) for t in request.inputs],
        outputs=[pb.TensorSpec(name=s.name, datatype=s.datatype, shape=s.shape) for s in request.outputs],
        rows=request.rows,
    )


def from_proto(body: pb.TensorRequest) -> TensorRequest:
    """Raises ProtocolError for a body that breaks the rules."""
    if len(body.inputs) > TENSORS_MAX or len(body.outputs) > TENSORS_MAX:
        raise ProtocolError(f"a tensor request of over {TENSORS_MAX} tensors")
    inputs = tuple(Tensor(t.name, t.datatype, tuple(t.shape), t.contents) for t in body.inputs)
    outputs = tuple(TensorSpec(s.name, s.datatype, tuple(s.shape)) for s in body.outputs)
    return TensorRequest(inputs, outputs, body.rows)


def from_bytes(raw: bytes) -> TensorRequest:
    """Of a serialized body. Raises ProtocolError."""
    return from_proto(parse(pb.TensorRequest, raw))

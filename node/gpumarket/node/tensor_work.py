"""Tensor jobs: what an order's request asks of the engine, and the engine's arrays as items of the output chain. Pure but for the engine.

The engine process is not trusted with its own output: an array of another type, shape or number of rows than was asked for is a failure
of the engine, never a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from gpumarket.core.errors import EngineFailed, ProtocolError
from gpumarket.core.tensor_requests import TensorRequest, require_fits
from gpumarket.core.tensors import OUTPUT_BYTES_MAX, Signature, datatype_of, encode_item
from gpumarket.core.terms import JobSpec, Lease, ModelManifest
from gpumarket.node.meter import Item


def open_tensors(lease: Lease, spec: JobSpec, manifest: ModelManifest, signature: Signature | None, asked: TensorRequest) -> TensorRequest:
    """The rows that no earlier attempt delivered. Raises ProtocolError when the request is not what the order says or the model takes."""
    if signature is None:
        raise ProtocolError(f"{manifest.name} takes no tensors", hint="choose a model of task infer")
    units = {spec.prompt_units, spec.max_output_units}
    if units != {asked.items}:
        raise ProtocolError(f"the order states {sorted(units)} rows, the request has {asked.items}")
    if asked.items > manifest.max_input_tokens:
        raise ProtocolError(f"{asked.items} rows; {manifest.name} takes {manifest.max_input_tokens} at a time", hint="send fewer")
    require_fits(signature, asked)
    if lease.prefix_units >= asked.items:
        raise ProtocolError("every row was delivered by earlier attempts; nothing is left to do")
    return asked.take(range(lease.prefix_units, asked.items)) if lease.prefix_units else asked


def items_of(request: TensorRequest, batch: tuple[NDArray[Any], ...]) -> Iterator[Item]:
    """A batch's output items. Raises EngineFailed for arrays that are not the outputs asked for."""
    if len(batch) != len(request.outputs):
        raise EngineFailed(f"the engine gave {len(batch)} outputs for the {len(request.outputs)} asked for")
    rows = len(batch[0]) if request.rows and batch[0].ndim else 0
    for spec, array in zip(request.outputs, batch, strict=True):
        whole = not request.rows or (array.ndim > 0 and 0 < len(array) == rows <= request.rows)
        if datatype_of(array.dtype) != spec.datatype or not spec.fits(array.shape) or not whole:
            raise EngineFailed(f"the engine gave output {spec.name!r} as {array.dtype} {list(array.shape)}")
    if not request.rows:
        yield _item(encode_item(batch))
    for row in range(rows):
        yield _item(encode_item([array[row] for array in batch]))


def _item(data: bytes) -> Item:
    if len(data) > OUTPUT_BYTES_MAX:
        raise EngineFailed(f"an answer of {len(data)} bytes; at most {OUTPUT_BYTES_MAX} are sent", retryable=False)
    return Item(data, 1)

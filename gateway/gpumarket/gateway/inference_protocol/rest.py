"""The protocol over REST: JSON tensors, and the binary tensor data extension both ways."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import msgspec
from aiohttp import web

from gpumarket.core.tensors import TensorSpec, datatype_of
from gpumarket.gateway.call import JSON, Call, market_headers
from gpumarket.gateway.inference_protocol.arrays import Array, from_list, from_raw, to_list, to_raw
from gpumarket.gateway.inference_protocol.buying import EXTENSIONS, PLATFORM, Asked, buy, model_of, on_sale, version_of
from gpumarket.gateway.inference_protocol.tables import InferRequest, InputTensor
from gpumarket.gateway.openai.reading import Reader
from gpumarket.gateway.problems import Problem, invalid
from gpumarket.sdk.lock import LockedModel
from gpumarket.sdk.results import InferResult

BINARY = "application/octet-stream"
HEADER = "Inference-Header-Content-Length"
"""Bytes of the JSON part; the binary part follows it."""
SERVER: dict[str, Any] = {"name": "gpumarket", "version": version("gpumarket"), "extensions": list(EXTENSIONS)}
_encode = msgspec.json.Encoder().encode
_reader = Reader(InferRequest)


async def metadata(call: Call) -> web.Response:
    """GET /v2/models/{model}: what it takes and gives."""
    entry = _model(call)
    signature = await call.room.counter.client.signature(entry.name)
    document = {"name": entry.name, "versions": [version_of(entry)], "platform": PLATFORM}
    return call.answer(document | {"inputs": _specs(signature.inputs), "outputs": _specs(signature.outputs)})


async def ready(call: Call) -> web.Response:
    """GET /v2/models/{model}/ready. Raises Problem (503) where nobody sells it."""
    entry = _model(call)
    if not await on_sale(call.room, entry):
        raise Problem(503, "no_provider", f"nobody sells {entry.name} now", again_seconds=2)
    return call.answer({"name": entry.name, "ready": True})


async def infer(call: Call) -> web.Response:
    """POST /v2/models/{model}/infer. Raises Problem."""
    raw = await call.read_raw((JSON, BINARY))
    length = _json_length(call.request.headers.get(HEADER), len(raw))
    asked = _reader.read(raw[:length])
    entry = _model(call)
    arrays = _arrays(asked, raw[length:])
    names = None if asked.outputs is None else [output.name for output in asked.outputs]
    if names is not None and len(set(names)) != len(names):
        raise invalid("an output is asked for twice", "outputs")
    async with call.buying(1, "inputs") as ticket:
        result = await buy(call.room, call.key, entry, Asked(arrays, names), ticket)
    return _answer(call, entry, asked, result)


def _model(call: Call) -> LockedModel:
    found = call.request.match_info
    return model_of(call.room, call.key, found["model"], found.get("version", ""))


def _specs(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
    return [{"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)} for spec in specs]


def _json_length(header: str | None, whole: int) -> int:
    if header is None:
        return whole
    if not header.isascii() or not header.isdecimal() or int(header) > whole:
        raise invalid(f"{HEADER} is {header[:40]!r}; the body has {whole} bytes", HEADER)
    return int(header)


def _arrays(asked: InferRequest, binary: bytes) -> dict[str, Array]:
    """Inputs by name. Raises Problem where the binary part is not exactly what the inputs say."""
    found: dict[str, Array] = {}
    at = 0
    for tensor in asked.inputs:
        if tensor.name in found:
            raise invalid(f"input {tensor.name!r} is there twice", tensor.name)
        size = tensor.parameters.binary_data_size if tensor.parameters is not None else None
        found[tensor.name] = _array(tensor, size, binary[at : at + (size or 0)])
        at += size or 0
    if at != len(binary):
        raise invalid(f"the binary part has {len(binary)} bytes; the inputs speak of {at}", "binary_data_size")
    return found


def _array(tensor: InputTensor, size: int | None, raw: bytes) -> Array:
    if (size is None) == (tensor.data is None):
        raise invalid(f"input {tensor.name!r} has data or a binary_data_size: one of them", tensor.name)
    if tensor.data is not None:
        return from_list(tensor.name, tensor.datatype, tensor.shape, tensor.data)
    return from_raw(tensor.name, tensor.datatype, tensor.shape, raw)


def _answer(call: Call, entry: LockedModel, asked: InferRequest, result: InferResult) -> web.Response:
    every = bool(asked.parameters and asked.parameters.binary_data_output)
    own = {o.name: o.parameters.binary_data for o in asked.outputs or () if o.parameters is not None}
    outputs: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for name, array in result.outputs.items():
        about: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": datatype_of(array.dtype)}
        wanted = own.get(name)
        if every if wanted is None else wanted:
            parts.append(to_raw(array))
            outputs.append(about | {"parameters": {"binary_data_size": len(parts[-1])}})
        else:
            outputs.append(about | {"data": to_list(array)})
    document = {"model_name": entry.name, "model_version": version_of(entry), "outputs": outputs}
    head = _encode(document if asked.id is None else {**document, "id": asked.id})
    call.room.tally.bought([result])
    headers = {**call.headers, **market_headers([result])}
    if not parts:
        return web.Response(body=head, content_type=JSON, headers=headers)
    return web.Response(body=b"".join((head, *parts)), content_type=BINARY, headers=headers | {HEADER: str(len(head))})

"""Messages between a daemon and its engine process: msgpack, each behind a 4-byte little-endian length.

Invariant: no frame is larger than FRAME_BYTES_MAX, and a frame that does not decode to exactly one of these types ends the connection.
The engine process is not trusted by its parent: it runs models that strangers made.

Flow: the parent grants each call CREDITS answers and one more for each that its reader took, so a slow reader holds up itself alone.
"""

from __future__ import annotations

import asyncio
from typing import Final, TypeVar

import msgspec

from gpumarket.core.errors import EngineFailed, ProtocolError
from gpumarket.core.tensor_requests import TensorRequest
from gpumarket.node.engine.base import EmbedRequest, GenerateRequest, Segment, TokenLogprobs

T = TypeVar("T")

FRAME_BYTES_MAX: Final = 32 * 1024 * 1024
CREDITS: Final = 4
_LENGTH_BYTES: Final = 4


class Load(msgspec.Struct, tag=True, frozen=True):
    """First frame to the engine process: what to serve. `kind` is "embed", "slots" or "onnx"."""

    kind: str
    folder: str
    compute_dtype: str
    threads: int
    options: dict[str, int]


class Embed(msgspec.Struct, tag=True, frozen=True):
    call: int
    request: EmbedRequest


class Generate(msgspec.Struct, tag=True, frozen=True):
    call: int
    request: GenerateRequest


class Replay(msgspec.Struct, tag=True, frozen=True):
    call: int
    request: GenerateRequest
    output: tuple[int, ...]
    segments: tuple[Segment, ...]


class Infer(msgspec.Struct, tag=True, frozen=True):
    call: int
    request: TensorRequest


class Stats(msgspec.Struct, tag=True, frozen=True):
    call: int


class Credit(msgspec.Struct, tag=True, frozen=True):
    """The reader of a call took one answer."""

    call: int


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """The reader of a call went away."""

    call: int


class Ready(msgspec.Struct, tag=True, frozen=True):
    """First frame from the engine process: the model is loaded. `sandbox` says what is in force, and nothing that is not."""

    sandbox: dict[str, bool | str]


class Rows(msgspec.Struct, tag=True, frozen=True):
    """Float32 little-endian values, `dimensions` a row."""

    call: int
    dimensions: int
    data: bytes


class Tokens(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    call: int
    tokens: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...] = ()


class Tensors(msgspec.Struct, tag=True, frozen=True):
    """Some rows of the outputs that were asked for, in their order, in the bytes of an output item (`core.tensors`)."""

    call: int
    item: bytes


class Report(msgspec.Struct, tag=True, frozen=True):
    """Answer to Stats."""

    call: int
    values: dict[str, int | str]


class Done(msgspec.Struct, tag=True, frozen=True):
    """The call ended well."""

    call: int


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The call ended with an error of `core.errors`, by its code. Call 0: the engine did not start."""

    call: int
    code: str
    message: str
    hint: str
    retryable: bool


ToEngine = Load | Embed | Generate | Infer | Replay | Stats | Credit | Cancel
FromEngine = Ready | Rows | Tokens | Tensors | Report | Done | Failed

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def pack(message: ToEngine | FromEngine) -> bytes:
    """One frame. ProtocolError when it is over the limit."""
    payload = _encoder.encode(message)
    if len(payload) > FRAME_BYTES_MAX:
        raise ProtocolError(f"a request of {len(payload)} bytes is over the limit of {FRAME_BYTES_MAX}", hint="split the request")
    return len(payload).to_bytes(_LENGTH_BYTES, "little") + payload


async def read_to_engine(reader: asyncio.StreamReader) -> ToEngine | None:
    """The next frame for the engine; None at the end of the connection. EngineFailed for a bad frame."""
    return await _read(reader, _to_engine)


async def read_from_engine(reader: asyncio.StreamReader) -> FromEngine | None:
    """The next frame from the engine; None at the end of the connection. EngineFailed for a bad frame."""
    return await _read(reader, _from_engine)


async def _read(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    try:
        length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "little")
        if length > FRAME_BYTES_MAX:
            raise EngineFailed(f"a frame of {length} bytes is over the limit", hint="the engine is restarted")
        payload = await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    try:
        return decoder.decode(payload)
    except msgspec.DecodeError as error:
        raise EngineFailed(f"a frame does not decode: {error}", hint="the engine is restarted") from error

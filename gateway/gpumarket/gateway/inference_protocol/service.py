"""The protocol over gRPC: the same keys, budgets and answers; errors are gRPC's statuses, with `retry-after` in the trailing metadata.

A caller that goes away cancels its call, and with it its job. Never: a tensor in a log line or an error.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog

from gpumarket.core.errors import ConfigError, GpumarketError, PortInUse
from gpumarket.core.tensors import datatype_of
from gpumarket.gateway.call import Room, market_object
from gpumarket.gateway.door import Door
from gpumarket.gateway.inference_protocol.arrays import Array, from_contents, from_raw, to_contents, to_raw
from gpumarket.gateway.inference_protocol.buying import PLATFORM, Asked, buy, model_of, on_sale, version_of
from gpumarket.gateway.inference_protocol.rest import SERVER
from gpumarket.gateway.keys import Key
from gpumarket.gateway.problems import OURS, Problem, invalid, problem_of
from gpumarket.sdk.results import InferResult
from gpumarket.v1 import inference_pb2 as ipb
from gpumarket.v1 import inference_pb2_grpc as igrpc

STATUSES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ABORTED,
    422: grpc.StatusCode.FAILED_PRECONDITION,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    502: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}
METHOD = "/inference.GRPCInferenceService/ModelInfer"
ENDPOINT = "grpc_infer"
_log = structlog.get_logger()


class InferenceService(igrpc.GRPCInferenceServiceServicer):
    """The service of one gateway."""

    def __init__(self, room: Room, door: Door) -> None:
        self._room, self._door = room, door

    async def ServerLive(self, request: ipb.ServerLiveRequest, context: Any) -> ipb.ServerLiveResponse:
        return ipb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: ipb.ServerReadyRequest, context: Any) -> ipb.ServerReadyResponse:
        return ipb.ServerReadyResponse(ready=not self._room.counter.draining)

    async def ServerMetadata(self, request: ipb.ServerMetadataRequest, context: Any) -> ipb.ServerMetadataResponse:
        return ipb.ServerMetadataResponse(**SERVER)

    async def ModelReady(self, request: ipb.ModelReadyRequest, context: Any) -> ipb.ModelReadyResponse:
        async with self._told(context):
            entry = model_of(self._room, self._known(context), request.name, request.version)
            return ipb.ModelReadyResponse(ready=await on_sale(self._room, entry))
        raise AssertionError

    async def ModelMetadata(self, request: ipb.ModelMetadataRequest, context: Any) -> ipb.ModelMetadataResponse:
        async with self._told(context):
            entry = model_of(self._room, self._known(context), request.name, request.version)
            signature = await self._room.counter.client.signature(entry.name)
            tensor = ipb.ModelMetadataResponse.TensorMetadata
            return ipb.ModelMetadataResponse(
                name=entry.name,
                versions=[version_of(entry)],
                platform=PLATFORM,
                inputs=[tensor(name=s.name, datatype=s.datatype, shape=s.shape) for s in signature.inputs],
                outputs=[tensor(name=s.name, datatype=s.datatype, shape=s.shape) for s in signature.outputs],
            )
        raise AssertionError

    async def ModelInfer(self, request: ipb.ModelInferRequest, context: Any) -> ipb.ModelInferResponse:
        room = self._room
        room.tally.requests[ENDPOINT] += 1
        async with self._told(context):
            key = self._known(context)
            entry = model_of(room, key, request.model_name, request.model_version)
            asked = _asked(request)
            name = _metadata(context).get("idempotency-key")
            body = request.SerializeToString(deterministic=True) if name is not None else b""
            with room.counter.admitted(1):
                async with room.answers.ticket(key, name, METHOD, body) as ticket:
                    result = await buy(room, key, entry, asked, ticket)
            room.tally.bought([result])
            room.tally.answers["2xx"] += 1
            return _answer(request, version_of(entry), result)
        raise AssertionError

    def _known(self, context: Any) -> Key:
        return self._door.known(_metadata(context).get("authorization", ""))

    @asynccontextmanager
    async def _told(self, context: Any) -> AsyncIterator[None]:
        """Errors as statuses."""
        try:
            yield
        except Problem as problem:
            await self._abort(context, problem)
        except GpumarketError as error:
            told = problem_of(error)
            if told.status >= 500:
                _log.warning("market_error", code=error.code, reason=error.message, hint=error.hint)
            await self._abort(context, told)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            _log.exception("unexpected", kind=type(error).__name__)
            await self._abort(context, Problem(500, "internal_error", OURS))

    async def _abort(self, context: Any, problem: Problem) -> NoReturn:
        self._room.tally.problems[problem.code] += 1
        self._room.tally.answers[f"{problem.status // 100}xx"] += 1
        trailing = tuple(problem.headers.items())
        await context.abort(STATUSES.get(problem.status, grpc.StatusCode.INVALID_ARGUMENT), problem.message, trailing)
        raise AssertionError("abort raises")


@asynccontextmanager
async def serving_grpc(service: InferenceService, listen: str, bytes_max: int) -> AsyncIterator[str]:
    """The service at host:port (0 takes a free one) while inside; host:port. Nothing, and an empty string, where `listen` is empty.

    Raises ConfigError or PortInUse.
    """
    if not listen:
        yield ""
        return
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(f"grpc_listen is {listen!r}", hint="host:port, for example 127.0.0.1:8081; empty for none")
    sizes = (("grpc.max_receive_message_length", bytes_max), ("grpc.max_send_message_length", bytes_max), ("grpc.so_reuseport", 0))
    server = grpc.aio.server(options=sizes)
    igrpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    try:
        bound = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise PortInUse(f"cannot listen on {listen}", hint="set another grpc_listen; empty for none") from error
    await server.start()
    try:
        yield f"{host}:{bound}"
    finally:
        await server.stop(1.0)


def _metadata(context: Any) -> Mapping[str, str]:
    return {name: value for name, value in context.invocation_metadata() if isinstance(value, str)}


def _asked(request: ipb.ModelInferRequest) -> Asked:
    """Raises Problem (400)."""
    _refuse(request.parameters)
    for tensor in request.inputs:
        _refuse(tensor.parameters)
    for output in request.outputs:
        _refuse(output.parameters)
    names = [output.name for output in request.outputs]
    if len(set(names)) != len(names):
        raise invalid("an output is asked for twice", "outputs")
    return Asked(_inputs(request), names or None)


def _inputs(request: ipb.ModelInferRequest) -> dict[str, Array]:
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise invalid(f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs", "raw_input_contents")
    found: dict[str, Array] = {}
    for index, tensor in enumerate(request.inputs):
        if tensor.name in found:
            raise invalid(f"input {tensor.name[:200]!r} is there twice", "inputs")
        if raw and tensor.HasField("contents"):
            raise invalid(f"input {tensor.name[:200]!r} has contents beside raw_input_contents", "inputs")
        shape = list(tensor.shape)
        if raw:
            found[tensor.name] = from_raw(tensor.name, tensor.datatype, shape, raw[index])
        else:
            found[tensor.name] = from_contents(tensor.name, tensor.datatype, shape, tensor.contents)
    return found


def _refuse(parameters: Iterable[str]) -> None:
    for name in parameters:
        raise Problem(400, "unknown_parameter", f"there is no parameter {name[:100]!r}", param=name[:100])


def _answer(request: ipb.ModelInferRequest, model_version: str, result: InferResult) -> ipb.ModelInferResponse:
    """Raw where the inputs were raw, or where an output has no typed contents: then all of them, as the standard has it."""
    typed = None if request.raw_input_contents else [to_contents(array) for array in result.outputs.values()]
    raw = typed is None or None in typed
    tensor = ipb.ModelInferResponse.InferOutputTensor
    outputs = [
        tensor(name=name, datatype=datatype_of(array.dtype), shape=array.shape, contents=None if raw or typed is None else typed[index])
        for index, (name, array) in enumerate(result.outputs.items())
    ]
    about = {f"gpumarket_{name}": ipb.InferParameter(string_param=value or "none") for name, value in market_object(result).items()}
    return ipb.ModelInferResponse(
        model_name=request.model_name,
        model_version=model_version,
        id=request.id,
        parameters=about,
        outputs=outputs,
        raw_output_contents=[to_raw(array) for array in result.outputs.values()] if raw else [],
    )

"""The network between processes: gRPC's stubs and servicers on both ends, and between them messages that are lost, late or repeated.

Unary calls are independent: each request and each reply may be lost (the caller hears "unavailable", or nothing until its deadline), may
overtake others, and a request may arrive twice. A stream keeps its order, as HTTP/2 does; it may break (both ends notice) or fall silent
(nobody does until keepalive). `taps` see every message as it leaves its sender: what is visible must be durable by then (I2).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import grpc
import grpc.aio
from simulation.virtual import PeerError, Process, Timeline, running_process

Tap = Callable[[str, str, Any], None]
"""(sender's name, method, message)"""
KEEPALIVE_SECONDS = 15.0
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Weather:
    """Chances per message; seconds of the usual and of a slow way."""

    lost: float = 0.0
    repeated: float = 0.0
    slow: float = 0.0
    usual_seconds: float = 0.02
    slow_seconds: float = 3.0


CALM = Weather()


class Aborted(PeerError):
    """`context.abort`."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: Any) -> None:
        super().__init__(details)
        self.code, self.details, self.trailing = code, details, trailing


class Network:
    """Who listens where, and how messages fare."""

    def __init__(self, timeline: Timeline, rng: random.Random) -> None:
        self.timeline, self._rng = timeline, rng
        self.weather = CALM
        self.taps: list[Tap] = []
        self.cut: set[str] = set()
        """Names of processes that nobody reaches and that reach nobody."""
        self.walls: set[frozenset[str]] = set()
        """Pairs of names between which nothing passes."""
        self.sent = self.lost = self.repeated = self.late = 0
        self._places: dict[str, Process] = {}

    def listen(self, endpoint: str, process: Process) -> None:
        self._places[endpoint] = process

    def at(self, endpoint: str) -> Process | None:
        """The live process there."""
        process = self._places.get(endpoint)
        return process if process is not None and process.alive else None

    async def dial(self, endpoint: str, key_hash: bytes) -> Channel:
        """In place of `core.rpc.open_channel`."""
        return Channel(self, running_process(), endpoint)

    def tap(self, sender: Process, method: str, message: Any) -> None:
        for tap in self.taps:
            tap(sender.name, method, message)

    def delay(self) -> float:
        """How long one message takes."""
        self.sent += 1
        if self._rng.random() < self.weather.slow:
            self.late += 1
            return self._rng.uniform(0.1, 1.0) * self.weather.slow_seconds
        return self._rng.uniform(0.2, 1.0) * self.weather.usual_seconds

    def loses(self, one: Process, endpoint: str) -> bool:
        """Whether a message between these two is lost."""
        other = self._name(endpoint)
        apart = one.name in self.cut or other in self.cut or frozenset((one.name, other)) in self.walls
        gone = self._rng.random() < self.weather.lost or apart
        self.lost += gone
        return gone

    def repeats(self) -> bool:
        again = self._rng.random() < self.weather.repeated
        self.repeated += again
        return again

    def silently(self) -> bool:
        """Whether a loss is noticed by nobody."""
        return self._rng.random() < 0.5

    def _name(self, endpoint: str) -> str:
        process = self._places.get(endpoint)
        return process.name if process is not None else ""


class Channel:
    """What the generated stubs need of a `grpc.aio.Channel`. Metadata carry nothing but trace contexts, and nobody traces here."""

    def __init__(self, net: Network, source: Process, endpoint: str) -> None:
        self._net, self._source, self._endpoint = net, source, endpoint

    def unary_unary(self, path: str, **_: Any) -> Any:
        return partial(self._ask, path)

    def unary_stream(self, path: str, **_: Any) -> Any:
        return lambda request, timeout=None, metadata=None: Call(self._net, self._source, self._endpoint, path, timeout, only=request)

    def stream_stream(self, path: str, **_: Any) -> Any:
        return lambda timeout=None, metadata=None: Call(self._net, self._source, self._endpoint, path, timeout)

    async def close(self, _grace: float | None = None) -> None:
        """Calls under way end by themselves."""

    async def _ask(self, path: str, request: Any, timeout: float | None = None, metadata: Any = None) -> Any:
        net, source = self._net, self._source
        net.tap(source, path, request)
        answer: asyncio.Future[Any] = source.loop.create_future()
        if net.repeats():
            net.timeline.after(net.delay() + 0.5, lambda: self._arrive(path, request, None))
        if net.loses(source, self._endpoint):
            if not net.silently():
                _fail(net, source, answer, grpc.StatusCode.UNAVAILABLE, "reset")
        else:
            net.timeline.after(net.delay(), lambda: self._arrive(path, request, answer))
        try:
            return await asyncio.wait_for(answer, timeout or 30.0)
        except TimeoutError as error:
            raise rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline exceeded") from error

    def _arrive(self, path: str, request: Any, answer: asyncio.Future[Any] | None) -> None:
        net, source = self._net, self._source
        there = net.at(self._endpoint)
        if there is None:
            if answer is not None:
                _fail(net, source, answer, grpc.StatusCode.UNAVAILABLE, "connection refused")
            return
        handler = _handler(there, path)
        copy = type(request).FromString(request.SerializeToString())

        async def serve() -> None:
            try:
                reply = await handler(copy, Context(there, None, source.name))
            except Aborted as error:
                if answer is not None:
                    self._reply(there, answer, error)
                return
            net.tap(there, path, reply)
            if answer is not None:
                self._reply(there, answer, type(reply).FromString(reply.SerializeToString()))

        there.loop.call_soon(lambda: there.spawn(serve()) and None)

    def _reply(self, there: Process, answer: asyncio.Future[Any], reply: Any) -> None:
        net, source = self._net, self._source
        if net.loses(source, self._endpoint):
            if not net.silently():
                _fail(net, source, answer, grpc.StatusCode.UNAVAILABLE, "reset")
            return
        net.timeline.after(net.delay(), lambda: source.call(lambda: _settle(answer, reply)))


class Call:
    """The client's end of a stream, and the pipe to the servicer's."""

    def __init__(self, net: Network, source: Process, endpoint: str, path: str, timeout: float | None = None, *, only: Any = None) -> None:
        self.net, self.source, self._endpoint, self._path = net, source, endpoint, path
        self.down: asyncio.Queue[Any] = asyncio.Queue()
        self.up: asyncio.Queue[Any] = asyncio.Queue()
        self.handler: asyncio.Task[Any] | None = None
        self.there: Process | None = None
        self.over = self.silent = False
        self._next_up = self._next_down = net.timeline.now
        self._failed: grpc.aio.AioRpcError | None = None
        self._only = only
        self._way(lambda: self._connect(), up=True)
        if timeout is not None:
            net.timeline.after(timeout, lambda: self.end(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline exceeded"))

    # --- the client's calls ----------------------------------------------------------------------------------------------------

    async def write(self, message: Any) -> None:
        if self.over and self._failed is not None:
            raise self._failed
        self.net.tap(self.source, self._path, message)
        copy = type(message).FromString(message.SerializeToString())
        self._way(lambda: self.up.put_nowait(copy), up=True)

    async def done_writing(self) -> None:
        self._way(lambda: self.up.put_nowait(EOF), up=True)

    async def read(self) -> Any:
        item = await self.down.get()
        if isinstance(item, grpc.aio.AioRpcError) or item is EOF:
            self.down.put_nowait(item)  # it stays ended
        if isinstance(item, grpc.aio.AioRpcError):
            raise item
        return item

    def cancel(self) -> bool:
        if not self.over and self.source.alive:
            self._close(grpc.StatusCode.CANCELLED, "cancelled here")
        return True

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        item = await self.read()
        if item is EOF:
            raise StopAsyncIteration
        return item

    # --- the pipe --------------------------------------------------------------------------------------------------------------

    def deliver(self, message: Any) -> None:
        """A message of the servicer, or EOF."""
        self._way(lambda: self.source.call(lambda: self.down.put_nowait(message)), up=False)

    def end(self, code: grpc.StatusCode, details: str, trailing: Any = ()) -> None:
        """Both ends hear that the stream is over."""
        if not self.over:
            self._close(code, details, trailing)

    def _way(self, work: Callable[[], None], *, up: bool) -> None:
        if self.over or self.silent or not self.source.alive:
            return
        if self.net.loses(self.source, self._endpoint):
            self.silent = self.net.silently()
            wait = KEEPALIVE_SECONDS if self.silent else self.net.delay()
            self.net.timeline.after(wait, lambda: self.end(grpc.StatusCode.UNAVAILABLE, "broken"))
            return
        moment = max(self._next_up if up else self._next_down, self.net.timeline.now + self.net.delay())
        if up:
            self._next_up = moment
        else:
            self._next_down = moment
        self.net.timeline.after(moment - self.net.timeline.now, lambda: None if self.over or self.silent else self._pass(work, up))

    def _pass(self, work: Callable[[], None], up: bool) -> None:
        if not self.source.alive:
            self.end(grpc.StatusCode.CANCELLED, "the client died")
        elif self.there is not None and not self.there.alive:
            self.end(grpc.StatusCode.UNAVAILABLE, "the server died")
        elif up and self.there is not None:
            self.there.call(work)
        else:
            work()

    def _connect(self) -> None:
        there = self.net.at(self._endpoint)
        if there is None:
            self.end(grpc.StatusCode.UNAVAILABLE, "connection refused")
            return
        self.there = there
        there.loop.call_soon(lambda: self._serve(there))
        self.net.timeline.after(1.0, self._watch)

    def _watch(self) -> None:
        """Somebody who dies is noticed, unless the line fell silent first."""
        assert self.there is not None
        if self.over:
            return
        if not self.source.alive or not self.there.alive:
            self.end(grpc.StatusCode.UNAVAILABLE, "the other side is gone")
            return
        self.net.timeline.after(1.0, self._watch)

    def _serve(self, there: Process) -> None:
        handler = _handler(there, self._path)
        context = Context(there, self, self.source.name)

        async def serve() -> None:
            try:
                if self._only is not None:
                    async for message in handler(self._only, context):
                        await context.write(message)
                else:
                    await handler(_Requests(self), context)
            except Aborted as error:
                self._way(partial(self.end, error.code, error.details, error.trailing), up=False)
                return
            except asyncio.CancelledError:
                return
            self.deliver(EOF)

        self.handler = there.spawn(serve())

    def _close(self, code: grpc.StatusCode, details: str, trailing: Any = ()) -> None:
        self.over = True
        failure = self._failed = rpc_error(code, details, trailing)
        self.source.call(lambda: self.down.put_nowait(failure))
        there, handler = self.there, self.handler
        if there is not None and handler is not None:
            there.call(handler.cancel)


class Context:
    """What the servicers need of a `grpc.aio.ServicerContext`."""

    def __init__(self, process: Process, call: Call | None, peer: str) -> None:
        self._process, self._call, self._peer = process, call, peer

    def peer(self) -> str:
        """A caller has one address here, whichever process of it calls."""
        return f"ipv4:{self._peer.replace(' ', '-')}:1"

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        raise Aborted(code, details, trailing_metadata)

    async def write(self, message: Any) -> None:
        assert self._call is not None
        if self._call.over:
            raise asyncio.CancelledError
        self._call.net.tap(self._process, self._call._path, message)
        self._call.deliver(type(message).FromString(message.SerializeToString()))

    async def read(self) -> Any:
        assert self._call is not None
        return await self._call.up.get()


class _Requests:
    """The request iterator of a servicer."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __aiter__(self) -> _Requests:
        return self

    async def __anext__(self) -> Any:
        message = await self._call.up.get()
        if message is EOF:
            raise StopAsyncIteration
        return message


def rpc_error(code: grpc.StatusCode, details: str, trailing: Any = ()) -> grpc.aio.AioRpcError:
    """The error that a caller sees."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details, "")


def stormy(rng: random.Random, strength: float) -> Weather:
    """Weather between calm (0) and bad (1)."""
    chances = [rng.random() * strength for _ in range(3)]
    return replace(CALM, lost=0.15 * chances[0], repeated=0.5 * chances[1], slow=0.4 * chances[2])


def _handler(process: Process, path: str) -> Any:
    _, service, method = path.split("/")
    return getattr(process.services[service], method)


def _fail(net: Network, source: Process, answer: asyncio.Future[Any], code: grpc.StatusCode, details: str) -> None:
    net.timeline.after(net.delay(), lambda: source.call(lambda: _settle(answer, rpc_error(code, details))))


def _settle(answer: asyncio.Future[Any], reply: Any) -> None:
    if answer.done():
        return
    if isinstance(reply, Aborted):
        answer.set_exception(rpc_error(reply.code, reply.details, reply.trailing))
    elif isinstance(reply, BaseException):
        answer.set_exception(reply)
    else:
        answer.set_result(reply)
    with contextlib.suppress(BaseException):
        answer.exception()

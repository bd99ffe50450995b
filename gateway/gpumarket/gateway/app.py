"""The HTTP server: who asks, how often, what for; and that every answer, whatever happens, has the shape that OpenAI's clients expect.

A caller that goes away cancels its handler, and with it its jobs. Never: a key, a prompt or an output in a log line or an error.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import structlog
from aiohttp import web

from gpumarket.core.errors import ConfigError, GpumarketError, PortInUse
from gpumarket.core.ports import Random
from gpumarket.gateway.call import JSON, Call, Room
from gpumarket.gateway.door import Door
from gpumarket.gateway.endpoints import ENDPOINTS, Endpoint
from gpumarket.gateway.inference_protocol.rest import SERVER
from gpumarket.gateway.openapi import document_of
from gpumarket.gateway.problems import OURS, Problem, problem_of

LINE_BYTES_MAX = 8_190
"""Of the request line, and of one header."""
KEEPALIVE_SECONDS = 75.0
_encode = msgspec.json.Encoder().encode
_log = structlog.get_logger()
_silent = logging.getLogger("gpumarket.gateway.silent")
_silent.addHandler(logging.NullHandler())
_silent.propagate = False  # what a stranger sent that is no HTTP may hold a key


class App:
    """The gateway's API on one port."""

    def __init__(self, room: Room, door: Door, random: Random) -> None:
        self._room, self._door, self._random = room, door, random
        self._document = _encode(document_of(ENDPOINTS))
        self._runner: web.AppRunner | None = None

    async def open(self, listen: str) -> str:
        """Serve at host:port (0 takes a free one); the URL. Raises ConfigError or PortInUse."""
        host, _, port = listen.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65_535:
            raise ConfigError(f"listen is {listen!r}", hint="host:port, for example 127.0.0.1:8080")
        self._runner = web.AppRunner(
            self.application(),
            access_log=None,
            logger=_silent,
            handler_cancellation=True,
            auto_decompress=False,
            keepalive_timeout=KEEPALIVE_SECONDS,
            max_line_size=LINE_BYTES_MAX,
            max_field_size=LINE_BYTES_MAX,
            shutdown_timeout=1.0,
        )
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host.strip("[]"), int(port), backlog=1_024).start()
        except OSError as error:
            await self._runner.cleanup()
            raise PortInUse(f"cannot listen on {listen}: {error.strerror}", hint="give another with --listen") from error
        return f"http://{host}:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """Stop serving; what still runs is cancelled. Safe to call twice."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def application(self) -> web.Application:
        """Routes and all."""
        app = web.Application(client_max_size=self._room.settings.body_bytes_max, middlewares=[self._shaped])
        app.router.add_get("/openapi.json", self._openapi, allow_head=False)
        app.router.add_get("/v2", self._server, allow_head=False)
        app.router.add_get("/v2/health/live", self._live, allow_head=False)
        app.router.add_get("/v2/health/ready", self._ready, allow_head=False)
        for endpoint in ENDPOINTS:
            app.router.add_route(endpoint.method, endpoint.route, self._guarded(endpoint))
        return app

    def _guarded(self, endpoint: Endpoint) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            call_id = self._new_id()
            self._room.tally.requests[endpoint.name] += 1
            call: Call | None = None
            try:
                call = Call(self._room, request, self._door.known(request.headers.get("authorization", "")), call_id)
                response = await endpoint.handler(call)
            except asyncio.CancelledError:
                self._room.tally.answers["left"] += 1
                raise
            except Exception as error:
                if call is not None and call.stream is not None and isinstance(error, ConnectionError):
                    self._room.tally.answers["left"] += 1
                    return call.stream.response  # nobody is there to read it
                response = await self._failed(endpoint, call, call_id, error)
            self._room.tally.answers[f"{response.status // 100}xx"] += 1
            return response

        return handle

    async def _failed(self, endpoint: Endpoint, call: Call | None, call_id: str, error: Exception) -> web.StreamResponse:
        problem = self._problem(error, call_id)
        self._room.tally.problems[problem.code] += 1
        if problem.status >= 500:
            _log.warning("request_failed", endpoint=endpoint.name, status=problem.status, code=problem.code, request_id=call_id)
        if call is not None and call.stream is not None:
            return await call.stream.fail(problem)
        headers = {**problem.headers, "x-request-id": call_id}
        document = problem.plain if endpoint.plain else problem.document
        return web.Response(status=problem.status, body=_encode(document), content_type=JSON, headers=headers)

    def _problem(self, error: Exception, call_id: str) -> Problem:
        if isinstance(error, Problem):
            return error
        if isinstance(error, GpumarketError):
            problem = problem_of(error)
            if problem.status >= 500:
                _log.warning("market_error", code=error.code, reason=error.message, hint=error.hint, request_id=call_id)
            return problem
        _log.exception("unexpected", request_id=call_id, kind=type(error).__name__)
        return Problem(500, "internal_error", OURS)

    @web.middleware
    async def _shaped(self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        """What the router itself refuses, in the shape of everything else."""
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status not in (404, 405, 417):
                raise
            told = {404: f"there is nothing at {request.method} {request.path[:200]}", 405: f"{request.method} is not allowed here"}
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status, "expectation_failed")
            problem = Problem(error.status, code, told.get(error.status, "this expectation is not met"))
            headers = {"x-request-id": self._new_id()} | ({"allow": error.headers["allow"]} if "allow" in error.headers else {})
            document = problem.plain if request.path.startswith("/v2") else problem.document
            return web.Response(status=error.status, body=_encode(document), content_type=JSON, headers=headers)

    async def _server(self, request: web.Request) -> web.Response:
        return self._open(SERVER)

    async def _live(self, request: web.Request) -> web.Response:
        return self._open({"live": True})

    async def _ready(self, request: web.Request) -> web.Response:
        """Without a key: whether requests are taken; whether the market has what they want is told at `observe_listen`."""
        draining = self._room.counter.draining
        return self._open({"ready": not draining}, 503 if draining else 200)

    def _open(self, document: object, status: int = 200) -> web.Response:
        return web.Response(status=status, body=_encode(document), content_type=JSON, headers={"x-request-id": self._new_id()})

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.Response(body=self._document, content_type=JSON, headers={"x-request-id": self._new_id()})

    def _new_id(self) -> str:
        return f"req_{self._random.token(16).hex()}"


@asynccontextmanager
async def serving(app: App, listen: str) -> AsyncIterator[str]:
    """The API while inside; its URL."""
    try:
        yield await app.open(listen)
    finally:
        await app.close()

"""The small HTTP server of a daemon: /metrics, /healthz, /readyz, and nothing else.

It shows and never changes anything, takes no input but the path, and is bounded: what is measured is measured once for all who ask within
a moment, and more than a few at once are turned away. It has no authentication: it listens on loopback until its owner opens it to the
network of the one who watches. Never: an address, a key, a job or a peer's words in an answer.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Generic, Protocol, TypeVar

import structlog
from aiohttp import web

from gpumarket.core.errors import ConfigError, PortInUse

T = TypeVar("T")
AT_ONCE_MAX = 16
"""Requests answered at once; the next one hears 503."""
SCRAPE_FRESH_SECONDS = 1.0
"""Metrics serve everybody who asks within this time."""
TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
_log = structlog.get_logger()


class Recent(Generic[T]):
    """What `make` answers, made at most once in `seconds`, and by one at a time: whoever comes meanwhile waits for that answer."""

    def __init__(self, make: Callable[[], Awaitable[T]], seconds: float) -> None:
        self._make, self._seconds = make, seconds
        self._made: tuple[float, T] | None = None
        self._making: asyncio.Task[T] | None = None

    async def get(self) -> T:
        """The newest answer. Raises what `make` raises; that is not remembered. A caller that leaves stops nobody else's."""
        if self._made is not None and time.monotonic() - self._made[0] < self._seconds:
            return self._made[1]
        if self._making is None:
            self._making = asyncio.create_task(self._renew())
            self._making.add_done_callback(lambda done: None if done.cancelled() else done.exception() and None)  # seen
        return await asyncio.shield(self._making)

    async def close(self) -> None:
        """Stop what is being made."""
        if self._making is not None:
            self._making.cancel()
            await asyncio.gather(self._making, return_exceptions=True)

    async def _renew(self) -> T:
        try:
            answer = await self._make()
            self._made = (time.monotonic(), answer)
            return answer
        finally:
            self._making = None


class Window:
    """`open` it, look through it at `url`, `close` it. `text` renders the metrics; `troubles` says why this process cannot work now."""

    def __init__(
        self, text: Callable[[], Awaitable[bytes]], troubles: Callable[[], Awaitable[Sequence[str]]], *, ready_fresh_seconds: float
    ) -> None:
        """`ready_fresh_seconds`: how long an answer of `troubles` serves everybody who asks."""
        self._text, self._troubles = Recent(text, SCRAPE_FRESH_SECONDS), Recent(troubles, ready_fresh_seconds)
        self._runner: web.AppRunner | None = None
        self._busy = 0
        self.url = ""

    async def open(self, listen: str) -> str:
        """Serve at host:port (0 takes a free one); answers the URL. Raises ConfigError or PortInUse."""
        host, _, port = listen.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65_535:
            raise ConfigError(f"observe_listen is {listen!r}", hint="host:port, for example 127.0.0.1:9100; empty for none")
        app = web.Application(client_max_size=1_024, middlewares=[self._bounded])
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        self._runner = web.AppRunner(app, access_log=None, keepalive_timeout=30.0, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host.strip("[]"), int(port), backlog=64).start()
        except OSError as error:
            await self._runner.cleanup()
            raise PortInUse(f"cannot listen on {listen}: {error.strerror}", hint="set another observe_listen; empty for none") from error
        self.url = f"http://{host}:{self._runner.addresses[0][1]}"
        return self.url

    async def close(self) -> None:
        """Stop serving. Safe to call twice."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await self._text.close()
            await self._troubles.close()
            await runner.cleanup()

    @web.middleware
    async def _bounded(self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        if self._busy >= AT_ONCE_MAX:
            raise web.HTTPServiceUnavailable(text="too many at once\n")
        self._busy += 1
        try:
            return await handler(request)
        finally:
            self._busy -= 1

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=await self._text.get(), headers={"Content-Type": TEXT_FORMAT})

    async def _healthz(self, request: web.Request) -> web.Response:
        """That this is answered at all says that the event loop lives."""
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        try:
            troubles = list(await self._troubles.get())
        except Exception:
            _log.exception("readiness could not be found out")
            troubles = ["readiness could not be found out; the log says why"]
        answer = json.dumps({"ready": not troubles, "reasons": troubles}) + "\n"
        return web.Response(status=503 if troubles else 200, text=answer, content_type="application/json")


class Metrics(Protocol):
    """What a daemon counts."""

    async def text(self) -> bytes: ...

    async def close(self) -> None: ...


class Readiness(Protocol):
    """What keeps a daemon from working."""

    async def troubles(self) -> Sequence[str]: ...

    async def close(self) -> None: ...


@asynccontextmanager
async def observed(listen: str, make: Callable[[], tuple[Metrics, Readiness]], ready_fresh_seconds: float) -> AsyncIterator[dict[str, str]]:
    """A window while inside; what ready.json says of it. Where `listen` is empty nothing is made. Raises as `Window.open` does."""
    if not listen:
        yield {}
        return
    metrics, readiness = make()
    window = Window(metrics.text, readiness.troubles, ready_fresh_seconds=ready_fresh_seconds)
    try:
        yield {"observe": await window.open(listen)}
    finally:
        await window.close()
        await readiness.close()
        await metrics.close()

"""A stream goes no faster than its reader: what is not read is not produced, beyond what the sockets hold."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from aiohttp import web

from gpumarket.gateway.call import Call, Room
from gpumarket.gateway.problems import Problem
from gpumarket.gateway.tally import Tally

PIECE = "x" * 4_000
PIECES = 50_000
"""Two hundred megabytes: no socket holds them."""


class Stream:
    """A server with one endpoint that streams, counting what it made."""

    def __init__(self) -> None:
        self.made = 0
        self.left = asyncio.Event()
        self.seconds: list[float] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        tally = Tally(observe_first=self.seconds.append)
        room = cast(Room, SimpleNamespace(tally=tally))
        events = Call(room, request, cast(Any, None), "req_1").events()
        try:
            for _ in range(PIECES):
                await events.send({"text": PIECE})
                self.made += 1
            return await events.end()
        finally:
            self.left.set()

    async def fail(self, request: web.Request) -> web.StreamResponse:
        room = cast(Room, SimpleNamespace(tally=Tally()))
        events = Call(room, request, cast(Any, None), "req_1").events("error")
        await events.send({"text": "a"})
        return await events.fail(Problem(502, "job_failed", "it ended"))


async def served(stream: Stream) -> tuple[web.AppRunner, int]:
    app = web.Application()
    app.router.add_get("/", stream.handle)
    app.router.add_get("/fail", stream.fail)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, runner.addresses[0][1]


async def resting(stream: Stream) -> int:
    """How much was made once nothing more is made."""
    while True:
        before = stream.made
        await asyncio.sleep(0.3)
        if before and stream.made == before:
            return before


async def test_slow_reader_holds_the_stream_back_and_one_that_leaves_ends_it() -> None:
    stream = Stream()
    runner, port = await served(stream)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200" in await reader.readline()
        first = await resting(stream)
        assert first < PIECES / 4
        for _ in range(2_000):
            assert await reader.read(2**16)
        assert await resting(stream) > first
        assert len(stream.seconds) == 1
        writer.close()
        async with asyncio.timeout(10):
            await stream.left.wait()
        assert stream.made < PIECES
    finally:
        await runner.cleanup()


async def test_stream_that_fails_ends_with_the_error_as_its_last_event() -> None:
    runner, port = await served(Stream())
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /fail HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        told = (await reader.read()).decode()
        writer.close()
        assert "text/event-stream" in told and "x-request-id: req_1" in told.lower()
        assert told.index('data: {"text":"a"}') < told.index("event: error\ndata: ")
        assert '"code":"job_failed"' in told
    finally:
        await runner.cleanup()

"""A TCP relay on loopback that can be cut, made to swallow everything, or slowed down: a link that breaks where a chaos run wants it to.

Invariant: bytes that it passes on are whole and in order; it sees TLS records and never their content.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Callable

CHUNK_BYTES = 16_384
ROUND_TRIP_SECONDS = 0.2
BYTES_PER_SECOND = 125_000
"""1 Mbit/s."""


class State(enum.Enum):
    """What a relay does with bytes."""

    OPEN = "open"
    CUT = "cut"
    """Connections are reset, new ones at once."""
    SWALLOWING = "swallowing"
    """Nothing arrives, in either direction, and nobody is told."""
    SLOW = "slow"
    """Half of ROUND_TRIP_SECONDS each way, and BYTES_PER_SECOND per connection and direction."""


class Relay:
    """Listens on a port of its own; `target` is asked for (host, port) at each connection, so that it may start later, or move."""

    def __init__(self, target: Callable[[], tuple[str, int]]) -> None:
        self._target = target
        self._state = State.OPEN
        self._server: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.address = ""
        """host:port, once it is open."""

    async def open(self) -> None:
        """Listen on a free loopback port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"

    async def close(self) -> None:
        """End every connection and listen no more."""
        if self._server is not None:
            self._server.close()
        await self._reset()

    async def set(self, state: State) -> None:
        """Change what it does. What was swallowed is gone: those connections end when it is open again, as after a long outage."""
        before, self._state = self._state, state
        if state is State.SWALLOWING:
            self._flowing.clear()
        else:
            self._flowing.set()
        if state is State.CUT or before is State.SWALLOWING:
            await self._reset()

    async def _reset(self) -> None:
        for task, writers in list(self._links.items()):
            for writer in writers:
                writer.transport.abort()
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links[task] = [writer]
        try:
            await self._flowing.wait()
            if self._state is not State.CUT:
                await self._relay(task, reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # either side went away, or the relay was told to: the connection ends with it
        finally:
            for each in self._links.pop(task):
                each.transport.abort()

    async def _relay(self, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target())
        self._links[task].append(far_writer)
        pumps = [asyncio.create_task(self._pump(reader, far_writer)), asyncio.create_task(self._pump(far_reader, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            await self._flowing.wait()
            if self._state is State.SLOW:
                await asyncio.sleep(ROUND_TRIP_SECONDS / 2 + len(data) / BYTES_PER_SECOND)
            writer.write(data)
            with contextlib.suppress(ConnectionError):  # the next read ends the pump
                await writer.drain()

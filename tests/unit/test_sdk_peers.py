"""Lines to providers: one per provider, and nobody waits for another's."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

from gpumarket.core import rpc
from gpumarket.core.errors import BadSignature
from gpumarket.core.units import Hash
from gpumarket.sdk import peers as module
from gpumarket.sdk.peers import Peers

QUICK_SECONDS = 2.0
"""Far below the 5 s after which a provider that says nothing is given up."""


@asynccontextmanager
async def provider(folder: Path) -> AsyncIterator[tuple[str, Hash]]:
    identity = rpc.load_identity(folder)
    server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
    port = server.add_secure_port("127.0.0.1:0", identity.credentials())
    await server.start()
    try:
        yield f"127.0.0.1:{port}", identity.key_hash
    finally:
        await server.stop(None)


@asynccontextmanager
async def silent() -> AsyncIterator[tuple[str, Hash]]:
    """Accepts connections and says nothing."""
    writers: list[asyncio.StreamWriter] = []

    async def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", Hash(bytes(32))
    finally:
        for writer in writers:
            writer.close()
        server.close()


@asynccontextmanager
async def peers() -> AsyncIterator[Peers]:
    lines = Peers()
    try:
        yield lines
    finally:
        await lines.close()


async def test_line_to_a_silent_provider_keeps_nobody_else_waiting(tmp_path: Path) -> None:
    async with provider(tmp_path) as good, silent() as bad, peers() as lines:
        stuck = asyncio.create_task(lines.line(*bad))
        await asyncio.sleep(0.1)
        started = time.monotonic()
        await lines.line(*good)
        await lines.release(*good)
        assert time.monotonic() - started < QUICK_SECONDS
        assert not stuck.done()


async def test_lines_to_one_provider_are_one_and_survive_a_caller_that_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    async def counted(endpoint: str, key_hash: bytes) -> grpc.aio.Channel:
        opened.append(endpoint)
        return await rpc.open_channel(endpoint, key_hash)

    monkeypatch.setattr(module, "open_channel", counted)
    async with provider(tmp_path) as good, peers() as lines:
        first, *others = [asyncio.create_task(lines.line(*good)) for _ in range(3)]
        await asyncio.sleep(0)
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        found = [await other for other in others]
        assert found[0] is found[1] is await lines.line(*good)
        assert opened == [good[0]]
        for _ in range(3):
            await lines.release(*good, broken=True)
        assert await lines.line(*good) is not found[0], "a broken line is closed when the last user leaves, not before"
        assert len(opened) == 2


async def test_line_with_another_key_is_refused_and_tried_again_next_time(tmp_path: Path) -> None:
    async with provider(tmp_path) as (endpoint, key_hash), peers() as lines:
        for _ in range(2):
            with pytest.raises(BadSignature):
                await lines.line(endpoint, Hash(bytes(32)))
        assert await lines.line(endpoint, key_hash)


async def test_idle_lines_beyond_the_limit_are_closed_and_busy_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINES_MAX", 2)
    async with contextlib.AsyncExitStack() as stack:
        lines = await stack.enter_async_context(peers())
        others = [await stack.enter_async_context(provider(tmp_path / str(i))) for i in range(4)]
        busy = await lines.line(*others[0])
        for other in others[1:]:
            await lines.line(*other)
            await lines.release(*other)
        assert await lines.line(*others[0]) is busy
        assert len(lines._lines) == 2


async def test_peers_close_while_a_line_opens_leaves_nothing_behind() -> None:
    async with silent() as bad:
        lines = Peers()
        stuck = asyncio.create_task(lines.line(*bad))
        await asyncio.sleep(0.1)
        await lines.close()
        with pytest.raises(asyncio.CancelledError):
            await stuck
        assert not lines._opening and not lines._busy

"""Pinned lines to providers, kept open between jobs: a line costs two TLS handshakes, a job on an open one none."""

from __future__ import annotations

import asyncio

import grpc.aio

from gpumarket.core.rpc import open_channel
from gpumarket.core.units import Hash

LINES_MAX = 64
"""Open lines kept; the one unused longest is closed first."""


class Peers:
    """Lines by (endpoint, TLS key hash): a provider that changes its key gets a new line."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, bytes], grpc.aio.Channel] = {}
        self._busy: dict[tuple[str, bytes], int] = {}
        self._lock = asyncio.Lock()

    async def line(self, endpoint: str, tls_key_hash: bytes) -> grpc.aio.Channel:
        """A line that trusts this key alone. Raises Unreachable or BadSignature. Give it back with `release`."""
        key = (endpoint, tls_key_hash)
        async with self._lock:
            channel = self._lines.pop(key, None) or await open_channel(endpoint, Hash(tls_key_hash))
            self._lines[key] = channel  # newest last
            self._busy[key] = self._busy.get(key, 0) + 1
            await self._shrink()
            return channel

    async def release(self, endpoint: str, tls_key_hash: bytes, *, broken: bool = False) -> None:
        """The caller is done with a line; a broken one is closed once nobody uses it."""
        key = (endpoint, tls_key_hash)
        async with self._lock:
            self._busy[key] -= 1
            if not self._busy[key]:
                del self._busy[key]
                if broken and key in self._lines:
                    await self._lines.pop(key).close(None)

    async def close(self) -> None:
        """Hang up on everybody."""
        async with self._lock:
            while self._lines:
                _, channel = self._lines.popitem()
                await channel.close(None)

    async def _shrink(self) -> None:
        for key in [k for k in self._lines if k not in self._busy][: max(0, len(self._lines) - LINES_MAX)]:
            await self._lines.pop(key).close(None)

"""Pinned lines to providers, kept open between jobs: a line costs two TLS handshakes, a job on an open one none.

Invariant: a provider that does not answer keeps waiting those alone who want it; every other line is had meanwhile.
"""

from __future__ import annotations

import asyncio

import grpc.aio

from gpumarket.core.rpc import open_channel
from gpumarket.core.units import Hash

LINES_MAX = 64
"""Open lines kept; the one unused longest is closed first."""
Key = tuple[str, bytes]


class Peers:
    """Lines by (endpoint, TLS key hash): a provider that changes its key gets a new line."""

    def __init__(self) -> None:
        self._lines: dict[Key, grpc.aio.Channel] = {}
        self._busy: dict[Key, int] = {}
        self._opening: dict[Key, asyncio.Task[grpc.aio.Channel]] = {}

    async def line(self, endpoint: str, tls_key_hash: bytes) -> grpc.aio.Channel:
        """A line that trusts this key alone. Raises Unreachable or BadSignature. Give it back with `release`."""
        key = (endpoint, tls_key_hash)
        self._busy[key] = self._busy.get(key, 0) + 1  # from now on nobody closes it, also while it opens
        try:
            channel = self._lines.pop(key, None)
            if channel is None:
                channel = await asyncio.shield(self._opened(key))
        except BaseException:
            self._leave(key)
            raise
        self._lines.pop(key, None)
        self._lines[key] = channel  # newest last
        await self._shrink()
        return channel

    async def release(self, endpoint: str, tls_key_hash: bytes, *, broken: bool = False) -> None:
        """The caller is done with a line; a broken one is closed once nobody uses it."""
        key = (endpoint, tls_key_hash)
        if not self._leave(key) and broken and key in self._lines:
            await self._lines.pop(key).close(None)

    async def close(self) -> None:
        """Hang up on everybody."""
        opening = list(self._opening.values())
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)
        while self._lines:
            _, channel = self._lines.popitem()
            await channel.close(None)

    def _opened(self, key: Key) -> asyncio.Task[grpc.aio.Channel]:
        """One opening for all who want the line; it outlives a caller that leaves."""
        task = self._opening.get(key)
        if task is None:
            task = self._opening[key] = asyncio.create_task(self._open(key), name=f"open a line to {key[0]}")
            task.add_done_callback(lambda done: None if done.cancelled() else done.exception() and None)  # seen, also when nobody waits
        return task

    async def _open(self, key: Key) -> grpc.aio.Channel:
        try:
            channel = self._lines[key] = await open_channel(key[0], Hash(key[1]))
            return channel
        finally:
            del self._opening[key]

    def _leave(self, key: Key) -> int:
        """One user fewer; how many are left."""
        left = self._busy.pop(key) - 1
        if left:
            self._busy[key] = left
        return left

    async def _shrink(self) -> None:
        for key in [k for k in self._lines if k not in self._busy][: max(0, len(self._lines) - LINES_MAX)]:
            if key not in self._busy and key in self._lines:  # another job may have come while the one before hung up
                await self._lines.pop(key).close(None)

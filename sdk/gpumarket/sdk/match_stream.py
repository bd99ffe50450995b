"""Orders and quotes on one bidirectional stream: many under way at once, replies matched by id.

When the stream breaks, everything that waits on it fails with Unreachable, and the caller asks again on a new one.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import grpc
import grpc.aio

from gpumarket.core.errors import GpumarketError, Unreachable
from gpumarket.core.rpc import from_rpc
from gpumarket.v1 import market_pb2 as mpb
from gpumarket.v1 import market_pb2_grpc as mgrpc


class MatchStream:
    """One `Market.Match` call."""

    def __init__(self, stub: mgrpc.MarketAsyncStub, peer: str) -> None:
        self._peer = f"scheduler {peer}"
        match: Any = stub.Match
        self._call: Any = match()  # grpc.aio.StreamStreamCall; its write and read are not in the stubs' generic form
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[mpb.MatchReply]] = {}
        self._write = asyncio.Lock()
        self._reader = asyncio.create_task(self._read())
        self.broken = False

    async def ask(self, request: mpb.MatchRequest, timeout_seconds: float) -> mpb.MatchReply:
        """Send a request under a fresh id and await its reply. Raises Unreachable."""
        numbered = mpb.MatchRequest()
        numbered.CopyFrom(request)
        numbered.id = next(self._ids)
        if self.broken:
            raise Unreachable(f"{self._peer} hung up")
        future: asyncio.Future[mpb.MatchReply] = asyncio.get_running_loop().create_future()
        self._waiting[numbered.id] = future
        try:
            async with self._write:
                await self._call.write(numbered)
            async with asyncio.timeout(timeout_seconds):  # wait_for would lose a cancellation that comes with the answer
                return await future
        except TimeoutError as error:
            raise Unreachable(f"{self._peer} did not answer an order in {timeout_seconds:g} s") from error
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._peer) from error
        except asyncio.InvalidStateError as error:
            raise Unreachable(f"{self._peer} hung up") from error
        finally:
            self._waiting.pop(numbered.id, None)
            if future.done() and not future.cancelled():
                future.exception()  # retrieved: a write error may have been raised in its place

    async def close(self) -> None:
        """End the call and its reader."""
        self._call.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        failure: GpumarketError = Unreachable(f"{self._peer} hung up")
        try:
            while (reply := await self._call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                future = self._waiting.get(reply.id)
                if future is not None and not future.done():
                    future.set_result(reply)
        except grpc.aio.AioRpcError as error:
            failure = from_rpc(error, self._peer)
        finally:
            self.broken = True
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(failure)

"""Connections to schedulers: where the registry says they are, pinned to the key that it names, one per scheduler and reused."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import grpc.aio

from gpumarket.core.errors import GpumarketError, Unreachable
from gpumarket.core.rpc import from_rpc, open_channel
from gpumarket.core.units import Address, Hash, hex0x
from gpumarket.v1.market_pb2_grpc import MarketStub

if TYPE_CHECKING:
    from gpumarket.v1.market_pb2_grpc import MarketAsyncStub


class Node(Protocol):
    """A registered node as the chain view shows it."""

    @property
    def roles(self) -> int: ...
    @property
    def endpoint(self) -> str: ...
    @property
    def tls_key_hash(self) -> Hash: ...


@dataclass(frozen=True, slots=True)
class Line:
    """An open connection to one scheduler."""

    scheduler: Address
    endpoint: str
    tls_key_hash: Hash
    channel: grpc.aio.Channel
    market: MarketAsyncStub


class Peers:
    """Connections by scheduler address."""

    def __init__(self, nodes: Mapping[Address, Node]) -> None:
        self._nodes = nodes
        self._lines: dict[Address, Line] = {}
        self._opening: dict[Address, asyncio.Lock] = {}

    async def line(self, scheduler: Address) -> Line:
        """The pinned connection. Raises Unreachable or BadSignature (another key than the registered one)."""
        async with self._opening.setdefault(scheduler, asyncio.Lock()):
            node = self._nodes.get(scheduler)
            if node is None or not node.endpoint:
                raise Unreachable(f"scheduler {hex0x(scheduler)} is not registered on chain", hint="it may be starting; wait")
            line = self._lines.get(scheduler)
            if line is None or (line.endpoint, line.tls_key_hash) != (node.endpoint, node.tls_key_hash):
                await self._hang_up(scheduler)
                channel = await open_channel(node.endpoint, node.tls_key_hash)
                line = Line(scheduler, node.endpoint, node.tls_key_hash, channel, MarketStub(channel))
                self._lines[scheduler] = line
        return line

    async def failed(self, line: Line, error: grpc.aio.AioRpcError) -> GpumarketError:
        """The error that an rpc failed with, as one of the tree.

        A connection that is down is given up and opened anew next time: gRPC's own reconnecting waits up to two minutes.
        """
        found = from_rpc(error, f"scheduler {hex0x(line.scheduler)}")
        if error.code() is grpc.StatusCode.UNAVAILABLE and isinstance(found, Unreachable) and self._lines.get(line.scheduler) is line:
            await self._hang_up(line.scheduler)
        return found

    async def close(self) -> None:
        for scheduler in list(self._lines):
            await self._hang_up(scheduler)

    async def _hang_up(self, scheduler: Address) -> None:
        line = self._lines.pop(scheduler, None)
        if line is not None:
            await line.channel.close(None)

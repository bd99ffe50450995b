"""One `Provider.Infer` call as a queue of events: the wire's messages in, the machine's events out.

The reader is bounded, so a provider that floods is held back by HTTP/2's flow control, not by our memory. Never: a decision about the job.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import grpc.aio

from gpumarket.core.codec import open_receipt
from gpumarket.core.errors import Busy, GpumarketError, ProtocolError, Unreachable
from gpumarket.core.rpc import from_rpc
from gpumarket.core.signing import Domain
from gpumarket.core.terms import Receipt, token_item
from gpumarket.core.units import Address, Hash, hex0x
from gpumarket.telemetry.trace_context import to_metadata
from gpumarket.v1 import provider_pb2 as ppb
from gpumarket.v1 import provider_pb2_grpc as pgrpc
from gpumarket.v1 import terms_pb2 as pb

QUEUE_MAX = 256
FAREWELL_SECONDS = 5.0
"""How long a provider may take to end the call after our last ack."""


class Lost(Exception):
    """The stream is over without a receipt. `reason` is one of RetryRequest.reason."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class InferStream:
    """An attempt under way with one provider."""

    def __init__(self, channel: grpc.aio.Channel, provider: Address, deadline_seconds: float, traceparent: str = "") -> None:
        self._provider = provider
        stub: Any = pgrpc.ProviderStub(channel)
        self._call: Any = stub.Infer(timeout=deadline_seconds, metadata=to_metadata(traceparent))
        self._queue: asyncio.Queue[ppb.InferReply | Lost] = asyncio.Queue(QUEUE_MAX)
        self._reader = asyncio.create_task(self._read())
        self._started = False

    async def send(self, message: ppb.InferRequest) -> None:
        """Write; a broken stream is noticed by the reader, which knows why."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            await self._call.write(message)

    async def receive(self, timeout_seconds: float) -> list[ppb.InferReply | Lost]:
        """All that has come, in order; empty when nothing came in this time."""
        try:
            async with asyncio.timeout(timeout_seconds):  # wait_for would lose a cancellation that comes with a reply
                first = await self._queue.get()
        except TimeoutError:
            return []
        found = [first]
        while not self._queue.empty():
            found.append(self._queue.get_nowait())
        return found

    async def finished(self, timeout_seconds: float) -> ppb.Finished | None:
        """The provider's last word, what comes before it thrown away; None when it does not come in this time."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    reply = await self._queue.get()
                    if isinstance(reply, Lost):
                        return None
                    if reply.HasField("finished"):
                        return reply.finished
        except TimeoutError:
            return None

    async def hang_up(self) -> None:
        """Drop the call at once."""
        self._call.cancel()
        await self._end_reader()

    async def say_goodbye(self) -> None:
        """Nothing more comes from us: wait until the provider has read all and ended the call, a few seconds at most."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            await self._call.done_writing()
        waiting = asyncio.create_task(self._drain())
        await asyncio.wait({waiting}, timeout=FAREWELL_SECONDS)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        self._call.cancel()
        await self._end_reader()

    async def _drain(self) -> None:
        while not isinstance(await self._queue.get(), Lost):
            pass

    async def _end_reader(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while (reply := await self._call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                self._started = self._started or reply.HasField("started")
                await self._queue.put(reply)
            lost = Lost("lost", "the provider ended the stream without a receipt")
        except grpc.aio.AioRpcError as error:
            lost = self._why(from_rpc(error, f"provider {hex0x(self._provider)}"))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            lost = Lost("lost", "the provider cancelled the call")  # grpc.aio raises CancelledError for a peer's status CANCELLED too
        await self._queue.put(lost)

    def _why(self, error: GpumarketError) -> Lost:
        if isinstance(error, Unreachable):
            return Lost("lost" if self._started else "unreachable", error.message)
        if isinstance(error, Busy) or not self._started:
            return Lost("refused", error.message)
        return Lost("failed", error.message)


def frame_items(frame: ppb.Frame) -> tuple[bytes, ...]:
    """Items of the output chain in a frame. Raises ProtocolError for one that mixes kinds."""
    if frame.tokens and frame.items:
        raise ProtocolError("a frame with tokens and rows")
    return tuple(token_item(token) for token in frame.tokens) or tuple(frame.items)


def finished_receipt(domain: Domain, finished: ppb.Finished, provider: Address) -> Receipt:
    """The receipt, its signature verified. Raises BadSignature or ProtocolError."""
    return open_receipt(domain, finished.receipt, provider)


def open_message(lease: pb.SignedLease, order: pb.JobOrder, request: bytes, salt: Hash, prefix: list[int]) -> ppb.InferRequest:
    """The first message of an attempt."""
    return ppb.InferRequest(open=ppb.InferOpen(lease=lease, order=order, request=request, salt=salt, prefix=prefix))

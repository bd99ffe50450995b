"""The Market service: opens calls, hands them to the desk, the billing or the greeter, turns refusals into errors that cross the wire."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.message import Message

from gpumarket.core.codec import CallGuard
from gpumarket.core.errors import Busy, GpumarketError, ProtocolError
from gpumarket.core.rpc import abort
from gpumarket.core.units import Address, Hash
from gpumarket.scheduler import answers
from gpumarket.scheduler.allowance import Allowance, caller_of
from gpumarket.scheduler.billing import Billing
from gpumarket.scheduler.desk import Desk
from gpumarket.scheduler.greeting import Greeter
from gpumarket.scheduler.listings import Listing, Listings
from gpumarket.scheduler.presence import Presence
from gpumarket.scheduler.spans import Spans
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import market_pb2_grpc as grpc_stubs
from gpumarket.v1 import terms_pb2

Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M", bound=Message)
A = TypeVar("A")
WATCHERS_MAX = 1_000
"""Watching takes no signature; each change of the book costs every watcher a look at it."""
STREAMS_MAX = 4_096
"""Match streams at once."""
PIPELINED_MAX = 256
"""Unanswered requests of one stream; the next one is read when there is room."""


class MarketService(grpc_stubs.MarketServicer):
    """The rpcs of market.proto."""

    def __init__(
        self,
        info: pb.SchedulerInfo,
        calls: CallGuard,
        desk: Desk,
        billing: Billing,
        greeter: Greeter,
        listings: Listings,
        presence: Presence,
        allowance: Allowance,
        spans: Spans,
    ) -> None:
        self._spans = spans
        self._info, self._calls, self._desk, self._billing = info, calls, desk, billing
        self._greeter, self._listings, self._presence, self._allowance = greeter, listings, presence, allowance
        self._watchers = self._streams = 0
        self.refused: Counter[str] = Counter()
        """Calls that were refused, by the error's code; orders are counted at the desk."""

    async def Info(self, request: pb.InfoRequest, context: Context) -> pb.SchedulerInfo:
        return self._info

    async def Match(self, request_iterator: Any, context: Context) -> None:  # type: ignore[override]
        if self._streams >= STREAMS_MAX:
            await abort(context, Busy(f"{STREAMS_MAX} match streams are open", retry_after_seconds=5.0, hint="use the streams you have"))
        self._streams += 1
        try:
            await Pipeline(context, self._desk, self._allowance, self._spans).run()
        finally:
            self._streams -= 1

    async def Retry(self, request: terms_pb2.SignedCall, context: Context) -> pb.MatchReply:
        try:
            with self._spans.call("retry", context):
                return await self._billing.retry(*self._calls.open("Market/Retry", request, pb.RetryRequest))
        except GpumarketError as error:
            self.refused[error.code] += 1
            return answers.problem(0, error)

    async def Report(self, request: terms_pb2.SignedCall, context: Context) -> pb.JobStatus:
        return await self._called(context, "Market/Report", request, pb.ReportRequest, self._billing.report)

    async def Claim(self, request: terms_pb2.SignedCall, context: Context) -> pb.ClaimReply:
        return await self._called(context, "Market/Claim", request, pb.ClaimRequest, self._claim)

    async def _claim(self, caller: Address, body: pb.ClaimRequest) -> pb.ClaimReply:
        self._greeter.holdings.claimed(caller, body)
        return await self._billing.claim(caller, body)

    async def Heartbeat(self, request_iterator: Any, context: Context) -> None:  # type: ignore[override]
        try:
            await self._greeter.serve(context)
        except GpumarketError as error:
            await abort(context, error)

    async def WatchOffers(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.OfferEvent]:
        if self._watchers >= WATCHERS_MAX:
            await abort(context, Busy(f"{WATCHERS_MAX} watch the offers already", retry_after_seconds=30.0, hint="watch another scheduler"))
        self._watchers += 1
        try:
            async for event in self._offers(request):
                yield event
        finally:
            self._watchers -= 1

    async def _offers(self, request: pb.WatchRequest) -> AsyncIterator[pb.OfferEvent]:
        revision, synced = request.from_revision, False
        while True:
            changed = self._listings.changed
            fresh, gone, now = self._listings.since(revision)
            for listing in fresh:
                if not request.model or any(m.model == request.model for m in listing.body.models):
                    yield self._offer_event(listing, now)
            for provider in gone:
                yield pb.OfferEvent(revision=now, removed=provider)
            if not synced:
                yield pb.OfferEvent(revision=now, synced=True)
            revision, synced = now, True
            await changed.wait()

    async def Explain(self, request: terms_pb2.JobOrder, context: Context) -> pb.Explanation:
        caller, before = caller_of(context.peer()), self._allowance.meter
        try:
            self._allowance.require(caller)
            return self._desk.story(request)
        except GpumarketError as error:
            await abort(context, error)
        finally:
            self._allowance.charge(caller, before)

    async def GetAccount(self, request: terms_pb2.SignedCall, context: Context) -> pb.Account:
        async def account(caller: Address, body: pb.AccountRequest) -> pb.Account:
            return await self._billing.account(caller, _hash(body.channel))

        return await self._called(context, "Market/GetAccount", request, pb.AccountRequest, account)

    async def GetJob(self, request: terms_pb2.SignedCall, context: Context) -> pb.JobStatus:
        async def status(caller: Address, body: pb.JobRequest) -> pb.JobStatus:
            return await self._billing.status(caller, _hash(body.job))

        return await self._called(context, "Market/GetJob", request, pb.JobRequest, status)

    async def Deposit(self, request: terms_pb2.SignedVoucher, context: Context) -> pb.Account:
        try:
            return await self._billing.deposit(request)
        except GpumarketError as error:
            await abort(context, error)

    async def CloseChannel(self, request: terms_pb2.SignedCall, context: Context) -> terms_pb2.SignedClose:
        async def close(caller: Address, body: pb.AccountRequest) -> terms_pb2.SignedClose:
            return await self._billing.close_channel(caller, _hash(body.channel))

        return await self._called(context, "Market/CloseChannel", request, pb.AccountRequest, close)

    async def _called(
        self,
        context: Context,
        method: str,
        request: terms_pb2.SignedCall,
        body: type[M],
        serve: Callable[[Address, M], Awaitable[A]],
    ) -> A:
        try:
            with self._spans.call(method.removeprefix("Market/").lower(), context):
                caller, message = self._calls.open(method, request, body)
                return await serve(caller, message)
        except GpumarketError as error:
            self.refused[error.code] += 1
            await abort(context, error)

    def _offer_event(self, listing: Listing, revision: int) -> pb.OfferEvent:
        rated, proven = self._presence.rating_ppm(listing.provider), self._presence.proven_mflops(listing.provider)
        return pb.OfferEvent(revision=revision, offer=listing.message, reputation_ppm=rated, proven_mflops=proven)


class Pipeline:
    """One Match stream: requests are handled as they are read, answers leave as their commits return, in any order.

    Two tasks a stream and none a message: the reader is the rpc itself, the writer drains what is ready.
    """

    def __init__(self, context: Context, desk: Desk, allowance: Allowance, spans: Spans) -> None:
        self._context, self._desk, self._allowance, self._spans = context, desk, allowance, spans
        self._caller = caller_of(context.peer())
        self._ready: deque[pb.MatchReply] = deque()
        self._unanswered = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()

    async def run(self) -> None:
        writer = asyncio.create_task(self._write(), name="match replies")
        try:
            while True:
                request = await self._context.read()
                if not isinstance(request, pb.MatchRequest):
                    break
                self._unanswered += 1
                self._handle(request)
                while self._unanswered >= PIPELINED_MAX:
                    self._room.clear()
                    await self._room.wait()
            while self._unanswered:  # half-closed: every request still gets its answer
                self._room.clear()
                await self._room.wait()
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    def _handle(self, request: pb.MatchRequest) -> None:
        before = self._allowance.meter
        try:
            self._allowance.require(self._caller)
        except Busy as error:
            self._reply(answers.problem(request.id, error))
            return
        if request.traceparent:
            self._spans.order(request, self._desk.handle, self._reply)
        else:
            self._desk.handle(request, self._reply)
        self._allowance.charge(self._caller, before)

    def _reply(self, reply: pb.MatchReply) -> None:
        self._ready.append(reply)
        self._wake.set()

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._ready:
                await self._context.write(self._ready.popleft())
                self._unanswered -= 1
                self._room.set()


def _hash(raw: bytes) -> Hash:
    if len(raw) != 32:
        raise ProtocolError(f"{len(raw)} bytes where a hash of 32 belongs")
    return Hash(raw)

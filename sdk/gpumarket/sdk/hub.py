"""The line to one scheduler: orders pipelined on one stream, signed calls beside it, found again when it restarts.

Every call here is idempotent by the protocol (orders and retries by job key, reports by job and attempt), so a line that broke is simply
opened again and the call made anew, for `patience_seconds`. Never: a call without a deadline, an endpoint that the registry does not name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from gpumarket.core.codec import signed_call
from gpumarket.core.errors import Busy, GpumarketError, MatchError, NoProvider, ProtocolError, Unreachable, WrongChain
from gpumarket.core.hostile_text import one_line
from gpumarket.core.ports import Clock, Random
from gpumarket.core.rpc import CALL_SECONDS, FILTERS_MAX, from_rpc, hangup_is_unreachable, open_channel, rebuild
from gpumarket.core.signing import Domain, Signer
from gpumarket.core.units import Address, Hash, hex0x
from gpumarket.sdk.match_stream import MatchStream
from gpumarket.telemetry.trace_context import to_metadata
from gpumarket.v1 import market_pb2 as mpb
from gpumarket.v1 import market_pb2_grpc as mgrpc
from gpumarket.v1 import terms_pb2 as pb

T = TypeVar("T")
BACKOFF_FIRST_SECONDS, BACKOFF_MAX_SECONDS = 0.1, 2.0
BUSY_PAUSE_SECONDS_MAX = 0.5
"""Between two looks for a free place: one comes free at any moment, and an order that looks seldom is overtaken by every later one."""
CAPACITY = "capacity"
"""The scheduler's filter that removes whoever would do but has no place free now."""
OFFERS_MAX = 10_000
"""Most offers read from one listing: a scheduler cannot fill the client's memory."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the registry says a scheduler listens."""

    endpoint: str
    tls_key_hash: Hash


class Hub:
    """A scheduler, by address. `locate` asks the registry each time that the line is opened."""

    def __init__(
        self,
        address: Address,
        locate: Callable[[], Awaitable[Place]],
        signer: Signer,
        domain: Domain,
        chain_id: int,
        clock: Clock,
        random: Random,
        patience_seconds: float,
        busy_seconds: float,
    ) -> None:
        self.address = address
        self._locate, self._signer, self._domain, self._chain_id = locate, signer, domain, chain_id
        self._clock, self._random, self._patience = clock, random, patience_seconds
        self._busy_seconds = busy_seconds
        self._channel: grpc.aio.Channel | None = None
        self._stream: MatchStream | None = None
        self._lock = asyncio.Lock()
        self._info: mpb.SchedulerInfo | None = None

    async def info(self) -> mpb.SchedulerInfo:
        """Its terms, read once and checked against the chain. Raises WrongChain or ProtocolError."""
        if self._info is None:
            info = await self.patiently(lambda stub: stub.Info(mpb.InfoRequest(), timeout=CALL_SECONDS))
            if info.chain_id != self._chain_id or info.registry != self._domain.contract:
                raise WrongChain(
                    f"scheduler {hex0x(self.address)} trades on chain {info.chain_id} with registry {hex0x(info.registry)}, "
                    f"we on {self._chain_id} with {hex0x(self._domain.contract)}",
                    hint="check the address book and GPUMARKET_CLIENT_SCHEDULER",
                )
            if info.address != self.address:
                raise ProtocolError(f"{hex0x(self.address)} answers as {hex0x(info.address)}")
            self._info = info
        return self._info

    async def match(self, request: mpb.MatchRequest, busy_seconds: float | None = None) -> mpb.MatchReply:
        """An order or a quote, asked again while everybody who fits is busy (None: for as long as the settings say).

        Raises NoProvider, Busy or the scheduler's refusal.
        """

        async def once() -> mpb.MatchReply:
            return accepted(await self._match_once(request))

        return await self._unless_busy(lambda: self._again(once), busy_seconds)

    async def explain(self, order: pb.JobOrder) -> mpb.Explanation:
        """Why this order would go where it goes."""
        return await self.patiently(lambda stub: stub.Explain(order, timeout=CALL_SECONDS))

    async def retry(self, request: mpb.RetryRequest, traceparent: str = "") -> mpb.Granted:
        """The next attempt. Raises NoProvider or the scheduler's refusal."""
        call = self._signing("Market/Retry", request)
        metadata = to_metadata(traceparent)

        async def once(stub: mgrpc.MarketAsyncStub) -> mpb.MatchReply:
            return accepted(await stub.Retry(call(), timeout=CALL_SECONDS, metadata=metadata))

        reply = await self.patiently(once)
        if not reply.HasField("granted"):
            raise ProtocolError("the scheduler answered a retry without a lease")
        return reply.granted

    async def report(self, request: mpb.ReportRequest, traceparent: str = "") -> mpb.JobStatus:
        """The verdict on a result. Raises Busy while the scheduler judges others' for long: send it later."""
        call = self._signing("Market/Report", request)
        metadata = to_metadata(traceparent)
        return await self._unless_busy(lambda: self.patiently(lambda stub: stub.Report(call(), timeout=CALL_SECONDS, metadata=metadata)))

    async def account(self, channel: Hash) -> mpb.Account:
        """What it says of our channel."""
        call = self._signing("Market/GetAccount", mpb.AccountRequest(channel=channel))
        return await self.patiently(lambda stub: stub.GetAccount(call(), timeout=CALL_SECONDS))

    async def job(self, job: Hash) -> mpb.JobStatus:
        """What it says of a job of ours."""
        call = self._signing("Market/GetJob", mpb.JobRequest(job=job))
        return await self.patiently(lambda stub: stub.GetJob(call(), timeout=CALL_SECONDS))

    async def close_channel(self, channel: Hash) -> pb.SignedClose:
        """Its consent to close at what was used."""
        call = self._signing("Market/CloseChannel", mpb.AccountRequest(channel=channel))
        return await self.patiently(lambda stub: stub.CloseChannel(call(), timeout=CALL_SECONDS))

    async def offers(self, model: Hash | None) -> list[mpb.OfferEvent]:
        """Every offer of a model (None: of any) that it knows now."""

        async def listed(stub: mgrpc.MarketAsyncStub) -> list[mpb.OfferEvent]:
            call = stub.WatchOffers(mpb.WatchRequest(model=model or b""), timeout=CALL_SECONDS)
            found: list[mpb.OfferEvent] = []
            async for event in call:
                if event.HasField("offer") and len(found) < OFFERS_MAX:
                    found.append(event)
                if event.synced:
                    break
            call.cancel()
            return found

        return await self.patiently(listed)

    async def patiently(self, call: Callable[[mgrpc.MarketAsyncStub], Awaitable[T]]) -> T:
        """Make an idempotent call, again while the scheduler cannot be reached. Its refusals come back as themselves."""

        async def once() -> T:
            try:
                return await call(mgrpc.MarketStub(await self._line()))
            except grpc.aio.AioRpcError as error:
                raise from_rpc(error, f"scheduler {hex0x(self.address)}") from error

        return await self._again(once)

    async def close(self) -> None:
        """Hang up."""
        async with self._lock:
            await self._hang_up()

    # --- the line ----------------------------------------------------------------------------------------------------------

    async def _unless_busy(self, once: Callable[[], Awaitable[T]], busy_seconds: float | None = None) -> T:
        """Again while the other side says busy, for a bounded time. Raises Busy after it."""
        give_up_at = self._clock.monotonic() + (self._busy_seconds if busy_seconds is None else busy_seconds)
        pause = BACKOFF_FIRST_SECONDS
        while True:
            try:
                return await once()
            except Busy:
                if self._clock.monotonic() + pause > give_up_at:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, BUSY_PAUSE_SECONDS_MAX)

    async def _again(self, once: Callable[[], Awaitable[T]]) -> T:
        give_up_at = self._clock.monotonic() + self._patience
        pause = BACKOFF_FIRST_SECONDS
        while True:
            line = self._channel
            try:
                with hangup_is_unreachable(f"scheduler {hex0x(self.address)}"):  # by another caller's `_drop`
                    return await once()
            except Unreachable:
                if self._clock.monotonic() + pause > give_up_at:
                    raise
                await self._drop(line)
            await asyncio.sleep(pause)
            pause = min(2 * pause, BACKOFF_MAX_SECONDS)

    async def _match_once(self, request: mpb.MatchRequest) -> mpb.MatchReply:
        channel = await self._line()
        if self._stream is None or self._stream.broken:
            self._stream = MatchStream(mgrpc.MarketStub(channel), hex0x(self.address))
        return await self._stream.ask(request, CALL_SECONDS)

    async def _line(self) -> grpc.aio.Channel:
        async with self._lock:
            if self._channel is None:
                place = await self._locate()
                self._channel = await open_channel(place.endpoint, place.tls_key_hash)
            return self._channel

    async def _drop(self, line: grpc.aio.Channel | None) -> None:
        """Hang up, unless another caller has opened a new line already."""
        async with self._lock:
            if self._channel is line:
                await self._hang_up()

    async def _hang_up(self) -> None:
        stream, self._stream = self._stream, None
        channel, self._channel = self._channel, None
        if stream is not None:
            await stream.close()
        if channel is not None:
            await channel.close(None)

    def _signing(self, method: str, body: Message) -> Callable[[], pb.SignedCall]:
        """Signed anew for every try: a receiver takes each call once."""

        def make() -> pb.SignedCall:
            nonce = Hash(self._random.token(32))
            return signed_call(self._signer, self._domain, method, body, self.address, self._clock.now(), nonce)

        return make


def accepted(reply: mpb.MatchReply) -> mpb.MatchReply:
    """The reply, unless it is a refusal. Raises NoProvider or Busy with the filters' counts, or the scheduler's error as itself."""
    if reply.HasField("problem"):
        problem = reply.problem
        details = {"code": problem.code, "message": problem.message, "hint": problem.hint, "retryable": problem.retryable}
        raise rebuild(details)
    if reply.HasField("no_match"):
        raise no_match(reply.no_match)
    if reply.WhichOneof("result") is None:
        raise GpumarketError("the scheduler's answer is empty; it may be of a newer version")
    return reply


def no_match(found: mpb.NoMatch) -> MatchError:
    """The refusal with its numbers: which filter removed how many. Busy when somebody fits and merely has no place free."""
    counts = [(one_line(c.filter, most=50), c.removed, one_line(c.example, most=200)) for c in found.removed[:FILTERS_MAX]]
    parts = [f"{name} removed {number}" + (f" ({example})" if example else "") for name, number, example in counts]
    removed = {name: number for name, number, _ in counts}
    if not found.considered:
        return NoProvider("no provider is known to the scheduler", hint="gpumarket market ls")
    told = "; ".join(parts) or "no reason given"
    if CAPACITY in removed:
        return Busy(f"no place is free at {found.considered} providers: {told}", hint="try again in a moment, or loosen a constraint")
    return NoProvider(
        f"none of {found.considered} providers fits: {told}",
        removed=removed,
        considered=found.considered,
        hint="gpumarket market explain, or loosen the constraint that removed most",
    )

"""Presence at every scheduler: hello with the offer, the load every second, and what comes back. One task per scheduler.

Invariant: the load says how many jobs would be taken, for this scheduler: one whose credit is used up hears zero instead of refusals.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import grpc.aio
import structlog

from gpumarket.core.codec import signed_call
from gpumarket.core.errors import GpumarketError, JournalError
from gpumarket.core.hostile_text import one_line
from gpumarket.core.ports import Clock, Random
from gpumarket.core.rpc import hangup_is_unreachable
from gpumarket.core.signing import Domain, Signer
from gpumarket.core.units import Address, Hash, hex0x
from gpumarket.node.claims import Claims
from gpumarket.node.peers import Peers
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import terms_pb2 as terms

SCHEDULERS_MAX = 32
"""Heartbeats kept: more schedulers than that could be registered by anyone."""
RECONNECT_SECONDS_MAX = 10.0
_log = structlog.get_logger()


@dataclass(slots=True)
class Presence:
    """What a scheduler last said."""

    connected: bool = False
    channel: Hash | None = None
    probe: int = 0
    notice: str = ""
    error: str = ""


class Heartbeats:
    """Keeps one stream to each scheduler that `wanted` names. `run` until cancelled."""

    def __init__(
        self,
        peers: Peers,
        claims: Claims,
        signer: Signer,
        domain: Domain,
        clock: Clock,
        randomness: Random,
        *,
        wanted: Callable[[], Iterable[Address]],
        load: Callable[[Address], pb.Load],
        offer: Callable[[], terms.SignedOffer],
        seconds: float,
    ) -> None:
        self.presence: dict[Address, Presence] = {}
        self._peers, self._claims, self._signer, self._domain = peers, claims, signer, domain
        self._clock, self._random = clock, randomness
        self._wanted, self._load, self._offer, self._seconds = wanted, load, offer, seconds
        self._beat = asyncio.Event()

    def beat(self) -> None:
        """Say the load (and the offer, when it is a new one) at once."""
        self._beat.set()
        self._beat = asyncio.Event()

    async def run(self) -> None:
        """Ends only by cancellation or a JournalError."""
        tasks: dict[Address, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                wanted = sorted(self._wanted())[:SCHEDULERS_MAX]
                for address in [a for a in tasks if a not in wanted]:
                    tasks.pop(address).cancel()
                    self.presence.pop(address, None)
                for address in wanted:
                    if address not in tasks:
                        self.presence[address] = Presence()
                        tasks[address] = group.create_task(self._keep(address))
                await asyncio.sleep(self._seconds)

    async def _keep(self, scheduler: Address) -> None:
        failures = 0
        presence = self.presence[scheduler]
        while True:
            started = self._clock.monotonic()
            try:
                await self._stream(scheduler, presence)
                presence.error = "the scheduler ended the heartbeat"
            except JournalError:
                raise
            except GpumarketError as error:
                presence.error = error.message
            presence.connected = False
            failures = 1 if self._clock.monotonic() - started > RECONNECT_SECONDS_MAX else failures + 1
            wait = min(RECONNECT_SECONDS_MAX, 0.1 * 2.0**failures) * self._jitter()
            _log.warning("heartbeat lost", scheduler=hex0x(scheduler), reason=presence.error, again_seconds=round(wait, 1))
            await asyncio.sleep(wait)

    async def _stream(self, scheduler: Address, presence: Presence) -> None:
        line = await self._peers.line(scheduler)
        call = line.market.Heartbeat()  # type: ignore[call-arg]  # the stubs want an iterator; writing needs none
        talking = asyncio.create_task(self._talk(call, scheduler, presence))
        try:
            with hangup_is_unreachable(f"scheduler {hex0x(scheduler)}"):  # by a claim that failed on the same line
                async for message in call:
                    presence.connected = True
                    await self._hear(scheduler, presence, message)
        except grpc.aio.AioRpcError as error:
            raise await self._peers.failed(line, error) from error
        finally:
            talking.cancel()
            await asyncio.gather(talking, return_exceptions=True)
            call.cancel()

    async def _talk(
        self, call: grpc.aio.StreamStreamCall[pb.HeartbeatUp, pb.HeartbeatDown], scheduler: Address, presence: Presence
    ) -> None:
        """Hello, then the load, on time or when asked. A write that fails ends this; the reader hears the reason."""
        said = self._offer()
        nonce = Hash(self._random.token(32))
        hello = signed_call(self._signer, self._domain, "Market/Heartbeat", said, scheduler, self._clock.now(), nonce)
        await call.write(pb.HeartbeatUp(hello=hello))
        await call.write(pb.HeartbeatUp(held=pb.Holdings(vouchers=self._claims.holdings(scheduler))))
        while True:
            beat = self._beat  # taken before the load is read: what changes while it is written is said at once, not a second later
            offer = self._offer()
            if offer is not said:
                await call.write(pb.HeartbeatUp(offer=offer))
                said = offer
            load = self._load(scheduler)
            load.probe = presence.probe
            await call.write(pb.HeartbeatUp(load=load))
            try:
                await asyncio.wait_for(beat.wait(), self._seconds)
            except TimeoutError:
                continue

    async def _hear(self, scheduler: Address, presence: Presence, message: pb.HeartbeatDown) -> None:
        if message.probe:
            presence.probe = message.probe
            self.beat()
        if message.channel:
            presence.channel = Hash(message.channel)
        notice = one_line(message.notice)
        if notice != presence.notice:
            presence.notice = notice
            _log.info("notice", scheduler=hex0x(scheduler), notice=notice)
        for lease in message.settled:
            self._claims.poke(Hash(lease))
        if message.HasField("voucher"):
            try:
                await self._claims.take_voucher(message.voucher)
            except JournalError:
                raise
            except GpumarketError as error:
                _log.warning("voucher refused", scheduler=hex0x(scheduler), code=error.code, reason=error.message)

    def _jitter(self) -> float:
        """Wide: all lose a scheduler in the same instant, and the waits of the first seconds add up to little else than their jitter."""
        return random.Random(self._random.token(8)).uniform(0.4, 1.2)  # noqa: S311  spreads reconnects, guards nothing

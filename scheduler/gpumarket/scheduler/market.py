"""The scheduler put together: ledger, book, desk, billing, heartbeats, behind one gRPC server. The daemon adds the world around it.

Everything it needs comes in: signer, domains, chain view, journal, chain actions, clock, randomness. Tests build the same object with a
view filled in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import grpc.aio
import structlog

from gpumarket.core.codec import CallGuard
from gpumarket.core.errors import GpumarketError, JournalError, PortInUse
from gpumarket.core.ports import Clock, Random
from gpumarket.core.rpc import SERVER_OPTIONS, ServerIdentity
from gpumarket.core.signing import Domain, Signer
from gpumarket.core.units import Hash
from gpumarket.scheduler.allowance import Allowance
from gpumarket.scheduler.billing import Billing
from gpumarket.scheduler.book import Book
from gpumarket.scheduler.challenge import Challenger
from gpumarket.scheduler.channels import Channels
from gpumarket.scheduler.desk import Desk
from gpumarket.scheduler.greeting import Greeter
from gpumarket.scheduler.holdings import Holdings
from gpumarket.scheduler.ledger import HubChannel, Ledger
from gpumarket.scheduler.listings import Listings
from gpumarket.scheduler.presence import Presence
from gpumarket.scheduler.service import MarketService
from gpumarket.scheduler.settings import SchedulerSettings
from gpumarket.scheduler.spans import Spans
from gpumarket.scheduler.spokes import ChannelActions, Spokes
from gpumarket.settlement.chain.view import ChainEvent, ChainView, NodeChanged
from gpumarket.settlement.channel import ChainRedeemed, ReceivedChannel, handle
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.redeem import earned
from gpumarket.telemetry.spans import OFF, Tracing
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import market_pb2_grpc as grpc_stubs

TICK_SECONDS = 0.25
EXPIRE_SECONDS = 5.0
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class World:
    """What the scheduler stands on."""

    signer: Signer
    domain: Domain
    channels_domain: Domain
    view: ChainView
    journal: Journal
    actions: ChannelActions
    clock: Clock
    random: Random
    token: bytes = bytes(20)
    version: str = "0"
    tracing: Tracing = OFF


class Market:
    """`open` reads the ledger, `listen` serves, `run` keeps time, `drain` and `close` end it."""

    def __init__(self, settings: SchedulerSettings, world: World) -> None:
        self.settings, self.world = settings, world
        clock, view, me = world.clock, world.view, world.signer.address
        self.book = Book(settings.weights)
        self.ledger = Ledger(world.journal, world.signer, world.channels_domain)
        self.listings = Listings(self.book, view, world.domain, clock.now() * 1_000)
        self.channels = Channels(self.ledger, view, me, world.channels_domain)
        self.presence = Presence(
            self.book,
            self.listings,
            self.ledger,
            self.channels,
            view,
            clock,
            stake_factor=settings.stake_factor,
            reservation_seconds=settings.reservation_seconds,
        )
        self.desk = Desk(settings, world.signer, world.domain, clock, self.book, self.listings, self.ledger, self.channels, self.presence)
        self.billing = Billing(
            settings,
            world.signer,
            world.domain,
            world.channels_domain,
            clock,
            self.ledger,
            self.channels,
            self.presence,
            self.desk,
            view,
        )
        self.spans = Spans(world.tracing)
        self.billing.on_ended = self.spans.settled
        self.spokes = Spokes(settings, world.actions, self.ledger, self.channels, self.presence, clock)
        calls = CallGuard(world.domain, me, clock, known=self.channels.trades)
        challenger = Challenger(world.signer, world.domain, clock, world.random, settings)
        self.greeter = Greeter(
            calls,
            clock,
            world.random,
            self.listings,
            self.presence,
            self.channels,
            Holdings(self.ledger, world.signer.address, world.channels_domain),
            self.billing,
            self.spokes,
            challenger,
            settings.challenge_repeat_seconds,
        )
        allowance = Allowance(self.book, clock)
        self.service = MarketService(
            self._info(), calls, self.desk, self.billing, self.greeter, self.listings, self.presence, allowance, self.spans
        )
        self.endpoint = ""
        self._server: grpc.aio.Server | None = None

    def open(self) -> None:
        """Read the ledger, bring it up to the chain, set the timers. Needs a running loop. Raises JournalError."""
        self.ledger.load(self.world.clock.now())
        self.channels.refresh_all()
        self.billing.recover()
        self.ledger.start()
        self.world.view.subscribe(self._chain_changed)
        _log.info("ledger_read", jobs=len(self.ledger.jobs), channels=len(self.ledger.hubs), spokes=len(self.ledger.spokes))

    async def listen(self, identity: ServerIdentity, more: Callable[[grpc.aio.Server], None] = lambda server: None) -> str:
        """Serve over TLS at the settings' address; answers host:port. Raises PortInUse."""
        server = grpc.aio.server(options=SERVER_OPTIONS)
        grpc_stubs.add_MarketServicer_to_server(self.service, server)
        more(server)
        host = self.settings.listen.rpartition(":")[0]
        try:
            port = server.add_secure_port(self.settings.listen, identity.credentials())
        except RuntimeError as error:
            raise PortInUse(f"cannot listen on {self.settings.listen}: {error}", hint="give another with --listen") from error
        await server.start()
        self._server = server
        self.endpoint = self.settings.advertise or f"{host}:{port}"
        return self.endpoint

    async def run(self, stop: asyncio.Event) -> None:
        """Keep time until `stop`. Raises JournalError when the ledger can no longer be written."""
        expire_at = 0.0
        while not stop.is_set():
            await self.billing.tick()
            self.ledger.look_after()
            if self.ledger.failure is not None:
                raise self.ledger.failure
            if self.world.clock.monotonic() >= expire_at:
                self.listings.expire(self.world.clock.now())
                expire_at = self.world.clock.monotonic() + EXPIRE_SECONDS
            try:
                await asyncio.wait_for(stop.wait(), TICK_SECONDS)
            except TimeoutError:
                continue

    async def drain(self) -> None:
        """Take no more orders, serve claims and reports for the grace, then end every stream."""
        self.desk.closed = True
        if self._server is not None:
            await self._server.stop(self.settings.drain_seconds if self._has_open_claims() else 0.5)
            self._server = None

    async def close(self) -> None:
        """Stop everything; what is in the ledger is committed."""
        await self.drain()
        await self.greeter.close()
        await self.spokes.close()
        try:
            await self.ledger.close()
        except JournalError as error:
            _log.error("ledger_not_written", reason=error.message)

    def take_gossip(self, raw: bytes) -> None:
        """An offer from p2p. One that is none is counted by the p2p process already, and left."""
        try:
            self.listings.take_raw(raw, self.world.clock.now())
        except GpumarketError as error:
            _log.info("offer_refused", reason=error.message)

    def received_channels(self) -> list[ReceivedChannel]:
        """Clients' channels, each with the voucher that the redeemer may redeem now (`gpumarket.settlement.redeem.earned`).

        A channel whose close we signed waits for that close, unless its payer closes it alone, or it expires soon.
        """
        now = self.world.clock.now()
        soon = now + self.settings.redeem_margin_seconds
        return [earned(hub.state, now) for hub in self.ledger.hubs.values() if _may_redeem(hub, soon)]

    def note_redeemed(self, channel: Hash, cumulative: int) -> None:
        """A redemption of ours was mined; the follower says so, too, before or after. Never a sum: counted twice it is free credit."""
        hub = self.ledger.hubs[channel]
        self.ledger.put_hub(handle(hub.state, ChainRedeemed(cumulative)))

    def _has_open_claims(self) -> bool:
        return any(hub.state.open or hub.state.held for hub in self.ledger.hubs.values())

    def _chain_changed(self, event: ChainEvent) -> None:
        if isinstance(event, NodeChanged):
            self.listings.node_changed(event.address)
            self.presence.restand(event.address)
            self.presence.wake(event.address)
        else:
            self.channels.on_chain_event(event)
            spoke = self.ledger.spokes.get(event.id)
            if spoke is not None:
                self.presence.restand(spoke.provider)

    def _info(self) -> pb.SchedulerInfo:
        s, world = self.settings, self.world
        return pb.SchedulerInfo(
            address=world.signer.address,
            chain_id=world.domain.chain_id,
            registry=world.domain.contract,
            channels=world.channels_domain.contract,
            token=world.token,
            fee_ppm=s.fee_ppm,
            check_seconds=s.check_seconds,
            max_job_seconds=s.max_job_seconds,
            window_units=s.window_units,
            channel_margin_seconds=s.channel_margin_seconds,
            version=world.version,
        )


def _may_redeem(hub: HubChannel, soon: int) -> bool:
    return not hub.close_signed or bool(hub.state.closing) or hub.state.expires_at <= soon

"""The scheduler as a simulated process. What the heartbeat carries of money (the newest voucher, settled leases) goes over the same bad
network as everything else (`_inform`); its loads are read directly.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, cast

from simulation.chain_model import Actions
from simulation.medium import Medium, SimJournal
from simulation.provider_role import ProviderRole
from simulation.shop import (
    CHANNELS,
    DOMAIN,
    PRESENCE_SECONDS,
    SCHEDULER,
    SCHEDULER_SETTINGS,
    TICK_SECONDS,
    Common,
    SimRandom,
    keep_redeeming,
)
from simulation.virtual import SimClock

from gpumarket.core.units import Address
from gpumarket.scheduler.greeting import gpus_key
from gpumarket.scheduler.market import Market, World
from gpumarket.scheduler.presence import Proof, Session
from gpumarket.settlement.chain.view import ChainView
from gpumarket.settlement.redeem import RedeemPolicy
from gpumarket.settlement.redeemer import Redeemer
from gpumarket.v1 import market_pb2 as mpb


class SchedulerRole:
    """The scheduler's process."""

    def __init__(self, common: Common, medium: Medium, providers: list[ProviderRole]) -> None:
        self.common, self.medium, self._providers = common, medium, providers
        self.name, self.endpoint = "scheduler", "scheduler:1"
        self.actions = Actions(common.chain, SCHEDULER.address)
        self.market: Market | None = None
        self.start()

    @property
    def alive(self) -> bool:
        return self.process.alive

    def start(self) -> None:
        self.process = self.common.process(self.name)
        self.market = None
        self._met: dict[Address, int] = {}
        self.process.loop.call_soon(lambda: self.process.live(self._live()) and None)

    async def _live(self) -> None:
        common, view = self.common, ChainView()
        common.chain.follow(self.process, view)
        clock, journal = SimClock(common.net.timeline), SimJournal(self.medium, self.process)
        world = World(SCHEDULER, DOMAIN, CHANNELS, view, cast(Any, journal), self.actions, clock, SimRandom(common.rng), token=bytes(20))
        market = Market(SCHEDULER_SETTINGS, world)
        market.open()
        self.market = market
        self.process.services["gpumarket.v1.Market"] = market.service
        common.net.listen(self.endpoint, self.process)
        redeemer = Redeemer(
            cast(Any, self.actions),
            cast(Any, journal),
            market.received_channels,
            clock,
            payer_of=lambda channel: market.ledger.hubs[channel].payer,
            policy=RedeemPolicy(margin_seconds=SCHEDULER_SETTINGS.redeem_margin_seconds),
            on_redeemed=lambda redemption: market.note_redeemed(redemption.channel, redemption.cumulative),
        )
        self.process.live(keep_redeeming(redeemer, SCHEDULER_SETTINGS.redeem_seconds))
        self.process.live(self._meet(market))
        while True:
            await market.billing.tick()
            if market.ledger.failure is not None:
                raise market.ledger.failure
            await asyncio.sleep(TICK_SECONDS)

    async def _meet(self, market: Market) -> None:
        """In place of the heartbeat streams: who is there, and who has gone."""
        while True:
            for provider in self._providers:
                self._see(market, provider)
            await asyncio.sleep(PRESENCE_SECONDS)

    def _see(self, market: Market, provider: ProviderRole) -> None:
        address, presence = provider.key.address, market.presence
        here = provider.alive and provider.hello is not None and not {provider.name, self.name} & self.common.net.cut
        session = presence.sessions.get(address)
        if not here:
            if session is not None:
                presence.end(session)
                self._met.pop(address, None)
            return
        assert provider.hello is not None
        offer, life = provider.hello
        if self._met.get(address) != life:
            listing = market.listings.take(offer, market.world.clock.now())
            presence.proofs[address] = Proof(gpus_key(listing.body), holds=True)
            session = presence.begin(address)
            self._met[address] = life
            self.process.spawn(self._inform(market, session, provider, life))
        assert session is not None
        presence.beat(session, provider.provider._load(SCHEDULER.address))
        market.spokes.ensure(address)

    async def _inform(self, market: Market, session: Session, provider: ProviderRole, life: int) -> None:
        """The downward half of a heartbeat: newest voucher and settled leases, as `greeting` tells them."""
        net, told = self.common.net, b""
        while self._met.get(provider.key.address) == life and market.presence.sessions.get(provider.key.address) is session:
            session.wake.clear()
            down = mpb.HeartbeatDown()
            spoke = market.channels.spoke(provider.key.address)
            voucher = market.billing.voucher(spoke.state.id) if spoke is not None else None
            if voucher is not None and voucher.signature != told:
                down.voucher.CopyFrom(voucher)
                told = voucher.signature
            settled, session.settled = session.settled, []
            down.settled.extend(settled)
            if down.ByteSize():
                net.tap(self.process, "Heartbeat", down)
                arrives = partial(provider.process.call, partial(provider.hear, down))
                if not net.loses(self.process, provider.endpoint):
                    net.timeline.after(net.delay(), arrives)
                if net.repeats():
                    net.timeline.after(20 * net.delay() + 2.0, arrives)  # an old copy, long after newer ones
            await session.wake.wait()

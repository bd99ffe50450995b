"""Deposits come back: channels to providers that have expired, or whose provider is gone, are closed and their rest returned.

What was vouchered is the provider's, whether it redeems or not: it is pushed on chain before the close, so that nothing is gained by a
provider's absence. A channel that has not expired is asked to close first, which gives the provider the contract's window, and no lease
goes on it from then. Must never: close a channel on which something is reserved, or take back what the ledger owes.
"""

from __future__ import annotations

import asyncio
import enum

import structlog

from gpumarket.core.errors import NetworkError
from gpumarket.core.ports import Clock
from gpumarket.core.units import Address, hex0x
from gpumarket.scheduler.ledger import Ledger, Spoke
from gpumarket.scheduler.presence import Presence
from gpumarket.scheduler.settings import SchedulerSettings
from gpumarket.settlement.chain import Actions
from gpumarket.settlement.chain.claims import Claims
from gpumarket.settlement.chain.view import ChannelOnChain
from gpumarket.settlement.channel import PaidChannel

RECLAIM_GAS = 130_000
"""Of a push, a request and a close together (upper bound)."""
_log = structlog.get_logger()


class Step(enum.StrEnum):
    """What is due on a channel."""

    REQUEST = "request"
    CLOSE = "close"


def due(state: PaidChannel, on_chain: ChannelOnChain, *, now: int, gone: bool, grace_seconds: int, cost: float) -> Step | None:
    """The step that brings a channel's rest back, None while there is none to take.

    now: unix seconds. gone: its provider has not been seen for long. grace_seconds: how much longer than its life an expired channel is
    left to its provider. cost: gas of leaving, in base units; a rest below it stays where it is.
    """
    if state.reserved or on_chain.deposit - max(state.vouchered, on_chain.claimed) <= cost:
        return None
    if now >= on_chain.expires_at + grace_seconds or 0 < on_chain.closes_at <= now:
        return Step.CLOSE
    return Step.REQUEST if gone and not on_chain.closes_at else None


class Reclaimer:
    """`reclaim()` once, or `run(stop)`. When a provider was last seen is counted from this process's start at the earliest."""

    def __init__(self, settings: SchedulerSettings, actions: Actions, ledger: Ledger, presence: Presence, clock: Clock) -> None:
        self._settings, self._actions, self._ledger, self._presence, self._clock = settings, actions, ledger, presence, clock
        self._claims = Claims(actions)
        self._started = clock.monotonic()
        self._seen: dict[Address, float] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Take back what is due until `stop`. A chain that fails is logged and tried again."""
        while not stop.is_set():
            await self.reclaim()
            try:
                await asyncio.wait_for(stop.wait(), self._settings.reclaim_seconds)
            except TimeoutError:
                continue

    async def reclaim(self) -> None:
        """One look at every channel to a provider."""
        for spoke in [spoke for spoke in self._ledger.spokes.values() if not spoke.state.closed]:
            try:
                await self._look_at(spoke)
            except NetworkError as error:
                _log.warning("spoke_not_reclaimed", channel=hex0x(spoke.state.id), reason=error.message, hint=error.hint)

    async def _look_at(self, spoke: Spoke) -> None:
        gone, now = self._is_gone(spoke.provider), self._clock.now()
        state = spoke.state
        if not (gone or spoke.leaving or state.closing or now >= state.expires_at) or state.reserved:
            return  # the usual case asks the chain nothing
        on_chain = await self._claims.state(state.id)
        if on_chain is None:
            return  # closed, and the view has not confirmed it yet
        cost = await self._claims.gas_price() * RECLAIM_GAS * self._settings.gas_value
        grace = self._settings.spoke_grace_seconds
        step = due(spoke.state, on_chain, now=now, gone=gone or spoke.leaving, grace_seconds=grace, cost=cost)
        if step is None:
            return
        spoke.leaving = True
        self._presence.restand(spoke.provider)
        if step is Step.REQUEST:
            await self._actions.request_close(state.id)
            _log.info("spoke_leaving", provider=hex0x(spoke.provider), channel=hex0x(state.id))
        else:
            await self._close(spoke, on_chain)

    async def _close(self, spoke: Spoke, on_chain: ChannelOnChain) -> None:
        """Pay what is owed, then close. What is pushed is committed in the ledger, so no later voucher can be lower (I3)."""
        await self._ledger.commit()
        owed = spoke.state.vouchered
        if owed > on_chain.claimed:
            await self._actions.push([(spoke.state.id, owed)])
        if spoke.state.reserved or spoke.state.vouchered != owed:
            return  # something was settled meanwhile: the next look pays it first
        refunded = self._actions.refunded(await self._actions.close(spoke.state.id))
        _log.info("spoke_reclaimed", provider=hex0x(spoke.provider), channel=hex0x(spoke.state.id), amount=refunded)

    def _is_gone(self, provider: Address) -> bool:
        now = self._clock.monotonic()
        if provider in self._presence.sessions:
            self._seen[provider] = now
        return now - self._seen.get(provider, self._started) >= self._settings.spoke_idle_seconds

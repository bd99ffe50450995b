"""Channels to providers: opened on a provider's first heartbeat, topped up and prolonged before they run out.

The chain's outbox is the memory of what was sent: a channel is opened under a label that names provider and turn, so that a restart in
the middle waits for the same transaction and never opens a second channel.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import structlog

from gpumarket.core.errors import GpumarketError
from gpumarket.core.ports import Clock
from gpumarket.core.units import Address, Hash, hex0x
from gpumarket.scheduler.channels import Channels
from gpumarket.scheduler.ledger import Ledger, Spoke
from gpumarket.scheduler.presence import Presence
from gpumarket.scheduler.settings import SchedulerSettings

RETRY_SECONDS = 5.0
_log = structlog.get_logger()


class ChannelActions(Protocol):
    """What this module asks of the chain (gpumarket.settlement.chain.Actions)."""

    async def open_channel(
        self, payee: Address, amount: int, expires_at: int, signer: Address | None = None, *, label: str | None = None
    ) -> Hash: ...

    async def top_up(self, channel: Hash, amount: int, expires_at: int) -> object: ...


class Spokes:
    """Sees to it that every provider that is here has a channel. One task per provider at most."""

    def __init__(
        self, settings: SchedulerSettings, actions: ChannelActions, ledger: Ledger, channels: Channels, presence: Presence, clock: Clock
    ) -> None:
        self._settings, self._actions, self._clock = settings, actions, clock
        self._ledger, self._channels, self._presence = ledger, channels, presence
        self._busy: dict[Address, asyncio.Task[None]] = {}

    def ensure(self, provider: Address) -> None:
        """Begin what the provider's channel needs; nothing when it is well or already being seen to."""
        if provider not in self._busy and self._needs(self._channels.spoke(provider)):
            task = self._busy[provider] = asyncio.create_task(self._see_to(provider), name="spoke")
            task.add_done_callback(lambda _: self._busy.pop(provider, None))

    async def close(self) -> None:
        """Stop waiting; what was sent is in the outbox and is taken up at the next start."""
        tasks = list(self._busy.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _needs(self, spoke: Spoke | None) -> bool:
        if spoke is None:
            return True
        left = spoke.state.expires_at - self._clock.now()
        return spoke.state.free < self._settings.spoke_refill_amount or left < self._settings.spoke_seconds // 4

    async def _see_to(self, provider: Address) -> None:
        try:
            spoke = self._channels.spoke(provider)
            if spoke is None:
                await self._open(provider)
            else:
                await self._refill(spoke)
        except GpumarketError as error:
            _log.warning("spoke_failed", provider=hex0x(provider), reason=error.message, hint=error.hint)
            await asyncio.sleep(RETRY_SECONDS)  # the next heartbeat tries again
        self._presence.restand(provider)
        self._presence.wake(provider)

    async def _open(self, provider: Address) -> None:
        turn = self._ledger.spokes_ever(provider)
        amount = self._settings.spoke_deposit_amount
        expires_at = self._clock.now() + self._settings.spoke_seconds
        label = f"spoke {hex0x(provider)} {turn}"
        channel = await self._actions.open_channel(provider, amount, expires_at, label=label)
        self._channels.adopt(channel, provider, amount, expires_at)
        self._presence.restand(provider)  # with the channel, or its provider is told that jobs may come before they can
        await self._ledger.commit()
        _log.info("spoke_open", provider=hex0x(provider), channel=hex0x(channel), amount=amount)

    async def _refill(self, spoke: Spoke) -> None:
        low = spoke.state.free < self._settings.spoke_refill_amount
        amount = self._settings.spoke_deposit_amount if low else 0
        expires_at = max(spoke.state.expires_at, self._clock.now() + self._settings.spoke_seconds)
        before = spoke.state.deposit
        await self._actions.top_up(spoke.state.id, amount, expires_at)
        for _ in range(120):  # until the follower has confirmed it: a second top-up for the same need would be money lying about
            if spoke.state.deposit > before or not low:
                return
            await asyncio.sleep(1.0)

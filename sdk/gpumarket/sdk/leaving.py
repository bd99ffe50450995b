"""Leaving a channel alone: the payer's way out that asks no scheduler.

Ask the contract for the close, wait out the window in which the payee may still redeem, close. Which step is due follows from the
contract's own state, so any later process takes it up, with the key that pays alone: neither the payment key nor its journal is needed
where an owner pays. Never: a step that a scheduler could refuse, one that is sent twice.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from sqlalchemy import Connection, select, update

from gpumarket.core import keystore
from gpumarket.core.errors import ConfigError, TransactionFailed
from gpumarket.core.ports import Clock, SystemClock
from gpumarket.core.settings import ChainSettings
from gpumarket.core.signing import LocalKey
from gpumarket.core.units import Address, Hash, Money, hex0x
from gpumarket.sdk.account import NOTHING
from gpumarket.sdk.chain_port import ChannelEntry
from gpumarket.sdk.funding import connect, funding_of, owner_journal, owner_of
from gpumarket.sdk.logs import log_to_stderr
from gpumarket.sdk.offline import journal_of
from gpumarket.sdk.settings import ClientSettings
from gpumarket.sdk.tables import CHANNELS
from gpumarket.settlement.journal import Journal

_TOO_EARLY = "TooEarly"
"""The contract's refusal to close before the window's end."""


class Step(enum.StrEnum):
    """What was done, or where it stands."""

    REQUESTED = "requested"
    WAITING = "waiting"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Leaving:
    """A channel on its way out. `closes_at`: from when it can be closed, unix seconds, 0 once it is; `refunded`: what came back now."""

    channel: Hash
    scheduler: Address
    step: Step
    closes_at: int = 0
    refunded: Money = NOTHING


class ExitPort(Protocol):
    """What leaving asks of the chain (`chain_link.ChainLink`)."""

    @property
    def channels(self) -> Mapping[Hash, ChannelEntry]: ...

    async def channel_now(self, channel: Hash) -> ChannelEntry | None:
        """The channel as the contract has it at this moment, None when it holds none such."""

    async def time(self) -> int:
        """The newest block's, unix seconds."""

    async def request_close(self, channel: Hash) -> int:
        """Ask for the close; from when on it can be closed."""

    async def take_back(self, channel: Hash) -> Money:
        """Close after the window or the expiry; what came back."""


async def leave_alone(
    settings: ClientSettings,
    chain_settings: ChainSettings,
    key: LocalKey,
    *,
    channel: Hash | None = None,
    clock: Clock | None = None,
) -> list[Leaving]:
    """Take the step that is due on every channel of this client (of its named scheduler's, where the settings name one), or on `channel`.

    `key` is the one that pays: the owner's where the settings name an owner. Raises ConfigError where there is nothing to leave,
    StateLocked while another process uses the client's folder, ChainError.
    """
    log_to_stderr()
    async with _opened(settings, chain_settings, key) as (chain, journal):
        chosen = [channel] if channel is not None else _known(settings, key, chain, journal)
        entries = [_payers_own(chain, key.address, found) for found in chosen]
        return [await _next_step(chain, journal, entry, clock or SystemClock()) for entry in entries]


async def _next_step(chain: ExitPort, journal: Journal, entry: ChannelEntry, clock: Clock) -> Leaving:
    channel, scheduler = entry.id, entry.payee
    state = await chain.channel_now(channel)
    if state is None:  # closed a moment ago: the view has not confirmed it yet
        return Leaving(channel, scheduler, Step.CLOSED)
    await journal.transact(partial(_take_no_more_orders, channel=channel))
    now = max(clock.now(), await chain.time())
    ends_at = min(state.closes_at or state.expires_at, state.expires_at)
    if now >= ends_at:
        try:
            return Leaving(channel, scheduler, Step.CLOSED, refunded=await chain.take_back(channel))
        except TransactionFailed as error:
            if _TOO_EARLY not in error.message:
                raise
            return Leaving(channel, scheduler, Step.WAITING, ends_at)  # this machine's clock is ahead of the chain's
    if state.closes_at:
        return Leaving(channel, scheduler, Step.WAITING, ends_at)
    closes_at = await chain.request_close(channel)
    return Leaving(channel, scheduler, Step.REQUESTED, min(closes_at, state.expires_at))


def _known(settings: ClientSettings, key: LocalKey, chain: ExitPort, journal: Journal) -> list[Hash]:
    """This client's channels that hold money: of its journal, and any that names its payment key."""
    signer = _signer(settings, key)
    listed = set(journal.read(lambda c: c.execute(select(CHANNELS.c.id)).scalars().all()))
    held = [c for c in chain.channels.values() if c.payer == key.address and not c.closed]
    ours = [c for c in held if c.id in listed or c.signer == signer]
    named = settings.scheduler_address
    found = [c.id for c in ours if named is None or c.payee == named]
    if not found:
        others = ", ".join(hex0x(c.id) for c in held)
        hint = f"this owner's other channels are left one by one: --channel, of {others}" if others else "gpumarket wallet balance"
        raise ConfigError("there is no open channel of this client" + (f" to {hex0x(named)}" if named else ""), hint=hint)
    return found


def _signer(settings: ClientSettings, key: LocalKey) -> Address:
    """The payment key's address; the payer's own where there is no other, or where its file is lost."""
    separate = owner_of(settings) is not None and settings.key_file.exists()
    return keystore.address_in(settings.key_file) if separate else key.address


def _payers_own(chain: ExitPort, payer: Address, channel: Hash) -> ChannelEntry:
    entry = chain.channels.get(channel)
    if entry is None or entry.payer != payer:
        raise ConfigError(f"channel {hex0x(channel)} is not one that {hex0x(payer)} pays into", hint="gpumarket wallet balance")
    return entry


def _take_no_more_orders(connection: Connection, channel: Hash) -> None:
    connection.execute(update(CHANNELS).where(CHANNELS.c.id == channel).values(closing=True))


@asynccontextmanager
async def _opened(settings: ClientSettings, chain_settings: ChainSettings, key: LocalKey) -> AsyncIterator[tuple[ExitPort, Journal]]:
    """The chain for the key that pays, and the client's journal; its transactions go through the journal that holds its nonces."""
    separate = owner_of(settings) is not None
    async with journal_of(settings) as journal:
        funding = funding_of(settings, key, key if separate else None)
        paying = owner_journal(settings.state, key.address) if separate else journal
        try:
            chain = await connect(chain_settings, key.address, funding, key, paying)
            try:
                yield chain, journal
            finally:
                await chain.close()
        finally:
            if paying is not journal:
                await paying.close()

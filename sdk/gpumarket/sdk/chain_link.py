"""The chain as the product has it: a checked connection, a follower in the background, a sender that owns its nonces. Brings web3.

Implements `chain_port.ChainPort` for one client: the payer's tokens, the payment key as the channels' signer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import make_url

from gpumarket.contracts.deploy import ZERO_ADDRESS as NOWHERE
from gpumarket.core.settings import ChainSettings
from gpumarket.core.signing import Domain, LocalKey
from gpumarket.core.units import Address, Hash, Money
from gpumarket.sdk.dispute_port import DisputePort
from gpumarket.sdk.logs import log
from gpumarket.settlement.chain import (
    VIEW_FILE,
    Actions,
    Chain,
    ChainView,
    ChannelOnChain,
    Follower,
    NodeOnChain,
    Sender,
    ViewFile,
    connect,
)
from gpumarket.settlement.chain.claims import Claims
from gpumarket.settlement.chain.dispute_watch import DisputeWatch
from gpumarket.settlement.chain.disputes import DisputeActions
from gpumarket.settlement.journal import Journal


@dataclass(frozen=True, slots=True)
class OnChain:
    """`dispute_port.DisputePort`."""

    actions: DisputeActions
    watch: DisputeWatch


class ChainLink:
    """Follows the contracts and sends the transactions of `key`, whose journal this is."""

    def __init__(self, chain: Chain, key: LocalKey, journal: Journal, signer: Address, payer: Address) -> None:
        self._chain = chain
        self._view = ChainView()
        database = make_url(journal.url).database
        file = ViewFile(Path(database).with_name(VIEW_FILE), chain.book) if database else None
        self._follower = Follower(chain, self._view, me=payer, file=file)
        self._sender = Sender(chain, key, journal)
        self._actions = Actions(chain, self._sender)
        self._signer, self._payer = signer, payer
        self._challenger: Sender | None = None
        self._disputes: DisputePort | None = None
        self._stop = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    @staticmethod
    async def open(settings: ChainSettings, key: LocalKey, journal: Journal, *, signer: Address, payer: Address) -> ChainLink:
        """Connect, check the contracts, read the registry. Raises WrongChain, Unreachable or ConfigError."""
        link = ChainLink(await connect(settings), key, journal, signer, payer)
        try:
            await link._follower.sync()
        except BaseException:
            await link._chain.close()
            raise
        link._following = asyncio.create_task(link._follower.run(link._stop))
        link._following.add_done_callback(link._ended)
        return link

    @property
    def chain_id(self) -> int:
        return self._chain.book.chain_id

    @property
    def market_domain(self) -> Domain:
        return self._chain.market_domain

    @property
    def channels_domain(self) -> Domain:
        return self._chain.channels_domain

    @property
    def nodes(self) -> Mapping[Address, NodeOnChain]:
        return self._view.nodes

    @property
    def channels(self) -> Mapping[Hash, ChannelOnChain]:
        return self._view.channels

    async def refresh(self) -> None:
        """Follow to the newest confirmed block."""
        await self._follower.sync()

    async def balance(self) -> Money:
        return await self._actions.balance(self._payer)

    async def faucet(self) -> None:
        await self._actions.faucet()

    async def open_channel(self, label: str, payee: Address, amount: Money, expires_at: int) -> Hash:
        await self._actions.approve()
        return await self._actions.open_channel(payee, amount, expires_at, self._signer, label=label)

    async def top_up(self, channel: Hash, amount: Money, expires_at: int) -> None:
        await self._actions.approve()
        await self._actions.top_up(channel, amount, expires_at)

    async def cooperative_close(self, channel: Hash, cumulative: Money, payee_signature: bytes) -> None:
        await self._actions.cooperative_close(channel, cumulative, payee_signature)

    # --- leaving alone (leaving.ExitPort) ------------------------------------------------------------------------------------

    async def channel_now(self, channel: Hash) -> ChannelOnChain | None:
        return await Claims(self._actions).state(channel)

    async def time(self) -> int:
        return await self._chain.time()

    async def request_close(self, channel: Hash) -> int:
        return self._actions.closes_at(await self._actions.request_close(channel))

    async def take_back(self, channel: Hash) -> Money:
        return self._actions.refunded(await self._actions.close(channel))

    def disputes(self, key: LocalKey, journal: Journal) -> DisputePort | None:
        """Disputes for `key`, which shares this link's sender where the two are one: a key's nonces have one owner."""
        if self._disputes is None and self._chain.book.disputes != NOWHERE:
            if key.address != self._sender.address:
                self._challenger = Sender(self._chain, key, journal)
            sender = self._challenger or self._sender
            self._disputes = OnChain(DisputeActions(self._chain, sender), DisputeWatch(self._chain))
        return self._disputes

    async def close(self) -> None:
        """Stop following and hang up."""
        self._stop.set()
        if self._following is not None:
            await asyncio.gather(self._following, return_exceptions=True)
        await self._sender.close()
        if self._challenger is not None:
            await self._challenger.close()
        await self._chain.close()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("chain_follower_ended", error=type(error).__name__, reason=str(error))

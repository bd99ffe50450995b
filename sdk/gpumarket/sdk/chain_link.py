"""The chain as the product has it: a checked connection, a follower in the background, a sender that owns its nonces. Brings web3.

Implements `chain_port.ChainPort` for one wallet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from gpumarket.core.settings import ChainSettings
from gpumarket.core.signing import Domain, LocalKey
from gpumarket.core.units import Address, Hash, Money
from gpumarket.sdk.desk import log
from gpumarket.settlement.chain import Actions, Chain, ChainView, ChannelOnChain, Follower, NodeOnChain, Sender, connect
from gpumarket.settlement.journal import Journal


class ChainLink:
    """Follows the contracts and sends this wallet's transactions."""

    def __init__(self, chain: Chain, key: LocalKey, journal: Journal) -> None:
        self._chain = chain
        self._view = ChainView()
        self._follower = Follower(chain, self._view)
        self._sender = Sender(chain, key, journal)
        self._actions = Actions(chain, self._sender)
        self._stop = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    @staticmethod
    async def open(settings: ChainSettings, key: LocalKey, journal: Journal) -> ChainLink:
        """Connect, check the contracts, read the registry. Raises WrongChain, Unreachable or ConfigError."""
        link = ChainLink(await connect(settings), key, journal)
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
        return await self._actions.balance()

    async def faucet(self) -> None:
        await self._actions.faucet()

    async def open_channel(self, label: str, payee: Address, amount: Money, expires_at: int) -> Hash:
        await self._actions.approve()
        return await self._actions.open_channel(payee, amount, expires_at, label=label)

    async def top_up(self, channel: Hash, amount: Money, expires_at: int) -> None:
        await self._actions.approve()
        await self._actions.top_up(channel, amount, expires_at)

    async def cooperative_close(self, channel: Hash, cumulative: Money, payee_signature: bytes) -> None:
        await self._actions.cooperative_close(channel, cumulative, payee_signature)

    async def close(self) -> None:
        """Stop following and hang up."""
        self._stop.set()
        if self._following is not None:
            await asyncio.gather(self._following, return_exceptions=True)
        await self._sender.close()
        await self._chain.close()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("chain_follower_ended", error=type(error).__name__, reason=str(error))

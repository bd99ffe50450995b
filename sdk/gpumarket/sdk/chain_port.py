"""What the client asks of the chain, as a port: tests fill in a chain in memory, the product uses `chain_link`.

The shapes are those of gpumarket.settlement.chain (ChannelOnChain, NodeOnChain), which is not imported here: it brings web3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from gpumarket.core.signing import Domain
from gpumarket.core.units import Address, Hash, Money

PROVIDER, SCHEDULER = 1, 2
"""Role bits of the registry."""


class NodeEntry(Protocol):
    """A registered provider or scheduler (settlement.chain.NodeOnChain)."""

    @property
    def operator(self) -> Address: ...
    @property
    def owner(self) -> Address: ...
    @property
    def roles(self) -> int: ...
    @property
    def stake(self) -> int: ...
    @property
    def tls_key_hash(self) -> Hash: ...
    @property
    def endpoint(self) -> str: ...


class ChannelEntry(Protocol):
    """A channel (settlement.chain.ChannelOnChain)."""

    @property
    def id(self) -> Hash: ...
    @property
    def payer(self) -> Address: ...
    @property
    def payee(self) -> Address: ...
    @property
    def signer(self) -> Address: ...
    @property
    def deposit(self) -> int: ...
    @property
    def claimed(self) -> int: ...
    @property
    def expires_at(self) -> int: ...
    @property
    def closes_at(self) -> int: ...
    @property
    def closed(self) -> bool: ...


class ChainPort(Protocol):
    """The chain as this client sees it, confirmations behind its head."""

    @property
    def chain_id(self) -> int: ...
    @property
    def market_domain(self) -> Domain: ...
    @property
    def channels_domain(self) -> Domain: ...
    @property
    def nodes(self) -> Mapping[Address, NodeEntry]: ...
    @property
    def channels(self) -> Mapping[Hash, ChannelEntry]: ...

    async def refresh(self) -> None:
        """Follow to the newest confirmed block now. Raises ChainError."""

    async def balance(self) -> Money:
        """Tokens of whoever pays: the client's wallet, or its owner's."""

    async def faucet(self) -> None:
        """Take test tokens."""

    async def open_channel(self, label: str, payee: Address, amount: Money, expires_at: int) -> Hash:
        """Approve and open; returns when it is confirmed. Called again with the same label it opens no second one. Raises
        TransactionFailed."""

    async def top_up(self, channel: Hash, amount: Money, expires_at: int) -> None:
        """Add to a deposit; `expires_at` may only grow."""

    async def cooperative_close(self, channel: Hash, cumulative: Money, payee_signature: bytes) -> None:
        """Pay the payee up to `cumulative`, take the rest back at once."""

    async def close(self) -> None:
        """Stop following."""

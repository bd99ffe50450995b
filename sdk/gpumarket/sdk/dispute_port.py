"""What a dispute asks of the chain, as ports: the product's is settlement.chain (which brings web3), tests bring their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from gpumarket.core.signing import LocalKey
from gpumarket.core.terms import VerificationProfile
from gpumarket.core.units import Address, Hash, Money
from gpumarket.settlement.disputes import Dispute, Rules
from gpumarket.settlement.journal import Journal
from gpumarket.v1 import market_pb2 as mpb


class Head(Protocol):
    """The newest block: its number, and its time in unix seconds."""

    @property
    def block(self) -> int: ...
    @property
    def time(self) -> int: ...


class Terms(Protocol):
    @property
    def rules(self) -> Rules: ...


class Seat(Protocol):
    @property
    def evidence_key(self) -> bytes: ...


class Mined(Protocol):
    @property
    def block(self) -> int: ...


class DisputeCalls(Protocol):
    """The contract's functions (settlement.chain.disputes.DisputeActions)."""

    async def terms(self) -> Terms: ...
    async def head(self) -> Head: ...
    async def quote(self, provider: Address, amount: int) -> tuple[int, int]: ...
    async def seat(self, operator: Address) -> Seat: ...
    async def funds(self) -> Money: ...
    async def credited(self) -> Money: ...
    async def challenge(self, opening: mpb.Opening, profile: VerificationProfile, nonce_commitment: Hash, evidence_hash: Hash) -> Mined: ...
    async def draw(self, dispute: Hash, nonce: Hash) -> Mined: ...
    async def post_evidence(self, dispute: Hash, sealed: bytes) -> Mined: ...
    async def finish(self, dispute: Hash) -> Mined: ...
    async def withdraw(self) -> Mined: ...


class Watch(Protocol):
    """The disputes of the chain (settlement.chain.dispute_watch)."""

    @property
    def disputes(self) -> Mapping[Hash, Dispute]: ...
    @property
    def block(self) -> int: ...
    async def sync(self) -> None: ...


class DisputePort(Protocol):
    """Both."""

    @property
    def actions(self) -> DisputeCalls: ...
    @property
    def watch(self) -> Watch: ...


@runtime_checkable
class HasDisputes(Protocol):
    """A chain connection that knows the Disputes contract."""

    def disputes(self, key: LocalKey, journal: Journal) -> DisputePort | None:
        """For `key`, whose transactions `journal` keeps. None where the network has no such contract."""

"""Everything that a job needs at hand, built once by the client and passed along."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from gpumarket.core.errors import ProtocolError
from gpumarket.core.ports import Clock, Random
from gpumarket.core.signing import Domain, Signer
from gpumarket.core.units import Address, Money
from gpumarket.sdk.account import Account
from gpumarket.sdk.chain_port import PROVIDER, ChainPort
from gpumarket.sdk.hub import Hub
from gpumarket.sdk.job_ids import JobIdLocks
from gpumarket.sdk.lease_rules import Registered
from gpumarket.sdk.logs import log
from gpumarket.sdk.peers import Peers
from gpumarket.sdk.pool import Pool
from gpumarket.sdk.schedulers import Schedulers
from gpumarket.sdk.settings import ClientSettings
from gpumarket.settlement.journal import Journal
from gpumarket.telemetry.spans import OFF, Tracing


@dataclass(slots=True)
class Desk:
    """The client's parts: wallet, chain, journal, account, the lines to schedulers and to providers."""

    settings: ClientSettings
    signer: Signer
    chain: ChainPort
    journal: Journal
    account: Account
    schedulers: Schedulers
    peers: Peers
    clock: Clock
    random: Random
    pool: Pool = field(default_factory=Pool)
    tracing: Tracing = OFF
    job_ids: JobIdLocks = field(default_factory=JobIdLocks)
    farewells: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def domain(self) -> Domain:
        """Domain of everything but vouchers."""
        return self.chain.market_domain

    @property
    def hub(self) -> Hub:
        """The line to the scheduler that new orders go to; what is ordered already has its own."""
        return self.schedulers.hub

    async def registered(self, provider: Address) -> Registered | None:
        """What the registry says of a provider; looked up again once, since our view lags by the confirmations."""
        node = self.chain.nodes.get(provider)
        if node is None:
            await self.chain.refresh()
            node = self.chain.nodes.get(provider)
        if node is None or not node.roles & PROVIDER:
            return None
        return Registered(node.owner, Money(node.stake), node.tls_key_hash)

    def owner_of(self, provider: Address) -> Address:
        """Owner of a registered provider. Raises ProtocolError for one that is not registered."""
        node = self.chain.nodes.get(provider)
        if node is None:
            raise ProtocolError(f"0x{provider.hex()} is not in the registry")
        return node.owner

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Finish something off the caller's path (saying goodbye on a stream); `settle` waits for it."""
        task = asyncio.create_task(work)
        self.farewells.add(task)
        task.add_done_callback(self._done)

    async def settle(self) -> None:
        """Wait for what `later` started."""
        if self.farewells:
            await asyncio.gather(*self.farewells, return_exceptions=True)

    def _done(self, task: asyncio.Task[None]) -> None:
        self.farewells.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.warning("farewell_failed", error=type(error).__name__, detail=str(error))

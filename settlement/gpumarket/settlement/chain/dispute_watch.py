"""Follows the Disputes contract's events into `disputes`, confirmations behind the head.

Disputes are few and their windows are hours, so a reorganisation that reaches below the cursor is met by reading everything again.
Never: a dispute made of events that were not all on one chain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gpumarket.core.units import Hash
from gpumarket.settlement.chain.connection import Chain, reachable
from gpumarket.settlement.chain.disputes import contract_of
from gpumarket.settlement.chain.reading import Checkpoint, Event, MovedUnderfoot, Reader
from gpumarket.settlement.disputes import Dispute, dispute_after

BLOCKS_PER_QUERY = 10_000
READS_MAX = 5
"""How often a range is read again while the chain moves; the next call goes on."""


class DisputeWatch:
    """`await sync()`, then read `disputes`: every dispute there ever was, by id, as of block `block`."""

    def __init__(self, chain: Chain, reader: Reader | None = None) -> None:
        self.disputes: dict[Hash, Dispute] = {}
        self._chain, self._reader = chain, reader or Reader(chain, [contract_of(chain)])
        self._cursor: Checkpoint | None = None
        self._lock = asyncio.Lock()

    @property
    def block(self) -> int:
        """Number of the newest block that was read; -1 before the first."""
        return self._cursor.number if self._cursor else -1

    def forget(self) -> None:
        """Read everything again at the next `sync`: what was read is not the whole."""
        self.disputes.clear()
        self._cursor = None

    async def sync(self) -> None:
        """Follow to head - confirmations. Raises Unreachable or ChainError; what was read until then stays."""
        async with self._lock:
            with reachable(self._chain.settings.rpc_url):
                moved = 0
                while moved < READS_MAX:
                    try:
                        if not await self._step():
                            return
                    except MovedUnderfoot:
                        moved += 1

    async def _step(self) -> bool:
        """One range; False when there is no more to read."""
        goal = int(await self._chain.w3.eth.block_number) - self._chain.settings.confirmations
        if self._cursor is not None and await self._reader.hash(self._cursor.number) != self._cursor.hash:
            self.forget()
        start = self._cursor.number + 1 if self._cursor else self._chain.book.deployed_block
        end = min(goal, start + BLOCKS_PER_QUERY - 1)
        if end < start:
            return False
        events, checkpoint = await self._reader.read(start, end, self._cursor)
        self._take(events)
        self._cursor = checkpoint
        return end < goal

    def _take(self, events: Sequence[Event]) -> None:
        """All of a range, or nothing of it."""
        staged: dict[Hash, Dispute] = {}
        for event in events:
            if "id" not in event.args:
                continue
            key = Hash(bytes(event.args["id"]))
            after = dispute_after(staged.get(key) or self.disputes.get(key), event.name, event.args)
            if after is not None:
                staged[key] = after
        self.disputes |= staged

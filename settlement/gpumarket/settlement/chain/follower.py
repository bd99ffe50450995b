"""Follows the chain's events into a ChainView, `confirmations` blocks behind the head, and takes them back when the chain does.

The cursor is a block's number *and hash*. When that hash is no longer on the chain, the follower undoes its changes back to the newest
block that still is, and reads on from there; deeper than it remembers, it starts again from the deployment.
Never: state from a block that was not on one chain with all the others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from gpumarket.core.errors import NetworkError
from gpumarket.core.units import Address, Hash, parse_address
from gpumarket.settlement.chain.connection import Chain, reachable
from gpumarket.settlement.chain.view import ChainEvent, ChainView, ChannelChanged, NodeChanged, channel_after, node_after

if TYPE_CHECKING:
    from web3.types import LogReceipt

BLOCKS_PER_QUERY = 2_000
REMEMBERED = 256
"""Checkpoints kept: how many synchronisations back a reorganisation can be undone without starting again."""
_log = structlog.get_logger()


class _Checkpoint(NamedTuple):
    number: int
    hash: bytes


class _Undo(NamedTuple):
    block: int
    table: dict[Any, Any]
    key: bytes
    before: Any


class _MovedUnderfoot(Exception):
    """The chain changed between two queries that belong together."""


class Follower:
    """`await sync()` brings the view up to date once; `run(stop)` keeps it so."""

    def __init__(self, chain: Chain, view: ChainView) -> None:
        self._chain, self._view = chain, view
        self._checkpoints: deque[_Checkpoint] = deque(maxlen=REMEMBERED)
        self._undo: list[_Undo] = []
        self._lock = asyncio.Lock()
        self._decoders = _decoders(chain)
        self.rewinds = 0
        """How many times the chain took something back that was already in the view."""

    async def sync(self) -> None:
        """Follow to head - confirmations. Raises Unreachable or ChainError; the view is then as of its last block."""
        async with self._lock:
            changed: set[ChainEvent] = set()
            try:
                with reachable(self._chain.settings.rpc_url):
                    while not await self._step(changed):
                        pass
            finally:
                for event in sorted(changed, key=repr):  # also after a failure: what is in the view is published
                    self._view.publish(event)

    async def run(self, stop: asyncio.Event) -> None:
        """Sync every `poll_seconds` until `stop`. An unreachable chain is logged once and tried again; other errors end it."""
        down = False
        while not stop.is_set():
            try:
                await self.sync()
                down = False
            except NetworkError as error:
                if not error.retryable:
                    raise
                if not down:
                    _log.warning("chain_unreachable", reason=error.message, hint=error.hint)
                down = True
            try:
                await asyncio.wait_for(stop.wait(), self._chain.settings.poll_seconds)
            except TimeoutError:
                continue

    async def _step(self, changed: set[ChainEvent]) -> bool:
        """One range of blocks. True when there is no more to do now."""
        await self._rewind(changed)
        head = int(await self._chain.w3.eth.block_number)
        goal = head - self._chain.settings.confirmations
        start = self._checkpoints[-1].number + 1 if self._checkpoints else self._chain.book.deployed_block
        end = min(goal, start + BLOCKS_PER_QUERY - 1)
        if end < start:
            return True
        try:
            logs, checkpoint = await self._read(start, end)
        except _MovedUnderfoot:
            await asyncio.sleep(0.05)  # a reorganisation in progress; the rewind at the next step finds where it forked
            return False
        for log in logs:
            self._apply(log, changed)
        self._checkpoints.append(checkpoint)
        self._view.block = end
        oldest = self._checkpoints[0].number
        if self._undo and self._undo[0].block <= oldest:
            self._undo = [entry for entry in self._undo if entry.block > oldest]
        return end == goal

    async def _read(self, start: int, end: int) -> tuple[list[LogReceipt], _Checkpoint]:
        """Logs of a range, and its end as a checkpoint. The hashes of end and cursor are read again afterwards: all is of one chain."""
        eth = self._chain.w3.eth
        before = await self._hash(end)
        addresses: Any = [self._chain.channels.address, self._chain.registry.address]
        logs = await eth.get_logs({"address": addresses, "fromBlock": start, "toBlock": end})
        cursor = self._checkpoints[-1] if self._checkpoints else None
        after = await self._hash(end)
        if before is None or after != before or (cursor and await self._hash(cursor.number) != cursor.hash):
            raise _MovedUnderfoot
        return sorted(logs, key=lambda log: (log["blockNumber"], log["logIndex"])), _Checkpoint(end, before)

    async def _rewind(self, changed: set[ChainEvent]) -> None:
        if not self._checkpoints or await self._hash(self._checkpoints[-1].number) == self._checkpoints[-1].hash:
            return
        self.rewinds += 1
        while self._checkpoints and await self._hash(self._checkpoints[-1].number) != self._checkpoints[-1].hash:
            self._checkpoints.pop()
        if not self._checkpoints:
            self._forget(changed)
            return
        self._view.block = self._checkpoints[-1].number
        while self._undo and self._undo[-1].block > self._view.block:
            entry = self._undo.pop()
            if entry.before is None:
                entry.table.pop(entry.key, None)
            else:
                entry.table[entry.key] = entry.before
            changed.add(self._event(entry.table, entry.key))

    def _forget(self, changed: set[ChainEvent]) -> None:
        view = self._view
        changed |= {ChannelChanged(key) for key in view.channels} | {NodeChanged(key) for key in view.nodes}
        view.channels.clear()
        view.nodes.clear()
        view.block = -1
        self._undo.clear()

    async def _hash(self, number: int) -> bytes | None:
        """The block's hash now; None when the chain is shorter."""
        from web3.exceptions import BlockNotFound

        try:
            block = await self._chain.w3.eth.get_block(number)
        except BlockNotFound:
            return None
        return bytes(block["hash"])

    def _apply(self, log: LogReceipt, changed: set[ChainEvent]) -> None:
        decode = self._decoders.get((log["address"], bytes(log["topics"][0])))
        if decode is None:
            return
        event = decode(log)
        name, args = event["event"], event["args"]
        if log["address"] == self._chain.channels.address:
            key: bytes = bytes(args["id"]) if "id" in args else b""
            table: dict[Any, Any] = self._view.channels
            after: Any = channel_after(table.get(key), name, args)
        else:
            key = parse_address(args["operator"])
            table = self._view.nodes
            after = node_after(table.get(key), name, args)
        if after is None:
            return
        self._undo.append(_Undo(log["blockNumber"], table, key, table.get(key)))
        table[key] = after
        changed.add(self._event(table, key))

    def _event(self, table: dict[Any, Any], key: bytes) -> ChainEvent:
        return ChannelChanged(Hash(key)) if table is self._view.channels else NodeChanged(Address(key))


def _decoders(chain: Chain) -> dict[tuple[str, bytes], Callable[[Any], Any]]:
    from eth_utils.abi import event_abi_to_log_topic

    found: dict[tuple[str, bytes], Callable[[Any], Any]] = {}
    for contract in (chain.channels, chain.registry):
        for entry in contract.abi:
            if entry["type"] == "event":
                found[(contract.address, event_abi_to_log_topic(entry))] = contract.events[entry["name"]]().process_log
    return found

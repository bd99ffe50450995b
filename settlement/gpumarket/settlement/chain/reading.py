"""Reads a range of blocks as decoded events, and refuses what a node cannot mean.

Invariant: all that `read` returns is of one chain, from the contracts that were asked for, inside the range, each event once, in order.
What a node leaves out is not seen here: that is what `audit` is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from gpumarket.core.errors import InconsistentChain
from gpumarket.settlement.chain.connection import Chain

if TYPE_CHECKING:
    from web3.types import LogReceipt


class Checkpoint(NamedTuple):
    """A block that was read up to."""

    number: int
    hash: bytes


class Event(NamedTuple):
    """One event of one of our contracts. `contract` is its checksummed address."""

    contract: str
    block: int
    name: str
    args: Mapping[str, Any]


class MovedUnderfoot(Exception):
    """The chain changed between two queries that belong together: read again."""


class Reader:
    """Reads the events of the market's contracts: channels and registry, unless others are named."""

    def __init__(self, chain: Chain, contracts: Sequence[Any] | None = None) -> None:
        self._chain = chain
        self._decoders = _decoders(contracts or [chain.channels, chain.registry])
        self._addresses = sorted({address for address, _ in self._decoders})

    async def read(self, start: int, end: int, cursor: Checkpoint | None) -> tuple[list[Event], Checkpoint]:
        """Events of blocks start..end, and `end` as a checkpoint. The hashes of end and cursor are read again afterwards.

        Raises MovedUnderfoot, or InconsistentChain when the node's logs contradict the question.
        """
        before = await self.hash(end)
        asked: Any = {"address": self._addresses, "fromBlock": start, "toBlock": end}
        logs = await self._chain.w3.eth.get_logs(asked)
        after = await self.hash(end)
        if before is None or after != before or (cursor and await self.hash(cursor.number) != cursor.hash):
            raise MovedUnderfoot
        checkpoint = Checkpoint(end, before)
        return [self._decode(log) for log in self._checked(logs, start, checkpoint) if self._known(log)], checkpoint

    async def hash(self, number: int) -> bytes | None:
        """The block's hash now; None when this node's chain is shorter."""
        from web3.exceptions import BlockNotFound

        try:
            block = await self._chain.w3.eth.get_block(number)
        except BlockNotFound:
            return None
        if int(block["number"]) != number:
            raise InconsistentChain(f"asked for block {number}, the node answers with block {int(block['number'])}")
        return bytes(block["hash"])

    def _checked(self, logs: Sequence[LogReceipt], start: int, end: Checkpoint) -> list[LogReceipt]:
        """Once each and in order. A log that cannot be meant is refused, not skipped: the others of its answer deserve no more belief."""
        seen: dict[tuple[int, int], LogReceipt] = {}
        for log in logs:
            at = (int(log["blockNumber"]), int(log["logIndex"]))
            if log.get("removed"):
                raise MovedUnderfoot
            if not start <= at[0] <= end.number:
                raise InconsistentChain(f"asked for the events of blocks {start} to {end.number}, the node gives one of block {at[0]}")
            if at[0] == end.number and bytes(log["blockHash"]) != end.hash:
                raise MovedUnderfoot
            if log["address"] not in self._addresses:
                raise InconsistentChain(f"the node gives an event of {log['address']}, which was not asked for")
            if seen.setdefault(at, log) != log:
                raise InconsistentChain(f"the node gives two different events with the place {at[1]} in block {at[0]}")
        return [seen[at] for at in sorted(seen)]

    def _known(self, log: LogReceipt) -> bool:
        return bool(log["topics"]) and (log["address"], bytes(log["topics"][0])) in self._decoders

    def _decode(self, log: LogReceipt) -> Event:
        decoded = self._decoders[(log["address"], bytes(log["topics"][0]))](log)
        return Event(log["address"], int(log["blockNumber"]), decoded["event"], decoded["args"])


def _decoders(contracts: Sequence[Any]) -> dict[tuple[str, bytes], Callable[[Any], Any]]:
    from eth_utils.abi import event_abi_to_log_topic

    found: dict[tuple[str, bytes], Callable[[Any], Any]] = {}
    for contract in contracts:
        for entry in contract.abi:
            if entry["type"] == "event":
                found[(contract.address, event_abi_to_log_topic(entry))] = contract.events[entry["name"]]().process_log
    return found

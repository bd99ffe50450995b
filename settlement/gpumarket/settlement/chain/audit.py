"""Compares what was derived from events with what the contracts themselves say, so that an event that a node left out is found.

A node whose log index lags, or that leaves events out, still answers `eth_call`; with a second endpoint the calls go there. Two sources
that contradict each other are both not believed: the caller reads again, and takes nothing until they agree.
Must never: change the view.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from gpumarket.core.errors import InconsistentChain
from gpumarket.core.units import Address, Hash, parse_address
from gpumarket.settlement.chain.connection import Chain, reachable
from gpumarket.settlement.chain.reading import Checkpoint, MovedUnderfoot
from gpumarket.settlement.chain.view import ChainView, ChannelOnChain, NodeOnChain

ROUND = 8
"""Entries of the view that are compared per round beside those that just changed; own channels take the larger part."""
AT_ONCE = 16

Derived = ChannelOnChain | NodeOnChain


class Auditor:
    """`check(entries, at)` compares some entries, `next_round(view)` chooses which of the unchanged ones are due."""

    def __init__(self, chain: Chain, me: Address | None = None) -> None:
        self._chain, self._alone = chain.second or chain, chain.second is None
        self._me = me
        self._turn = 0

    async def check(self, entries: Iterable[Derived], at: Checkpoint) -> None:
        """Raises InconsistentChain naming the first entry that the contract's state in that block contradicts, MovedUnderfoot when the
        block is another one by now, Unreachable when the state cannot be had."""
        with reachable(self._chain.settings.rpc_url):
            await self._same_block(at)
            chosen = list(entries)
            for start in range(0, len(chosen), AT_ONCE):
                part = chosen[start : start + AT_ONCE]
                for derived, said in zip(part, await asyncio.gather(*(self._state(d, at.number) for d in part)), strict=True):
                    if not agree(derived, said):
                        raise _contradiction(derived, said, at)

    async def check_gone(self, entries: Iterable[Derived], at: Checkpoint) -> None:
        """Raises InconsistentChain unless the contracts know nothing of these either: events that vanish must have left no state."""
        with reachable(self._chain.settings.rpc_url):
            for entry in entries:
                said = await self._state(entry, at.number)
                if said is not None:
                    raise _contradiction(entry, said, at, "the events are gone, the contract's own state is not")

    def next_round(self, view: ChainView) -> list[Derived]:
        """The next entries in turn: own channels first (all of them when they are few), then the rest of the registry."""
        mine = [c for c in view.channels.values() if not c.closed and self._me in (c.payer, c.payee)]
        nodes = [n for n in view.nodes.values() if n.roles or n.stake]
        self._turn += 1
        share = ROUND * 3 // 4
        return [*_in_turn(mine, share, self._turn), *_in_turn(nodes, ROUND - share, self._turn)]

    async def _same_block(self, at: Checkpoint) -> None:
        block = await self._chain.w3.eth.get_block(at.number)
        if bytes(block["hash"]) != at.hash:
            if self._alone:
                raise MovedUnderfoot  # it has just changed its mind
            raise InconsistentChain(
                f"block {at.number} is 0x{at.hash.hex()} for one endpoint and 0x{bytes(block['hash']).hex()} for the other",
                hint="one of rpc_url and check_url is on a fork or on another chain; nothing is believed until they agree",
            )

    async def _state(self, entry: Derived, block: int) -> Derived | None:
        if isinstance(entry, ChannelOnChain):
            return channel_from_state(entry.id, await self._chain.channels.functions.channel(entry.id).call(block_identifier=block))
        operator = self._chain.w3.to_checksum_address(entry.operator)
        found = await self._chain.registry.functions.node(operator).call(block_identifier=block)
        return node_from_state(self._chain, entry.operator, found)


def channel_from_state(channel: Hash, found: Sequence[Any]) -> ChannelOnChain | None:
    """`PaymentChannels.channel` as a value; None when the contract holds no such channel (never opened, or closed)."""
    signer, deposit, payee, claimed, payer, expires_at, closes_at = found
    if not int(signer, 16):
        return None
    return ChannelOnChain(
        channel, parse_address(payer), parse_address(payee), parse_address(signer), deposit, claimed, expires_at, closes_at
    )


def node_from_state(chain: Chain, operator: Address, found: Sequence[Any]) -> NodeOnChain | None:
    """`StakeRegistry.node` as a value; None for one that never registered."""
    names = [part["name"] for part in chain.registry.get_function_by_name("node").abi["outputs"][0]["components"]]
    said = dict(zip(names, found, strict=True))
    if not int(said["owner"], 16):
        return None
    return NodeOnChain(
        operator=operator,
        owner=parse_address(said["owner"]),
        roles=said["roles"],
        stake=said["stake"],
        unbonding=said["unbonding"],
        unbonding_at=said["availableAt"],
        locked=said["locked"],
        staked_since=said["stakedSince"],
        p2p_id=said["p2pId"],
        tls_key_hash=Hash(said["tlsKeyHash"]),
        endpoint=said["endpoint"],
    )


def agree(derived: Derived, said: Derived | None) -> bool:
    """Whether events and state tell the same. A closed channel has no state left."""
    if isinstance(derived, ChannelOnChain) and derived.closed:
        return said is None
    return derived == said


def _in_turn(entries: list[Any], count: int, turn: int) -> list[Any]:
    if len(entries) <= count:
        return entries
    start = turn * count % len(entries)
    return (entries + entries)[start : start + count]


def _contradiction(derived: Derived, said: Derived | None, at: Checkpoint, how: str = "") -> InconsistentChain:
    what = f"channel 0x{derived.id.hex()}" if isinstance(derived, ChannelOnChain) else f"node 0x{derived.operator.hex()}"
    fields = [n for n in type(derived).__slots__ if getattr(derived, n) != getattr(said, n, None)] if said is not None else ["existence"]
    how = how or f"the events and the contract's own state differ in {', '.join(fields)}"
    return InconsistentChain(
        f"{what} at block {at.number}: {how}; the endpoint leaves events out, or is not in step with itself",
        hint="name another endpoint with GPUMARKET_CHAIN_RPC_URL, and a second one with GPUMARKET_CHAIN_CHECK_URL",
    )

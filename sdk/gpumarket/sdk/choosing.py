"""Which scheduler to trade through: the one that is named, else the lowest fee of the registered ones, larger stake first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from gpumarket.core.errors import GpumarketError, Unreachable
from gpumarket.core.units import Address, hex0x
from gpumarket.sdk.chain_port import SCHEDULER, ChainPort, NodeEntry
from gpumarket.sdk.hub import Hub, Place
from gpumarket.sdk.logs import log

ASKED_MAX = 8
"""Schedulers whose terms are read, by stake: enough to find a low fee, few enough to answer in a moment."""


async def locate(chain: ChainPort, address: Address) -> Place:
    """Where a scheduler listens, by the registry. Raises Unreachable when it is not registered."""
    node = chain.nodes.get(address)
    if node is None:
        await chain.refresh()
        node = chain.nodes.get(address)
    if node is None or not node.roles & SCHEDULER or not node.endpoint:
        raise Unreachable(
            f"{hex0x(address)} is not a registered scheduler on chain {chain.chain_id}",
            hint="leave GPUMARKET_CLIENT_SCHEDULER empty to have one chosen",
        )
    return Place(node.endpoint, node.tls_key_hash)


async def choose(chain: ChainPort, hub_to: Callable[[Address, float], Hub], silent: Collection[Address] = ()) -> Address:
    """The scheduler's address. `hub_to(address, patience)` opens a line. A lone one is taken unasked, but for in the place of `silent`
    ones. Raises Unreachable when there is none."""
    nodes = [n for n in chain.nodes.values() if n.roles & SCHEDULER and n.stake and n.endpoint and n.operator not in silent]
    if not nodes:
        others = "no other scheduler" if silent else "no scheduler"
        raise Unreachable(f"{others} is registered on this chain", hint="gpumarket testnet up, or gpumarket scheduler start")
    nodes.sort(key=lambda n: (-n.stake, n.operator))
    if len(nodes) == 1 and not silent:
        return nodes[0].operator
    fees = await asyncio.gather(*(_fee(hub_to, node) for node in nodes[:ASKED_MAX]))
    known = [(fee, -node.stake, node.operator) for fee, node in zip(fees, nodes[:ASKED_MAX], strict=True) if fee is not None]
    if not known:
        raise Unreachable(
            f"none of {len(nodes)} {'other ' if silent else ''}registered schedulers answers", hint="try again; they may be restarting"
        )
    return min(known)[2]


async def _fee(hub_to: Callable[[Address, float], Hub], node: NodeEntry) -> int | None:
    hub = hub_to(node.operator, 0.0)
    try:
        return (await hub.info()).fee_ppm
    except GpumarketError as error:
        log.info("scheduler_skipped", scheduler=hex0x(node.operator), reason=error.message)
        return None
    finally:
        await hub.close()

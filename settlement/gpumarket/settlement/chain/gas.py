"""What a transaction offers for gas, and how far it may be raised. All in wei.

A node's word is not an order to pay: the tip is capped, the whole fee is capped, and a replacement goes no further than the market or a
multiple of where it began.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gpumarket.core.errors import ChainError
from gpumarket.settlement.chain.connection import Chain
from gpumarket.settlement.chain.outbox import Outgoing

TIP_MAX = 50 * 10**9
"""Highest tip per gas that is believed (50 gwei), unless the base fee itself is higher."""
FEE_MAX = 10**18
"""Most that one transaction may cost: what geth refuses to send by default (--rpc.txfeecap, one ether)."""
ESCALATION = 16
"""A replacement costs at most so many times the first offer, unless a later transaction waits for it."""


class Price(NamedTuple):
    """Per gas: the highest fee to offer now, the tip in it, and the base fee that they follow."""

    max_fee: int
    priority: int
    base: int


async def quote(chain: Chain) -> Price:
    """Twice the base fee, so that six full blocks in a row still take it (EIP-1559), and the node's tip within bounds."""
    head = await chain.w3.eth.get_block("latest")
    base = int(head.get("baseFeePerGas", 0))
    priority = min(int(await chain.w3.eth.max_priority_fee), max(TIP_MAX, base))
    return Price(2 * base + priority, priority, base)


def check_fee(label: str, gas: int, max_fee: int) -> None:
    """Raises ChainError (to be tried again later) when a transaction could cost more than FEE_MAX."""
    if gas * max_fee > FEE_MAX:
        raise ChainError(
            f"{label} could cost {gas * max_fee / 1e18:.3f} of the chain's coin at {max_fee / 1e9:.0f} gwei per gas: not sent",
            hint="wait until gas is cheaper; it is tried again",
        )


def raised(fee: int) -> int:
    """12.5 % more, rounded up, and at least one wei: what nodes ask of a replacement."""
    return fee + max(1, -(-fee // 8))


def ceiling(first: Outgoing, price: Price, pending: Sequence[Outgoing], worth: int = 0) -> int:
    """How high the replacements of `first` may go: ESCALATION times where it began; as high as the market when a later one waits; as high
    as it is `worth` (wei, for the whole transaction) when it has a deadline that costs as much to miss."""
    waiting = [t.max_fee for t in pending if t.nonce > first.nonce]
    until_worthless = min(worth, FEE_MAX) // first.gas
    return max(ESCALATION * first.max_fee, until_worthless, *(max(fee, ESCALATION * price.max_fee) for fee in waiting))


def replacement(ours: Sequence[Outgoing], price: Price, pending: Sequence[Outgoing], worth: int = 0) -> tuple[int, int] | None:
    """(highest fee, tip in it) per gas that follows `ours`, the offers at one nonce so far; None where they stay as they are: it is not the
    fee that keeps them waiting, or gas is too dear now."""
    newest, limit = ours[-1], ceiling(ours[0], price, pending, worth)
    least = raised(newest.max_fee)
    if limit < max(least, price.base):
        return None
    max_fee = min(limit, max(least, price.max_fee))
    return max_fee, min(max_fee, max(raised(newest.priority_fee), price.priority))

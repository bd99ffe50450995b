"""On chain: this scheduler's entry, stake and allowance, brought in line with what it is now.

Invariant: when `ensure_registered` returns, the confirmed registry says where this scheduler is and which TLS key it has.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from gpumarket.core.errors import ChainError, OutOfFunds
from gpumarket.core.keystore import LOCAL_CHAIN_ID
from gpumarket.core.units import Hash, Money, format_money, hex0x
from gpumarket.settlement.chain import SCHEDULER, Actions, ChainView, Follower, NodeOnChain

CONFIRM_SECONDS_MAX = 180.0
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Entry:
    """What the registry should say."""

    p2p_id: str
    tls_key_hash: Hash
    endpoint: str
    stake: Money

    def published(self, node: NodeOnChain | None) -> bool:
        """Whether the chain says where we are."""
        return node is not None and (node.roles, node.p2p_id, node.tls_key_hash, node.endpoint) == (
            SCHEDULER,
            self.p2p_id,
            self.tls_key_hash,
            self.endpoint,
        )

    def missing_stake(self, node: NodeOnChain | None) -> Money:
        """What has to be added."""
        return Money(max(0, self.stake - (node.stake if node is not None else 0)))


async def ensure_registered(actions: Actions, follower: Follower, view: ChainView, entry: Entry, capital: Money, *, faucet: bool) -> None:
    """Register and stake what differs, allow the contracts to pull tokens, wait for the confirmations. Raises OutOfFunds or ChainError.

    `capital`: what channels to providers will need; the faucet is asked for it too, and its lack is only said.
    """
    me = actions.sender.address
    await follower.sync()
    node = view.nodes.get(me)
    missing = entry.missing_stake(node)
    await _fund(actions, missing, capital, faucet=faucet)
    if not entry.published(node) or missing:
        await _require_gas(actions)
        if missing:
            await actions.register_and_stake(SCHEDULER, entry.p2p_id, entry.tls_key_hash, entry.endpoint, missing)
        else:
            await actions.register(SCHEDULER, entry.p2p_id, entry.tls_key_hash, entry.endpoint)
        _log.info("registered", stake=format_money(entry.stake), endpoint=entry.endpoint)
    await actions.approve()
    await _confirmed(actions, follower, view, entry)


async def _require_gas(actions: Actions) -> None:
    if not await actions.gas_balance():
        address = hex0x(actions.sender.address)
        raise OutOfFunds(f"account {address} has nothing to pay gas with", hint=f"send some of the chain's own coin to {address}")


async def _fund(actions: Actions, missing: Money, capital: Money, *, faucet: bool) -> None:
    balance = await actions.balance()
    if balance < missing + capital and faucet and actions.chain.book.chain_id == LOCAL_CHAIN_ID:
        await actions.faucet()
        balance = await actions.balance()
    address = hex0x(actions.sender.address)
    if balance < missing:
        raise OutOfFunds(
            f"the stake lacks {format_money(missing)}, account {address} has {format_money(balance)}",
            hint=f"send tokens to {address}, or lower [scheduler] stake",
        )
    if balance < missing + capital:
        _log.warning("low_capital", balance=format_money(balance), wanted=format_money(missing + capital))


async def _confirmed(actions: Actions, follower: Follower, view: ChainView, entry: Entry) -> None:
    try:
        async with asyncio.timeout(CONFIRM_SECONDS_MAX):
            while True:
                node = view.nodes.get(actions.sender.address)
                if entry.published(node) and not entry.missing_stake(node):
                    return
                await asyncio.sleep(actions.chain.settings.poll_seconds)
                await follower.sync()
    except TimeoutError as error:
        raise ChainError(
            f"the registration has no {actions.chain.settings.confirmations} confirmations after {CONFIRM_SECONDS_MAX:.0f} s",
            hint="check that the chain makes blocks (a local one: anvil --block-time 1)",
        ) from error

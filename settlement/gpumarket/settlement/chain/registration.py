"""A daemon's own entry and stake in the registry, brought in line with what it is now.

Invariant: when `ensure_registered` returns, the confirmed registry says exactly where the daemon is and which TLS key it has.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from gpumarket.core.errors import ChainError, ConfigError, OutOfFunds, WalletError
from gpumarket.core.keystore import LOCAL_CHAIN_ID
from gpumarket.core.units import Address, Hash, Money, format_money, hex0x
from gpumarket.settlement.chain.actions import Actions
from gpumarket.settlement.chain.follower import Follower
from gpumarket.settlement.chain.view import ChainView, NodeOnChain

CONFIRM_SECONDS_MAX = 180.0
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Entry:
    """What the registry should say."""

    roles: int
    p2p_id: str
    tls_key_hash: Hash
    endpoint: str
    stake: Money
    owner: Address | None = None
    """Whose stake it is, where that is not the daemon's own key."""

    def holds(self, node: NodeOnChain | None) -> bool:
        """Whether the chain says so already, with at least this stake."""
        return node is not None and self.published(node) and node.stake >= self.stake

    def published(self, node: NodeOnChain | None) -> bool:
        """Whether the chain says all but the stake already."""
        ours = (self.roles, self.p2p_id, self.tls_key_hash, self.endpoint)
        return node is not None and (node.roles, node.p2p_id, node.tls_key_hash, node.endpoint) == ours

    def missing_stake(self, node: NodeOnChain | None) -> Money:
        return Money(max(0, self.stake - (node.stake if node is not None else 0)))


async def ensure_registered(actions: Actions, follower: Follower, view: ChainView, entry: Entry, *, faucet: bool, capital: int = 0) -> None:
    """Register and stake what differs, and wait for the confirmations. Raises OutOfFunds, ChainError, or what the chain refuses.

    `capital` is what the daemon will want beside the stake (a scheduler's channels): the faucet is asked for it too, its lack only said.
    """
    await follower.sync()
    node = view.nodes.get(actions.sender.address)
    missing = entry.missing_stake(node)
    if entry.owner is not None and entry.owner != actions.sender.address:
        await _ensure_owned(actions, entry, node, capital, faucet)
        await _confirmed(actions, follower, view, entry)
        return
    if missing or capital:
        await _fund(actions, missing, capital, faucet)
    if entry.holds(node):
        return
    await _require_gas(actions)
    if missing:
        await actions.register_and_stake(entry.roles, entry.p2p_id, entry.tls_key_hash, entry.endpoint, missing)
    else:
        await actions.register(entry.roles, entry.p2p_id, entry.tls_key_hash, entry.endpoint)
    _log.info("registered", stake=format_money(entry.stake), endpoint=entry.endpoint)
    await _confirmed(actions, follower, view, entry)


async def _ensure_owned(actions: Actions, entry: Entry, node: NodeOnChain | None, capital: int, faucet: bool) -> None:
    """Register under a cold owner. Its tokens never pass through this key: what is missing of the stake is the owner's to add."""
    assert entry.owner is not None
    me, owner = hex0x(actions.sender.address), hex0x(entry.owner)
    if node is not None and node.owner != entry.owner:
        raise ConfigError(
            f"the registry names {hex0x(node.owner)} as the owner of {me}, for good; the settings name {owner}",
            hint="set owner to that address, or make a new operator key: gpumarket wallet create",
        )
    if capital:
        await _fund(actions, 0, capital, faucet)
    if not entry.published(node):
        await _require_gas(actions)
        if node is None and not await actions.approves(entry.owner, actions.sender.address):
            raise WalletError(
                f"{owner} has not agreed to own the stake of {me}", hint=f"with the owner's key: gpumarket stake approve {me}"
            )
        await actions.register(entry.roles, entry.p2p_id, entry.tls_key_hash, entry.endpoint, entry.owner)
        _log.info("registered", owner=owner, endpoint=entry.endpoint)
    if missing := entry.missing_stake(node):
        raise OutOfFunds(
            f"{me} is registered, and {format_money(missing)} of its stake are missing",
            hint=f"with the owner's key: gpumarket stake add {me} {format_money(missing)}; then start again",
        )


async def _require_gas(actions: Actions) -> None:
    if not await actions.gas_balance():
        address = hex0x(actions.sender.address)
        raise OutOfFunds(f"account {address} has nothing to pay gas with", hint=f"send some of the chain's own coin to {address}")


async def _fund(actions: Actions, missing: int, capital: int, faucet: bool) -> None:
    balance = await actions.balance()
    if balance < missing + capital and faucet and actions.chain.book.chain_id == LOCAL_CHAIN_ID:
        await actions.faucet()
        balance = await actions.balance()
    address = hex0x(actions.sender.address)
    if balance < missing:
        raise OutOfFunds(
            f"the stake lacks {format_money(missing)}, account {address} has {format_money(balance)}",
            hint=f"send tokens to {address}, or lower the setting stake",
        )
    if balance < missing + capital:
        _log.warning("low_capital", balance=format_money(balance), wanted=format_money(missing + capital))


async def _confirmed(actions: Actions, follower: Follower, view: ChainView, entry: Entry) -> None:
    try:
        async with asyncio.timeout(CONFIRM_SECONDS_MAX):
            while not entry.holds(view.nodes.get(actions.sender.address)):
                await asyncio.sleep(actions.chain.settings.poll_seconds)
                await follower.sync()
    except TimeoutError as error:
        raise ChainError(
            f"the registration was mined but has no {actions.chain.settings.confirmations} confirmations after {CONFIRM_SECONDS_MAX:.0f} s",
            hint="check that the chain makes blocks (a local one: anvil --block-time 1)",
        ) from error

"""What the chain says, in memory: channels and nodes as values, and how each contract event changes one. No I/O.

The view is derived, never a source: it is rebuilt from events and may be thrown away at any time. Only the follower writes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from gpumarket.core.errors import ChainError, Unreachable
from gpumarket.core.units import ZERO_HASH, Address, Hash, parse_address

PROVIDER, SCHEDULER, VERIFIER = 1, 2, 4
"""Role bits of the registry."""


@dataclass(frozen=True, slots=True)
class ChannelOnChain:
    """A payment channel. Money in base units, times in unix seconds; `closes_at` is 0 while nobody asked to close."""

    id: Hash
    payer: Address
    payee: Address
    signer: Address
    deposit: int
    claimed: int
    expires_at: int
    closes_at: int = 0
    closed: bool = False


@dataclass(frozen=True, slots=True)
class NodeOnChain:
    """A registered node; `roles` is 0 once it deregistered. Money in base units, times in unix seconds, 0 where there is none."""

    operator: Address
    owner: Address
    roles: int = 0
    stake: int = 0
    unbonding: int = 0
    unbonding_at: int = 0
    """From when the unbonding stake may be withdrawn."""
    locked: int = 0
    staked_since: int = 0
    """Amount-weighted mean of when the stake came in."""
    p2p_id: str = ""
    tls_key_hash: Hash = ZERO_HASH
    endpoint: str = ""


@dataclass(frozen=True, slots=True)
class ChannelChanged:
    """A channel is new, changed, or (after a reorganisation) gone: look it up."""

    id: Hash


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """A node is new, changed, or (after a reorganisation) gone: look it up."""

    address: Address


ChainEvent = ChannelChanged | NodeChanged


@dataclass(slots=True)
class ChainView:
    """The chain up to `block`, which has its confirmations. Read it from the event loop's thread."""

    channels: dict[Hash, ChannelOnChain] = field(default_factory=dict)
    nodes: dict[Address, NodeOnChain] = field(default_factory=dict)
    block: int = -1
    trouble: str = ""
    """Why the view is too old or too doubtful to take on new work that money depends on; empty while all is well."""
    _subscribers: list[Callable[[ChainEvent], None]] = field(default_factory=list)

    def subscribe(self, callback: Callable[[ChainEvent], None]) -> None:
        """Call `callback` after each change, once per channel or node and synchronisation. Its exceptions stop the follower."""
        self._subscribers.append(callback)

    def publish(self, event: ChainEvent) -> None:
        """The follower's: tell the subscribers."""
        for callback in self._subscribers:
            callback(event)


Channel = TypeVar("Channel", covariant=True)


class Troubled(Protocol[Channel]):
    """A view that may be too old or too doubtful."""

    @property
    def channels(self) -> Mapping[Hash, Channel]: ...
    @property
    def trouble(self) -> str: ...


class NewWork(Mapping[Hash, Channel], Generic[Channel]):
    """A view's channels for whoever takes on new work: every look raises Unreachable while the view is in trouble."""

    def __init__(self, view: Troubled[Channel]) -> None:
        self._view = view

    def __getitem__(self, key: Hash) -> Channel:
        require_untroubled(self._view.trouble)
        return self._view.channels[key]

    def __iter__(self) -> Iterator[Hash]:
        return iter(self._view.channels)

    def __len__(self) -> int:
        return len(self._view.channels)


def require_untroubled(trouble: str) -> None:
    """Raises Unreachable (retryable) with the reason why nothing new may be begun on this view of the chain."""
    if trouble:
        raise Unreachable(f"no new work is taken on: {trouble}", hint="what runs goes on; try again when the chain answers, or elsewhere")


def channel_after(channel: ChannelOnChain | None, name: str, args: Mapping[str, Any]) -> ChannelOnChain | None:
    """The channel after one event of PaymentChannels; None for events that are about no channel."""
    if name == "Opened":
        payer, payee, signer = (parse_address(args[key]) for key in ("payer", "payee", "signer"))
        return ChannelOnChain(Hash(args["id"]), payer, payee, signer, args["amount"], 0, args["expiresAt"])
    if name not in ("ToppedUp", "Redeemed", "CloseRequested", "Closed"):
        return None
    if channel is None:
        raise ChainError(f"{name} of a channel that was never opened: the address book's deployed_block is too late")
    if name == "ToppedUp":
        return replace(channel, deposit=args["deposit"], expires_at=args["expiresAt"])
    if name == "Redeemed":
        return replace(channel, claimed=args["cumulative"])
    if name == "CloseRequested":
        return replace(channel, closes_at=args["closesAt"])
    return replace(channel, closed=True)


def node_after(node: NodeOnChain | None, name: str, args: Mapping[str, Any]) -> NodeOnChain | None:
    """The node after one event of StakeRegistry, field by field as the contract changes it; None for events that are about no node."""
    if name == "Registered":
        known = node or NodeOnChain(parse_address(args["operator"]), parse_address(args["owner"]))
        tls_key_hash = Hash(args["tlsKeyHash"])
        return replace(known, roles=args["roles"], p2p_id=args["p2pId"], tls_key_hash=tls_key_hash, endpoint=args["endpoint"])
    rule = _NODE_RULES.get(name)
    if rule is None:
        return None
    if node is None:
        raise ChainError(f"{name} of a node that never registered: the address book's deployed_block is too late")
    return rule(node, args)


def _unbonding_started(node: NodeOnChain, args: Mapping[str, Any]) -> NodeOnChain:
    stake = node.stake - args["amount"]
    since = node.staked_since if stake else 0
    return replace(node, stake=stake, staked_since=since, unbonding=node.unbonding + args["amount"], unbonding_at=args["availableAt"])


def _withdrawn(node: NodeOnChain, args: Mapping[str, Any]) -> NodeOnChain:
    unbonding = node.unbonding - args["amount"]
    return replace(node, unbonding=unbonding, unbonding_at=node.unbonding_at if unbonding else 0)


def _slashed(node: NodeOnChain, args: Mapping[str, Any]) -> NodeOnChain:
    stake, unbonding = args["stake"], args["unbonding"]
    return replace(
        node,
        stake=stake,
        unbonding=unbonding,
        locked=args["locked"],
        staked_since=node.staked_since if stake else 0,
        unbonding_at=node.unbonding_at if unbonding else 0,
    )


_NODE_RULES: dict[str, Callable[[NodeOnChain, Mapping[str, Any]], NodeOnChain]] = {
    "Staked": lambda node, args: replace(node, stake=args["stake"], staked_since=args["stakedSince"]),
    "UnbondingStarted": _unbonding_started,
    "Withdrawn": _withdrawn,
    "Deregistered": lambda node, args: replace(node, roles=0, p2p_id="", tls_key_hash=ZERO_HASH, endpoint=""),
    "Locked": lambda node, args: replace(node, locked=args["locked"]),
    "Unlocked": lambda node, args: replace(node, locked=args["locked"]),
    "Slashed": _slashed,
}

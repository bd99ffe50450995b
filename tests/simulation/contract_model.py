"""PaymentChannels.sol in Python: the same rules in the same order, with the token's balances. Used by `chain_model`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gpumarket.core.signing import Domain, recover
from gpumarket.core.terms import Close, Voucher, keccak256
from gpumarket.core.units import Address, Hash, Money
from gpumarket.settlement.chain.view import ChannelOnChain, channel_after

CLOSE_WINDOW_SECONDS = 90
"""Three looks of a redeemer: `shop` has them look every 25 and 30 s."""
FUNDS = 10**6 * 10**18
"""What every account holds at first."""
Event = tuple[str, dict[str, Any]]


class Revert(Exception):
    """What the contract refuses."""


@dataclass
class Contract:
    """PaymentChannels.sol, rule by rule (its `require`s in its order), with the token's balances. Closed channels are deleted."""

    domain: Domain
    channels: dict[Hash, ChannelOnChain] = field(default_factory=dict)
    balances: dict[Address, int] = field(default_factory=dict)
    credited: dict[Address, int] = field(default_factory=dict)
    nonces: dict[Address, int] = field(default_factory=dict)
    escrow: int = 0

    def run(self, sender: Address, name: str, args: tuple[Any, ...], now: int) -> list[Event]:
        """Execute one call. Raises Revert, and then nothing has changed."""
        events: list[Event] = getattr(self, "_" + name)(sender, now, *args)
        return events

    def copy(self) -> Contract:
        """The state as it is now; channels are values."""
        return Contract(self.domain, dict(self.channels), dict(self.balances), dict(self.credited), dict(self.nonces), self.escrow)

    def owed(self) -> int:
        """What the contract owes: the rest of every open channel, and credits."""
        return sum(c.deposit - c.claimed for c in self.channels.values()) + sum(self.credited.values())

    def _open(self, sender: Address, now: int, payee: Address, amount: int, expires_at: int) -> list[Event]:
        _need(amount > 0 and expires_at > now and self._has(sender) >= amount, "open")
        nonce = self.nonces[sender] = self.nonces.get(sender, 0) + 1
        channel = Hash(keccak256(sender + payee + nonce.to_bytes(32, "big")))
        self.channels[channel] = ChannelOnChain(channel, sender, payee, sender, amount, 0, expires_at)
        self._pull(sender, amount)
        args = {"id": channel, "payer": _hex(sender), "payee": _hex(payee), "signer": _hex(sender), "amount": amount}
        return [("Opened", args | {"expiresAt": expires_at})]

    def _top_up(self, sender: Address, now: int, channel: Hash, amount: int, expires_at: int) -> list[Event]:
        old = self._payers(sender, channel)
        _need(not old.closes_at and expires_at >= old.expires_at and expires_at > now, "top up")
        _need((amount > 0 or expires_at > old.expires_at) and self._has(sender) >= amount, "top up of nothing")
        self._pull(sender, amount)
        return [self._set(channel, "ToppedUp", {"deposit": old.deposit + amount, "expiresAt": expires_at})]

    def _redeem(self, sender: Address, now: int, channel: Hash, cumulative: int, signature: bytes) -> list[Event]:
        amount, event = self._advance(channel, cumulative, signature)
        self._pay(self.channels[channel].payee, amount)
        return [event]

    def _redeem_many(self, sender: Address, now: int, claims: Sequence[tuple[Hash, int, bytes]]) -> list[Event]:
        events: list[Event] = []
        for channel, cumulative, signature in claims:
            try:
                amount, event = self._advance(channel, cumulative, signature)
            except Revert:
                events.append(("ClaimSkipped", {"id": channel}))
                continue
            payee = self.channels[channel].payee
            self.credited[payee] = self.credited.get(payee, 0) + amount
            events.append(event)
        return events

    def _withdraw(self, sender: Address, now: int) -> list[Event]:
        amount = self.credited.get(sender, 0)
        _need(amount > 0, "nothing credited")
        self.credited[sender] = 0
        self._pay(sender, amount)
        return [("Withdrawn", {"payee": sender, "amount": amount})]

    def _request_close(self, sender: Address, now: int, channel: Hash) -> list[Event]:
        _need(not self._payers(sender, channel).closes_at, "already closing")
        return [self._set(channel, "CloseRequested", {"closesAt": now + CLOSE_WINDOW_SECONDS})]

    def _close(self, sender: Address, now: int, channel: Hash) -> list[Event]:
        old = self._payers(sender, channel)
        _need(now >= old.expires_at or (old.closes_at > 0 and now >= old.closes_at), "too early")
        return [self._end(channel)]

    def _cooperative_close(self, sender: Address, now: int, channel: Hash, cumulative: int, signature: bytes) -> list[Event]:
        old = self._payers(sender, channel)
        _need(recover(self.domain.digest(Close(channel, Money(cumulative)).struct_hash), signature) == old.payee, "not the payee")
        _need(cumulative <= old.deposit, "above the deposit")
        events: list[Event] = []
        if cumulative > old.claimed:
            self.credited[old.payee] = self.credited.get(old.payee, 0) + cumulative - old.claimed
            events.append(self._set(channel, "Redeemed", {"amount": cumulative - old.claimed, "cumulative": cumulative}))
        return [*events, self._end(channel)]

    def _advance(self, channel: Hash, cumulative: int, signature: bytes) -> tuple[int, Event]:
        old = self.channels.get(channel)
        _need(old is not None, "unknown channel")
        assert old is not None
        digest = self.domain.digest(Voucher(channel, Money(cumulative)).struct_hash)
        _need(recover(digest, signature) == old.signer, "not the signer")
        _need(old.claimed < cumulative <= old.deposit, "nothing to redeem, or above the deposit")
        amount = cumulative - old.claimed
        return amount, self._set(channel, "Redeemed", {"amount": amount, "cumulative": cumulative})

    def _payers(self, sender: Address, channel: Hash) -> ChannelOnChain:
        found = self.channels.get(channel)
        _need(found is not None and found.payer == sender, "not the payer's channel")
        assert found is not None
        return found

    def _set(self, channel: Hash, name: str, args: dict[str, Any]) -> Event:
        after = channel_after(self.channels[channel], name, {"id": channel} | args)
        assert after is not None
        self.channels[channel] = after
        return name, {"id": channel} | args

    def _end(self, channel: Hash) -> Event:
        old = self.channels.pop(channel)
        self._pay(old.payer, old.deposit - old.claimed)
        return "Closed", {"id": channel}

    def _has(self, account: Address) -> int:
        return self.balances.get(account, FUNDS)

    def _pull(self, account: Address, amount: int) -> None:
        self.balances[account] = self._has(account) - amount
        self.escrow += amount

    def _pay(self, account: Address, amount: int) -> None:
        assert amount <= self.escrow, "the contract pays what it does not hold"
        self.escrow -= amount
        self.balances[account] = self._has(account) + amount


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise Revert(what)


def _hex(address: Address) -> str:
    return "0x" + address.hex()

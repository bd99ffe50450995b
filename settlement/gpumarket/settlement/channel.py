"""A payment channel as each end sees it: `handle(state, event) -> state`, no I/O, no clock.

    payee (ReceivedChannel)                                   payer (PaidChannel)
    ReceiveVoucher      voucher rises                         Reserve     reserved += amount
    ReserveOpen         free -> open                          Release     reserved -= amount
    ReleaseOpen         open -> free                          Pay         reserved -> vouchered; the new `vouchered` is what to sign
    HoldAmount          open -> held
    OweHeld             held -> used
    ReturnHeld          held -> free
    both: ChainToppedUp, ChainRedeemed, ChainClosing, ChainClosed      what the follower has confirmed

Invariants, asserted after every event (I1):
    payee: used + held + open <= voucher <= deposit
    payer: redeemed <= vouchered, vouchered + reserved <= deposit
What the peer may not do raises FundsError or ProtocolError and changes nothing; what we ourselves may not do (release more than is
open) is an AssertionError. Signatures are verified before an event is made (`gpumarket.settlement.vouchers`).
Never: a voucher that falls, a state that forgets money.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from gpumarket.core.errors import ChannelExpiring, JournalError, OutOfFunds, ProtocolError
from gpumarket.core.units import MONEY_MAX, Address, Hash, format_money
from gpumarket.core.values import replace
from gpumarket.settlement.ladder import LADDER_BYTES_MAX, climbed, trimmed


@dataclass(frozen=True, slots=True)
class ReceivedChannel:
    """A channel whose payee we are. Money in base units, times in unix seconds."""

    id: Hash
    signer: Address
    """Whose vouchers count."""
    deposit: int
    """All that was paid in on chain, confirmed."""
    expires_at: int
    voucher: int = 0
    """Cumulative amount of the newest voucher held."""
    signature: bytes = b""
    """Of that voucher; empty while there is none, or when the chain has paid it already."""
    ladder: bytes = b""
    """Older vouchers that may be the better ones to redeem (`gpumarket.settlement.ladder`)."""
    used: int = 0
    """Earned for good."""
    held: int = 0
    """Claimed, waiting for a check."""
    open: int = 0
    """Maxima of running attempts."""
    redeemed: int = 0
    """What the chain has paid or credited."""
    closing: int = 0
    """When the payer may close; 0 while nobody asked."""
    closed: bool = False

    @property
    def free(self) -> int:
        """What new attempts may reserve."""
        return self.voucher - self.used - self.held - self.open

    @property
    def redeemable(self) -> int:
        """What a redemption would bring now."""
        return 0 if self.closed or not self.signature else max(0, self.voucher - self.redeemed)


@dataclass(frozen=True, slots=True)
class PaidChannel:
    """A channel whose payer we are. Money in base units, times in unix seconds."""

    id: Hash
    payee: Address
    deposit: int
    expires_at: int
    vouchered: int = 0
    """Cumulative amount of the newest voucher released."""
    reserved: int = 0
    """Maxima of open attempts and held amounts that may still become payments."""
    redeemed: int = 0
    closing: int = 0
    closed: bool = False

    @property
    def free(self) -> int:
        """Deposit that nothing is promised from."""
        return 0 if self.closed else self.deposit - self.vouchered - self.reserved


class ReceiveVoucher(NamedTuple):
    """The payer's signed cumulative amount. One that is not higher than ours is an old copy and changes nothing."""

    cumulative: int
    signature: bytes


class ReserveOpen(NamedTuple):
    """An attempt's maximum; `until` is when its money must still be redeemable (deadline + close window + margin)."""

    amount: int
    until: int = 0


class ReleaseOpen(NamedTuple):
    """An attempt ended; what it did not earn is free again."""

    amount: int


class HoldAmount(NamedTuple):
    """A claim: from open to held."""

    amount: int


class OweHeld(NamedTuple):
    """The check passed, or was not wanted: from held to used."""

    amount: int


class ReturnHeld(NamedTuple):
    """Rejected: from held back to free."""

    amount: int


class Reserve(NamedTuple):
    """Set `amount` of the deposit aside; `until` is when it must still be redeemable."""

    amount: int
    until: int = 0


class Release(NamedTuple):
    """What was set aside is not needed."""

    amount: int


class Pay(NamedTuple):
    """Owe `amount` more. `reserved` is how much of the reservation it uses up (None: as much as it pays; 0: paid from the free deposit)."""

    amount: int
    reserved: int | None = None


class ChainToppedUp(NamedTuple):
    """The deposit and expiry after a top-up; neither ever falls."""

    deposit: int
    expires_at: int


class ChainRedeemed(NamedTuple):
    """The chain has paid `cumulative` in all, by voucher or by the payer's push."""

    cumulative: int


class ChainClosing(NamedTuple):
    """The payer asked to close; from `closes_at` on it may."""

    closes_at: int


@dataclass(frozen=True, slots=True)
class ChainClosed:
    """The channel is gone; what was not redeemed is lost to the payee."""


State = TypeVar("State", ReceivedChannel, PaidChannel)


def handle(state: State, event: Any) -> State:
    """The state after `event`.

    Raises OutOfFunds (not covered), ChannelExpiring (closing, closed or too near its expiry), ProtocolError (a negative or absurd
    amount, an event of the other end), JournalError (the chain paid more than this ledger has ever signed).
    """
    rules: dict[type, Callable[[Any, Any], Any]] = _PAYEE if isinstance(state, ReceivedChannel) else _PAYER
    rule = rules.get(type(event))
    if rule is None:
        raise ProtocolError(f"{type(event).__name__} does not happen to a {type(state).__name__}")
    amount = getattr(event, "amount", 0)
    if not 0 <= amount <= MONEY_MAX:
        raise ProtocolError(f"{amount} is not an amount of money")
    after: State = rule(state, event)
    check(after)
    return after


def check(state: ReceivedChannel | PaidChannel) -> None:
    """Asserts I1 for one channel."""
    if isinstance(state, ReceivedChannel):
        assert min(state.used, state.held, state.open, state.redeemed) >= 0, state
        assert state.used + state.held + state.open <= state.voucher <= state.deposit, state
        assert state.redeemed <= state.voucher, state
    else:
        assert 0 <= state.redeemed <= state.vouchered and state.reserved >= 0, state
        assert state.vouchered + state.reserved <= state.deposit, state


# --- payee ---------------------------------------------------------------------------------------------------------------------


def _receive_voucher(state: ReceivedChannel, event: ReceiveVoucher) -> ReceivedChannel:
    if not 0 <= event.cumulative <= MONEY_MAX:
        raise ProtocolError(f"{event.cumulative} is not an amount of money")
    if event.cumulative <= state.voucher:
        return state
    _refuse_closing(state)
    if event.cumulative > state.deposit:
        raise OutOfFunds(
            f"a voucher of {format_money(event.cumulative)} on a channel with a deposit of {format_money(state.deposit)}",
            hint="top the channel up, wait for the confirmations, then send the voucher again",
        )
    ladder = climbed(state.ladder, state.voucher, state.signature)
    after = replace(state, voucher=event.cumulative, signature=event.signature, ladder=ladder)
    return _trimmed(after) if len(ladder) > LADDER_BYTES_MAX else after


def _reserve_open(state: ReceivedChannel, event: ReserveOpen) -> ReceivedChannel:
    _refuse_closing(state)
    _refuse_expiring(state, event.until)
    if event.amount > state.free:
        raise OutOfFunds(
            f"the job needs {format_money(event.amount)}, the voucher leaves {format_money(state.free)}: {format_money(state.voucher)} "
            f"vouchered, {format_money(state.used)} used, {format_money(state.held)} held, {format_money(state.open)} open",
            hint="send a higher voucher; top the channel up when the deposit is used",
        )
    return replace(state, open=state.open + event.amount)


def _release_open(state: ReceivedChannel, event: ReleaseOpen) -> ReceivedChannel:
    assert event.amount <= state.open, (state, event)
    return replace(state, open=state.open - event.amount)


def _hold(state: ReceivedChannel, event: HoldAmount) -> ReceivedChannel:
    assert event.amount <= state.open, (state, event)
    return replace(state, open=state.open - event.amount, held=state.held + event.amount)


def _owe(state: ReceivedChannel, event: OweHeld) -> ReceivedChannel:
    assert event.amount <= state.held, (state, event)
    return _trimmed(replace(state, held=state.held - event.amount, used=state.used + event.amount))


def _return(state: ReceivedChannel, event: ReturnHeld) -> ReceivedChannel:
    assert event.amount <= state.held, (state, event)
    return replace(state, held=state.held - event.amount)


def _payee_redeemed(state: ReceivedChannel, event: ChainRedeemed) -> ReceivedChannel:
    if event.cumulative <= state.redeemed:
        return state
    if event.cumulative > state.voucher:  # the payer's push pays more than its vouchers said; the chain is proof enough
        return replace(state, redeemed=event.cumulative, voucher=event.cumulative, signature=b"", ladder=b"")
    return _trimmed(replace(state, redeemed=event.cumulative))


def _trimmed(state: ReceivedChannel) -> ReceivedChannel:
    if not state.ladder:
        return state
    return replace(state, ladder=trimmed(state.ladder, used=state.used, redeemed=state.redeemed, newest=state.voucher))


# --- payer ---------------------------------------------------------------------------------------------------------------------


def _reserve(state: PaidChannel, event: Reserve) -> PaidChannel:
    _refuse_closing(state)
    _refuse_expiring(state, event.until)
    if event.amount > state.free:
        raise OutOfFunds(
            f"{format_money(event.amount)} is needed, the channel has {format_money(state.free)} free of {format_money(state.deposit)}",
            hint="top the channel up",
        )
    return replace(state, reserved=state.reserved + event.amount)


def _release(state: PaidChannel, event: Release) -> PaidChannel:
    assert event.amount <= state.reserved, (state, event)
    return replace(state, reserved=state.reserved - event.amount)


def _pay(state: PaidChannel, event: Pay) -> PaidChannel:
    used_up = event.amount if event.reserved is None else event.reserved
    assert 0 <= used_up <= state.reserved, (state, event)
    if state.closed and event.amount > used_up:  # what was reserved before the close is owed all the same, though nobody can redeem it
        raise ChannelExpiring(f"channel 0x{state.id.hex()} is closed; nothing can be paid on it", hint="open another channel")
    if event.amount > state.free + used_up:
        raise OutOfFunds(
            f"{format_money(event.amount)} is owed, the channel has {format_money(state.free + used_up)} left",
            hint="top the channel up",
        )
    return replace(state, vouchered=state.vouchered + event.amount, reserved=state.reserved - used_up)


def _payer_redeemed(state: PaidChannel, event: ChainRedeemed) -> PaidChannel:
    if event.cumulative <= state.redeemed:
        return state
    if event.cumulative > state.vouchered:
        raise JournalError(
            f"channel 0x{state.id.hex()} was redeemed at {event.cumulative}, but this ledger has signed {state.vouchered} at most",
            hint="stop: the ledger is older than the key's signatures, or another process signs with the key",
        )
    return replace(state, redeemed=event.cumulative)


# --- both ----------------------------------------------------------------------------------------------------------------------


def _topped_up(state: State, event: ChainToppedUp) -> State:
    return replace(state, deposit=max(state.deposit, event.deposit), expires_at=max(state.expires_at, event.expires_at))


def _closing(state: State, event: ChainClosing) -> State:
    return replace(state, closing=event.closes_at)


def _closed(state: State, _event: ChainClosed) -> State:
    return replace(state, closed=True)


def _refuse_closing(state: ReceivedChannel | PaidChannel) -> None:
    if state.closed or state.closing:
        what = "is closed" if state.closed else f"closes at {state.closing}"
        raise ChannelExpiring(f"channel 0x{state.id.hex()} {what}", hint="open another channel")


def _refuse_expiring(state: ReceivedChannel | PaidChannel, until: int) -> None:
    if until > state.expires_at:
        raise ChannelExpiring(
            f"channel 0x{state.id.hex()} expires at {state.expires_at}; this needs it until {until}",
            hint="extend the channel with a top-up, or choose an earlier deadline",
        )


_BOTH: dict[type, Callable[[Any, Any], Any]] = {
    ChainToppedUp: _topped_up,
    ChainClosing: _closing,
    ChainClosed: _closed,
}
_PAYEE: dict[type, Callable[[Any, Any], Any]] = _BOTH | {
    ReceiveVoucher: _receive_voucher,
    ReserveOpen: _reserve_open,
    ReleaseOpen: _release_open,
    HoldAmount: _hold,
    OweHeld: _owe,
    ReturnHeld: _return,
    ChainRedeemed: _payee_redeemed,
}
_PAYER: dict[type, Callable[[Any, Any], Any]] = _BOTH | {
    Reserve: _reserve,
    Release: _release,
    Pay: _pay,
    ChainRedeemed: _payer_redeemed,
}

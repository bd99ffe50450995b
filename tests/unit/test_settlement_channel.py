"""Channel states: what the peer may not do is refused with numbers."""

from __future__ import annotations

import pytest

from gpumarket.core.errors import ChannelExpiring, OutOfFunds, ProtocolError
from gpumarket.core.units import Address, Hash
from gpumarket.settlement.channel import (
    ChainClosed,
    ChainClosing,
    ChainRedeemed,
    HoldAmount,
    OweHeld,
    PaidChannel,
    Pay,
    ReceivedChannel,
    ReceiveVoucher,
    Reserve,
    ReserveOpen,
    handle,
)

ID = Hash(b"\1" * 32)
HUB = ReceivedChannel(ID, Address(b"\2" * 20), 100, 1_000, voucher=60, signature=b"s" * 65)
SPOKE = PaidChannel(ID, Address(b"\3" * 20), 100, 1_000)


def test_channel_reservation_over_the_voucher_is_refused_with_numbers_and_hint() -> None:
    with pytest.raises(OutOfFunds, match="vouchered") as caught:
        handle(HUB, ReserveOpen(61))
    assert "higher voucher" in caught.value.hint
    assert handle(HUB, ReserveOpen(60)).free == 0


def test_channel_reservation_needs_the_channel_to_outlive_it() -> None:
    assert handle(HUB, ReserveOpen(1, until=1_000)).open == 1
    with pytest.raises(ChannelExpiring, match="expires at 1000"):
        handle(HUB, ReserveOpen(1, until=1_001))
    with pytest.raises(ChannelExpiring):
        handle(SPOKE, Reserve(1, until=1_001))


@pytest.mark.parametrize("event", [ChainClosing(900), ChainClosed()])
def test_channel_closing_takes_no_new_promises_but_finishes_old_ones(event: object) -> None:
    closing = handle(handle(HUB, ReserveOpen(20)), event)
    for refused in (ReceiveVoucher(70, b"t" * 65), ReserveOpen(1)):
        with pytest.raises(ChannelExpiring):
            handle(closing, refused)
    done = handle(handle(closing, HoldAmount(20)), OweHeld(20))
    assert (done.used, done.open) == (20, 0)


def test_channel_voucher_above_the_deposit_is_refused() -> None:
    with pytest.raises(OutOfFunds, match="deposit"):
        handle(HUB, ReceiveVoucher(101, b"t" * 65))


@pytest.mark.parametrize("cumulative", [-1, 2**96])
def test_channel_voucher_outside_uint96_is_refused(cumulative: int) -> None:
    with pytest.raises(ProtocolError, match="amount of money"):
        handle(HUB, ReceiveVoucher(cumulative, b""))


@pytest.mark.parametrize("event", [ReserveOpen(-1), HoldAmount(2**96)])
def test_channel_amount_that_is_none_is_refused(event: object) -> None:
    with pytest.raises(ProtocolError, match="amount of money"):
        handle(HUB, event)


def test_channel_event_of_the_other_end_is_refused() -> None:
    with pytest.raises(ProtocolError, match="Pay does not happen to a ReceivedChannel"):
        handle(HUB, Pay(1))
    with pytest.raises(ProtocolError, match="ReserveOpen"):
        handle(SPOKE, ReserveOpen(1))


def test_channel_old_voucher_never_replaces_a_newer_signature() -> None:
    assert handle(HUB, ReceiveVoucher(60, b"other")).signature == HUB.signature
    assert handle(HUB, ReceiveVoucher(10, b"other")) == HUB


def test_channel_push_beyond_the_voucher_counts_as_paid() -> None:
    pushed = handle(HUB, ChainRedeemed(80))
    assert (pushed.voucher, pushed.redeemed, pushed.redeemable, pushed.signature) == (80, 80, 0, b"")
    renewed = handle(pushed, ReceiveVoucher(90, b"t" * 65))
    assert renewed.redeemable == 10


def test_channel_closed_has_nothing_to_redeem() -> None:
    assert HUB.redeemable == 60
    assert handle(HUB, ChainClosed()).redeemable == 0


def test_channel_pay_names_the_next_cumulative() -> None:
    state = handle(handle(SPOKE, Reserve(50)), Pay(30, reserved=50))
    assert (state.vouchered, state.reserved, state.free) == (30, 0, 70)
    with pytest.raises(OutOfFunds):
        handle(state, Pay(71, reserved=0))


def test_channel_closed_owes_what_was_reserved_and_no_more() -> None:
    closed = handle(handle(SPOKE, Reserve(50)), ChainClosed())
    assert (paid := handle(closed, Pay(30, reserved=50))).vouchered == 30
    assert (paid.reserved, paid.free) == (0, 0)
    with pytest.raises(ChannelExpiring):
        handle(closed, Pay(1, reserved=0))
    with pytest.raises(ChannelExpiring):
        handle(closed, Pay(51, reserved=50))

"""Which of a client's vouchers a scheduler's redeemer takes: what was earned, and as little more as can be."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumarket.core.units import Address, Hash
from gpumarket.scheduler.ledger import HubChannel
from gpumarket.scheduler.market import Market, _may_redeem
from gpumarket.settlement.channel import (
    ChainRedeemed,
    HoldAmount,
    OweHeld,
    ReceivedChannel,
    ReceiveVoucher,
    ReleaseOpen,
    ReserveOpen,
    ReturnHeld,
    handle,
)
from gpumarket.settlement.ladder import STEPS_MAX, climbed, steps, trimmed
from gpumarket.settlement.redeem import LAST_CHANCE_SECONDS, earned

NOW = 1_000_000
FAR = NOW + 10**6
CLOSING = NOW + 10 * LAST_CHANCE_SECONDS
LATE = CLOSING - LAST_CHANCE_SECONDS


def signature(amount: int) -> bytes:
    return amount.to_bytes(65, "big")


def channel(*vouchers: int, **changes: int) -> ReceivedChannel:
    state = ReceivedChannel(id=Hash(bytes(32)), signer=Address(bytes(20)), deposit=10_000, expires_at=FAR)
    for amount in vouchers:
        state = handle(state, ReceiveVoucher(amount, signature(amount)))
    return replace(state, **changes)  # type: ignore[arg-type]


def taken(state: ReceivedChannel, now: int = NOW) -> tuple[int, int]:
    """(voucher, what redeeming it brings)."""
    found = earned(state, now)
    assert found.signature in (b"", signature(found.voucher))
    return found.voucher, found.redeemable


# --- while the channel lives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("used", "voucher"), [(0, 0), (99, 0), (100, 100), (249, 100), (250, 250), (399, 250), (400, 400)])
def test_redeemable_while_it_lives_takes_no_more_than_was_used(used: int, voucher: int) -> None:
    assert taken(channel(100, 250, 400, used=used)) == (voucher, voucher)


def test_redeemable_counts_from_what_was_redeemed_before() -> None:
    assert taken(channel(100, 250, 400, used=260, redeemed=100)) == (250, 150)
    assert taken(channel(100, 250, 400, used=240, redeemed=100))[1] == 0


def test_redeemable_near_the_expiry_still_takes_no_more_than_was_used_until_the_last_chance() -> None:
    state = channel(100, 250, used=120, expires_at=CLOSING)
    assert taken(state, LATE - 1) == (100, 100)
    assert taken(state, LATE) == (250, 250)


def test_redeemable_channel_whose_close_we_signed_waits_for_it() -> None:
    signed = HubChannel(channel(100, used=100), Address(bytes(20)), close_signed=True)
    assert not _may_redeem(signed, NOW)
    assert _may_redeem(replace(signed, close_signed=False), NOW)
    assert _may_redeem(replace(signed, state=replace(signed.state, closing=CLOSING)), NOW)
    assert _may_redeem(signed, FAR)


# --- when its payer closes it alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("used", "voucher"), [(0, 0), (1, 100), (100, 100), (101, 250), (300, 400)])
def test_redeemable_when_closing_takes_the_lowest_that_covers_what_was_used(used: int, voucher: int) -> None:
    assert taken(channel(100, 250, 400, used=used, closing=CLOSING)) == (voucher, voucher)


def test_redeemable_at_the_last_chance_covers_what_is_held_and_open() -> None:
    state = channel(100, 250, 400, used=90, held=20, open=200, closing=CLOSING)
    assert taken(state, LATE - 1) == (100, 100)
    assert taken(state, LATE) == (400, 400)


def test_redeemable_when_closing_takes_nothing_where_all_was_redeemed() -> None:
    assert taken(channel(100, 250, used=100, redeemed=100, closing=CLOSING))[1] == 0


def test_redeemable_client_with_one_large_voucher_that_closes_alone_pays_for_what_it_used() -> None:
    """The attack on a scheduler that would never take more than was used: one voucher, nearly all of it used, close."""
    assert taken(channel(1_000, used=999, closing=CLOSING)) == (1_000, 1_000)


# --- any history ------------------------------------------------------------------------------------------------------------------

moves = st.lists(
    st.tuples(st.sampled_from(["voucher", "reserve", "release", "hold", "owe", "return", "redeem"]), st.integers(1, 60)), max_size=80
)


@given(moves)
def test_redeemable_any_history_is_covered_and_exceeds_by_less_than_one_voucher(history: list[tuple[str, int]]) -> None:
    state, seen = channel(), [0]
    for move, amount in history:
        if move == "voucher" and state.voucher + amount <= state.deposit:
            seen.append(state.voucher + amount)
            state = handle(state, ReceiveVoucher(seen[-1], signature(seen[-1])))
        elif move == "reserve" and amount <= state.free:
            state = handle(state, ReserveOpen(amount))
        elif move == "release":
            state = handle(state, ReleaseOpen(min(amount, state.open)))
        elif move == "hold":
            state = handle(state, HoldAmount(min(amount, state.open)))
        elif move == "owe":
            state = handle(state, OweHeld(min(amount, state.held)))
        elif move == "return":
            state = handle(state, ReturnHeld(min(amount, state.held)))
        elif move == "redeem" and (found := earned(state, NOW)).redeemable:
            assert found.voucher <= state.used
            state = handle(state, ChainRedeemed(found.voucher))
    assert state.redeemed <= state.used
    held = [amount for amount, _ in steps(state.ladder)]
    assert held == sorted(set(held)) and len(held) <= STEPS_MAX and all(amount in seen for amount in held)
    closing = replace(state, closing=CLOSING)
    for now, owed in ((NOW, state.used), (LATE, state.used + state.held + state.open)):
        voucher, gain = taken(closing, now)
        assert state.redeemed + gain >= owed, "whoever closes alone pays what is owed"
        if gain and len(held) < STEPS_MAX - 1:  # else some were left out
            assert voucher == min(amount for amount in seen if amount >= owed), "and no more than the next voucher"


def test_ladder_keeps_the_smallest_holes_when_it_is_full() -> None:
    ladder = b""
    for amount in range(1, 41):
        ladder = trimmed(climbed(ladder, amount * 10, signature(amount * 10)), used=5, redeemed=0, newest=1_000)
    kept = [5, *(amount for amount, _ in steps(ladder)), 1_000]
    assert len(kept) == STEPS_MAX + 1
    assert trimmed(ladder, used=1_000, redeemed=0, newest=1_000) == b""
    assert climbed(b"", 7, b"") == climbed(b"", 0, signature(0)) == b""


# --- what the ledger makes of a redemption ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("followed", [False, True])
def test_redemption_noted_before_or_after_the_follower_counts_once(followed: bool) -> None:
    """Noted as a sum after the follower, it would raise the voucher above all that the client has signed: free credit."""
    state = channel(100, 250, used=250)
    hub = HubChannel(handle(state, ChainRedeemed(250)) if followed else state, Address(bytes(20)))

    def put_hub(after: ReceivedChannel) -> None:
        hub.state = after

    market = SimpleNamespace(ledger=SimpleNamespace(hubs={state.id: hub}, put_hub=put_hub))
    Market.note_redeemed(cast(Any, market), state.id, 250)
    assert (hub.state.redeemed, hub.state.voucher, hub.state.free) == (250, 250, 0)

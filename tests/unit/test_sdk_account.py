"""The voucher rule: covered when it can be, never past the deposit, never past W, never lower."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sdk_terms import NOW, a_hash, address

from gpumarket.core.errors import OutOfFunds
from gpumarket.core.units import Money
from gpumarket.sdk.account import PaidChannelState, Report, voucher_for

AMOUNT = st.integers(0, 1_000)


def channel(*, deposit: int = 1_000, voucher: int = 0, billed: int = 0, open_: int = 0, report: Report | None = None) -> PaidChannelState:
    state = PaidChannelState(
        a_hash("channel"), address("scheduler"), Money(deposit), NOW + 1_000, Money(voucher), Money(billed), Money(open_)
    )
    if report:
        state.report, state.reported = report, True
    return state


def said(used: int = 0, held: int = 0, open_: int = 0, voucher: int = 0) -> Report:
    return Report(Money(voucher), Money(used), Money(held), Money(open_))


def test_voucher_grows_by_what_is_missing_only() -> None:
    state = channel(voucher=100, billed=60, report=said(used=60))
    assert voucher_for(state, Money(40), Money(500), by_report=False) == 100
    assert voucher_for(state, Money(41), Money(500), by_report=False) == 101


def test_voucher_counts_running_jobs() -> None:
    assert voucher_for(channel(billed=10, open_=30, report=said(used=10)), Money(5), Money(500), by_report=False) == 45


def test_voucher_by_report_covers_what_the_scheduler_still_reserves() -> None:
    state = channel(voucher=50, billed=10, report=said(used=10, held=5, open_=40))
    assert voucher_for(state, Money(20), Money(500), by_report=True) == 75


def test_voucher_above_the_deposit_names_the_deposit_command() -> None:
    with pytest.raises(OutOfFunds) as caught:
        voucher_for(channel(deposit=10), Money(11), Money(500), by_report=False)
    assert caught.value.hint.startswith("gpumarket wallet deposit")


def test_voucher_past_the_exposure_is_refused() -> None:
    assert voucher_for(channel(), Money(100), Money(100), by_report=False) == 100
    with pytest.raises(OutOfFunds, match="limit"):
        voucher_for(channel(), Money(101), Money(100), by_report=False)


def test_invented_usage_does_not_widen_the_exposure() -> None:
    state = channel(billed=10, report=said(used=900))
    with pytest.raises(OutOfFunds):
        voucher_for(state, Money(50), Money(100), by_report=True)


def test_hidden_usage_does_not_widen_the_exposure() -> None:
    state = channel(voucher=90, billed=90, report=said(used=0))
    with pytest.raises(OutOfFunds):
        voucher_for(state, Money(50), Money(100), by_report=False)


@given(st.lists(st.tuples(st.sampled_from(["order", "end", "report", "lie"]), AMOUNT, AMOUNT), max_size=40), st.integers(1, 500))
def test_voucher_never_passes_w_deposit_or_falls(moves: list[tuple[str, int, int]], limit: int) -> None:
    """Any order of jobs, endings, reports and lies: each raise of the voucher keeps to deposit and W, and none lowers it."""
    state = channel(deposit=2_000)
    running: list[int] = []
    for move, first, second in moves:
        before = state.voucher
        if move == "order":
            with suppress(OutOfFunds):
                state.voucher = voucher_for(state, Money(first), Money(limit), by_report=bool(second % 2))
                running.append(first)
                state.open = Money(state.open + first)
        elif move == "end" and running:
            maximum = running.pop()
            state.open = Money(state.open - maximum)
            state.billed = Money(state.billed + min(second, maximum))
        elif move == "report":
            state.report = said(used=state.billed, open_=state.open, voucher=state.voucher)
        elif move == "lie":
            state.report = said(used=first, held=second)
        assert state.voucher >= before
        if state.voucher > before:
            assert state.voucher <= state.deposit
            assert state.voucher - min(state.billed, state.report.used) <= limit

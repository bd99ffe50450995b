"""The day's cap: no voucher takes more than it within 24 hours, whatever the clock, the process or the disk does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import reliability
from hypothesis import given, settings
from hypothesis import strategies as st
from sdk_market import CLIENT, MemoryChain
from sdk_terms import NOW, address
from sqlalchemy import create_engine, select

from gpumarket.core.errors import OutOfFunds, SpendLimitReached
from gpumarket.core.ports import SystemRandom
from gpumarket.core.units import Money, parse_money
from gpumarket.sdk import spending
from gpumarket.sdk.account import Account
from gpumarket.sdk.settings import ClientSettings
from gpumarket.sdk.tables import METADATA, SPEND_LIMIT, SPENDING
from gpumarket.settlement import guard
from gpumarket.settlement.journal import Journal

DAY, MINUTE = spending.DAY_SECONDS, spending.BUCKET_SECONDS
ONE = parse_money("1")
SCHEDULER = address("scheduler")


@dataclass
class Hands:
    """A clock whose hands are moved by the test."""

    wall: int = NOW
    running: float = 0.0

    def now(self) -> int:
        return self.wall

    def monotonic(self) -> float:
        return self.running

    def wait(self, seconds: int) -> None:
        self.wall += seconds
        self.running += seconds


@asynccontextmanager
async def opened(folder: Path, chain: MemoryChain, clock: Hands, **changes: Any) -> AsyncIterator[tuple[Account, Journal]]:
    values: dict[str, Any] = {"deposit": "50", "exposure": "40", "spend_limit": "3"}
    journal = Journal(f"sqlite:///{folder / 'journal.db'}", METADATA)
    journal.open()
    try:
        yield Account(journal, chain, CLIENT, ClientSettings(**(values | changes)), clock, SystemRandom()), journal
    finally:
        await journal.close()


async def order(account: Account, amount: int, also: Callable[..., None] = lambda _: None) -> int:
    """As an order does; what is signed away afterwards, in base units."""
    channel = await account.channel(SCHEDULER, 60)
    await account.cover(channel, Money(amount), also)
    return channel.voucher


async def test_spending_up_to_the_cap_passes_and_beyond_it_nothing_is_written(tmp_path: Path) -> None:
    clock, written = Hands(), []
    async with opened(tmp_path, MemoryChain(), clock) as (account, journal):
        assert await order(account, 2 * ONE) == 2 * ONE
        clock.wait(3_600)
        with pytest.raises(SpendLimitReached) as caught:
            await order(account, 2 * ONE, lambda _: written.append("order"))
        channel = await account.channel(SCHEDULER, 60)
        assert channel.voucher == 2 * ONE
        assert journal.read(lambda c: guard.guarded(c, channel.id)) == 2 * ONE
        assert account.spending().left == ONE
        assert "enough is free at 2027-01-16 08:01:00 UTC" in caught.value.message
        assert "gpumarket wallet limit 4" in caught.value.hint
        assert caught.value.retryable
        assert await order(account, ONE) == 3 * ONE


async def test_spending_frees_after_a_day_and_not_before(tmp_path: Path) -> None:
    clock = Hands()
    async with opened(tmp_path, MemoryChain(), clock) as (account, _):
        await order(account, 3 * ONE)
        clock.wait(DAY + MINUTE - 1)
        with pytest.raises(SpendLimitReached):
            await order(account, 1)
        clock.wait(1)
        assert await order(account, 3 * ONE) == 6 * ONE


async def test_spending_of_a_busy_day_stays_a_bounded_number_of_rows(tmp_path: Path) -> None:
    clock = Hands()
    async with opened(tmp_path, MemoryChain(), clock, spend_limit="30") as (account, journal):
        for _ in range(40):
            await order(account, 1)
            clock.wait(7)
        assert account.spending().spent == 40
        assert len(journal.read(lambda c: c.execute(select(SPENDING)).all())) == 5
        clock.wait(3 * DAY)
        await order(account, 1)
        assert len(journal.read(lambda c: c.execute(select(SPENDING)).all())) == 1


async def test_spending_counts_all_channels_together(tmp_path: Path) -> None:
    async with opened(tmp_path, MemoryChain(), Hands()) as (account, _):
        await order(account, 2 * ONE)
        other = await account.channel(address("another scheduler"), 60)
        with pytest.raises(SpendLimitReached):
            await account.cover(other, Money(2 * ONE), lambda _: None)


async def test_spending_survives_a_restart(tmp_path: Path) -> None:
    clock, chain = Hands(), MemoryChain()
    async with opened(tmp_path, chain, clock) as (account, _):
        await order(account, 3 * ONE)
    async with opened(tmp_path, chain, clock) as (account, _):
        with pytest.raises(SpendLimitReached):
            await order(account, 3 * ONE + 1)


async def test_spending_that_an_older_journal_did_not_know_of_counts_from_now(tmp_path: Path) -> None:
    """What the payee or the chain proves is taken over whatever the cap says, and leaves so much less of the day."""
    clock = Hands()
    async with opened(tmp_path, MemoryChain(), clock) as (account, _):
        channel = await account.channel(SCHEDULER, 60)
        await account.catch_up(channel, Money(2 * ONE))
        assert channel.voucher == 2 * ONE and account.spending().left == ONE
        await account.catch_up(channel, Money(ONE))
        assert channel.voucher == 2 * ONE and account.spending().left == ONE
        with pytest.raises(SpendLimitReached):
            await account.cover(channel, Money(4 * ONE), lambda _: None)
        await account.catch_up(channel, Money(9 * ONE))
        assert channel.voucher == 9 * ONE and account.spending().left == 0
        clock.wait(DAY + MINUTE)
        assert account.spending().left == 3 * ONE


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("back", [1, 3_600, DAY, 40 * DAY])
async def test_spending_clock_set_back_frees_nothing(tmp_path: Path, back: int, restart: bool) -> None:
    clock, chain = Hands(), MemoryChain()
    async with opened(tmp_path, chain, clock) as (account, _):
        await order(account, 3 * ONE)
        clock.wall -= back
        if not restart:
            with pytest.raises(SpendLimitReached):
                await order(account, 1)
            clock.running += DAY + MINUTE
            assert await order(account, 1) > 3 * ONE, "a day has passed, whatever the wall clock says"
            return
    async with opened(tmp_path, chain, clock) as (account, _):
        with pytest.raises(SpendLimitReached, match="ahead once"):
            await order(account, 3 * ONE + 1)


async def test_spending_clock_that_ran_ahead_is_mended_by_the_owner_only(tmp_path: Path) -> None:
    clock, chain = Hands(NOW + 1_000 * DAY), MemoryChain()
    async with opened(tmp_path, chain, clock, channel_days=2_000) as (account, _):
        await order(account, 3 * ONE)
    clock.wall = NOW
    async with opened(tmp_path, chain, clock) as (account, _):
        clock.wait(2 * DAY)
        with pytest.raises(SpendLimitReached, match="ahead once"):
            await order(account, 3 * ONE + 1)
        await account.limit_spending(Money(3 * ONE))
        assert account.spending().spent == 3 * ONE, "what was spent is not forgiven"
        clock.wait(DAY + MINUTE)
        assert await order(account, 4 * ONE) > 3 * ONE


async def test_spending_smaller_limit_of_settings_and_wallet_holds(tmp_path: Path) -> None:
    async with opened(tmp_path, MemoryChain(), Hands(), spend_limit="") as (account, _):
        assert account.spending().limit is None
        await order(account, 9 * ONE)
        await account.limit_spending(Money(10 * ONE))
        with pytest.raises(SpendLimitReached):
            await order(account, 2 * ONE)
    async with opened(tmp_path, MemoryChain(), Hands(), spend_limit="20") as (account, _):
        assert account.spending().limit == 10 * ONE
        await account.limit_spending(None)
        assert account.spending().limit == 20 * ONE


async def test_spending_more_than_a_whole_day_is_said_so(tmp_path: Path) -> None:
    async with opened(tmp_path, MemoryChain(), Hands()) as (account, _):
        with pytest.raises(SpendLimitReached, match="more than a whole day") as caught:
            await order(account, 4 * ONE)
        assert not caught.value.retryable


async def test_spending_refused_by_the_guard_or_the_deposit_is_not_counted(tmp_path: Path) -> None:
    async with opened(tmp_path, MemoryChain(), Hands(), deposit="1") as (account, _):
        with pytest.raises(OutOfFunds):
            await order(account, 2 * ONE)
        assert account.spending().spent == 0


MOVES = st.lists(st.tuples(st.sampled_from(["spend", "wait", "back", "right"]), st.integers(1, 2 * DAY)), max_size=40)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(MOVES)
def within_the_cap(moves: list[tuple[str, int]]) -> None:
    """The wall clock is put back and right again at will; time as the client tells it never falls behind what ran since."""
    engine = create_engine("sqlite://")
    spent: list[tuple[int, int]] = []
    true, wall, latest = NOW, NOW, NOW
    with engine.begin() as connection:
        METADATA.create_all(connection, tables=[SPENDING, SPEND_LIMIT])
        for move, size in moves:
            if move == "spend":
                with suppress(SpendLimitReached):
                    spending.spend(connection, max(latest, wall), Money(size), Money(DAY))
                    spent.append((true, size))
            elif move == "wait":
                true, wall, latest = true + size, wall + size, latest + size
            else:
                wall = true if move == "right" else wall - size
            assert sum(amount for at, amount in spent if at > true - DAY) <= DAY
    engine.dispose()


def test_spending_never_passes_the_cap_in_any_day_while_the_clock_jumps() -> None:
    within_the_cap()
    reliability.record("per-day spend cap", 150, "0 days over the cap", "0")

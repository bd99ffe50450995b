"""API keys and what they may spend: hashes only, budgets that hold under any order of events, revocation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumarket.core.errors import ConfigError
from gpumarket.core.terms import keccak256
from gpumarket.core.units import Hash, Money
from gpumarket.gateway.keys import Key, KeyFile, Limits
from gpumarket.gateway.ledger import DAY_SECONDS, Ledger, spent_by_key
from gpumarket.gateway.problems import Problem
from gpumarket.gateway.rates import Rates
from gpumarket.gateway.tables import FILE, METADATA
from gpumarket.settlement.journal import Journal


class ClockByHand:
    def __init__(self, now: int = 20_000 * DAY_SECONDS + 100) -> None:
        self.seconds = now

    def now(self) -> int:
        return self.seconds

    def monotonic(self) -> float:
        return float(self.seconds)


def job(number: int) -> Hash:
    return Hash(keccak256(number.to_bytes(4, "big")))


@asynccontextmanager
async def ledger(folder: Path, clock: ClockByHand) -> AsyncIterator[Ledger]:
    journal = Journal(f"sqlite:///{folder / FILE}", METADATA)
    journal.open()
    found = Ledger(journal, clock)
    found.load()
    try:
        yield found
    finally:
        await journal.close()


def key(day: int | None = None, total: int | None = None, name: str = "key-1") -> Key:
    limits = Limits(None if day is None else Money(day), None if total is None else Money(total))
    return Key(name, name, bytes(32), limits, 0)


# --- keys ----------------------------------------------------------------------------------------------------------------------


def test_key_is_shown_once_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path)
    made, secret = keys.create("mine", Limits())
    assert secret.startswith("gm-") and len(secret) == 46
    found = keys.find(secret)
    assert found is not None and found.id == made.id
    keys.close()
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes()
        assert secret[3:].encode() not in file.read_bytes()
    assert (tmp_path / "keys.db").stat().st_mode & 0o077 == 0


def test_key_that_another_process_made_or_revoked_is_noticed(tmp_path: Path) -> None:
    serving, managing = KeyFile(tmp_path), KeyFile(tmp_path)
    _, secret = managing.create("mine", Limits())
    assert serving.find(secret) is not None
    assert managing.revoke("mine").revoked_at > 0
    assert serving.find(secret) is None
    _, second = managing.create("another", Limits())
    assert serving.find(second) is not None


@pytest.mark.parametrize("wrong", ["", "gm-", "sk-abc", "gm-" + "a" * 43, "gm-" + "a" * 44, "gm-" + "ä" * 43])
def test_key_that_nobody_made_is_none(tmp_path: Path, wrong: str) -> None:
    keys = KeyFile(tmp_path)
    keys.create("mine", Limits())
    assert keys.find(wrong) is None


def test_key_of_a_name_that_is_taken_is_refused_even_once_revoked(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path)
    keys.create("mine", Limits())
    keys.revoke("mine")
    with pytest.raises(ConfigError, match="already"):
        keys.create("mine", Limits())
    with pytest.raises(ConfigError, match="no key"):
        keys.revoke("other")


def test_key_keeps_its_limits(tmp_path: Path) -> None:
    limits = Limits(Money(5), Money(7), 3, frozenset({"a", "b"}))
    KeyFile(tmp_path).create("mine", limits)
    assert KeyFile(tmp_path).all()[0].limits == limits


# --- money ---------------------------------------------------------------------------------------------------------------------


async def test_budget_is_reserved_before_and_holds_only_the_cost_after(tmp_path: Path) -> None:
    async with ledger(tmp_path, ClockByHand()) as books:
        mine = key(day=100)
        assert await books.reserve(mine, job(1), Money(40), Money(80)) == 80
        assert books.left(mine) == 20
        with pytest.raises(Problem) as caught:
            await books.reserve(mine, job(2), Money(21), Money(42))
        assert (caught.value.status, caught.value.code) == (429, "insufficient_quota")
        assert await books.reserve(mine, job(3), Money(15), Money(30)) == 20
        await books.settle(job(1), Money(30))
        await books.settle(job(3), Money(0))
        assert books.left(mine) == 70


async def test_day_budget_is_renewed_and_the_total_is_not(tmp_path: Path) -> None:
    clock = ClockByHand()
    async with ledger(tmp_path, clock) as books:
        mine = key(day=100, total=150)
        await books.reserve(mine, job(1), Money(90), Money(90))
        clock.seconds += DAY_SECONDS
        assert books.left(mine) == 60  # what runs since yesterday is yesterday's, and part of the total
        await books.settle(job(1), Money(90))
        assert books.left(mine) == 60
        assert (books.account("key-1").day_spent, books.account("key-1").total_spent) == (0, 90)


async def test_settling_twice_books_once(tmp_path: Path) -> None:
    async with ledger(tmp_path, ClockByHand()) as books:
        mine = key(total=100)
        await books.reserve(mine, job(1), Money(10), Money(10))
        await books.settle(job(1), Money(10))
        await books.settle(job(1), Money(10))
        assert books.left(mine) == 90


async def test_reservation_and_spending_survive_a_restart(tmp_path: Path) -> None:
    clock = ClockByHand()
    async with ledger(tmp_path, clock) as books:
        mine = key(total=100)
        await books.reserve(mine, job(1), Money(10), Money(10))
        await books.settle(job(1), Money(7))
        await books.reserve(mine, job(2), Money(20), Money(20))
    async with ledger(tmp_path, clock) as books:
        assert books.left(mine) == 73
        await books.settle(job(2), Money(1))
        assert books.left(mine) == 92
    assert spent_by_key(tmp_path, ["key-1", "key-2"], clock) == {"key-1": (8, 8), "key-2": (0, 0)}


async def test_keys_do_not_spend_each_others_budget(tmp_path: Path) -> None:
    async with ledger(tmp_path, ClockByHand()) as books:
        one, other = key(total=100, name="key-1"), key(total=100, name="key-2")
        await books.reserve(one, job(1), Money(100), Money(100))
        assert (books.left(one), books.left(other)) == (0, 100)


async def test_budget_holds_among_reservations_made_at_once(tmp_path: Path) -> None:
    async with ledger(tmp_path, ClockByHand()) as books:
        mine = key(total=100)
        tried = [books.reserve(mine, job(n), Money(30), Money(30)) for n in range(10)]
        done = await asyncio.gather(*tried, return_exceptions=True)
        assert sum(isinstance(one, int) for one in done) == 3
        assert books.left(mine) == 10


# --- rate ----------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 30), min_size=1, max_size=200), st.integers(1, 20))
def test_rate_is_never_passed_by_more_than_a_burst(gaps: list[float], per_minute: int) -> None:
    rates, now, allowed = Rates(), 0.0, []
    for gap in gaps:
        now += gap
        if rates.wait_seconds("k", per_minute, now) == 0:
            allowed.append(now)
    for start in allowed:
        within = sum(start <= at < start + 60 for at in allowed)
        assert within <= 2 * per_minute
    assert len(allowed) <= per_minute + now * per_minute / 60 + 1e-6


def test_rate_that_is_spent_tells_when_to_come_back() -> None:
    rates = Rates()
    assert [rates.wait_seconds("k", 2, 0.0) for _ in range(2)] == [0, 0]
    wait = rates.wait_seconds("k", 2, 0.0)
    assert wait == 30
    assert rates.wait_seconds("other", 2, 0.0) == 0
    assert rates.wait_seconds("k", 2, wait) == 0

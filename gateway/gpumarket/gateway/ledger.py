"""What each key has spent and may still spend. Money is reserved, durably, before an order; what the job really cost replaces it after.

Invariants: spent + reserved never passes a key's limit, of the day or in all; a reservation ends exactly once, in the transaction that
books what its job cost. After a crash the reservations are still there, and each is settled by what the client's journal says of its job.
A day is a UTC day; a job is charged to the day on which it was ordered.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, bindparam, create_engine, delete, insert, select

from gpumarket.core.ports import Clock
from gpumarket.core.units import Hash, Money, format_money
from gpumarket.gateway.keys import Key
from gpumarket.gateway.problems import Problem
from gpumarket.gateway.tables import ACCOUNTS, FILE, RESERVATIONS
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.prepared import Prepared

DAY_SECONDS = 86_400
_RESERVE = Prepared(insert(RESERVATIONS), RESERVATIONS.c.keys())
_END = Prepared(delete(RESERVATIONS).where(RESERVATIONS.c.job == bindparam("job")))
_FORGET = Prepared(delete(ACCOUNTS).where(ACCOUNTS.c.key == bindparam("key")))
_BOOK = Prepared(insert(ACCOUNTS), ACCOUNTS.c.keys())


@dataclass(slots=True)
class Account:
    """One key's money, base units. `day_reserved` is what of `reserved` counts for `day`."""

    day: int
    day_spent: int = 0
    total_spent: int = 0
    reserved: int = 0
    day_reserved: int = 0

    def turn(self, day: int) -> None:
        """Another day has begun: what runs since yesterday is yesterday's."""
        if day > self.day:
            self.day, self.day_spent, self.day_reserved = day, 0, 0


@dataclass(frozen=True, slots=True)
class Reservation:
    """Money that a job under way may cost."""

    job: Hash
    key: str
    day: int
    amount: Money


class Ledger:
    """The money of all keys. One process; `load` it first."""

    def __init__(self, journal: Journal, clock: Clock) -> None:
        self._journal, self._clock = journal, clock
        self._accounts: dict[str, Account] = {}
        self._open: dict[Hash, Reservation] = {}
        self.spent = 0
        """Base units since the process started."""

    def load(self) -> list[Reservation]:
        """Read everything; the reservations that an earlier process left."""
        rows = self._journal.read(lambda c: (c.execute(select(ACCOUNTS)).all(), c.execute(select(RESERVATIONS)).all()))
        for row in rows[0]:
            self._accounts[row.key] = Account(row.day, row.day_spent, row.total_spent)
        for row in rows[1]:
            self._hold(Reservation(Hash(row.job), row.key, row.day, row.amount))
        return list(self._open.values())

    def account(self, key: str) -> Account:
        """A key's money now."""
        account = self._accounts.setdefault(key, Account(self._today))
        account.turn(self._today)
        return account

    def left(self, key: Key) -> Money | None:
        """What a key may still order for; None where nothing limits it."""
        account, limits = self.account(key.id), key.limits
        rooms = []
        if limits.day is not None:
            rooms.append(limits.day - account.day_spent - account.day_reserved)
        if limits.total is not None:
            rooms.append(limits.total - account.total_spent - account.reserved)
        return Money(max(0, min(rooms))) if rooms else None

    async def reserve(self, key: Key, job: Hash, least: Money, most: Money) -> Money:
        """Hold `most`, or what is left of it but at least `least`, for a job that is about to be ordered. Durable when it returns.

        Raises Problem (429 insufficient_quota) where the key's budget does not cover `least`.
        """
        left = self.left(key)
        if left is not None and left < least:
            raise self._exhausted(key, least, left)
        amount = most if left is None else min(most, left)
        held = Reservation(job, key.id, self._today, Money(amount))
        self._hold(held)
        row: dict[str, Any] = {"job": job, "key": held.key, "day": held.day, "amount": held.amount}
        try:
            await self._journal.transact(lambda c: _RESERVE.run(c, **row))
        except Exception:
            self._release(held)
            raise
        return held.amount

    async def settle(self, job: Hash, cost: Money) -> None:
        """The job is over and cost this. Nothing happens for one that holds nothing."""
        held = self._open.get(job)
        if held is None:
            return
        self._release(held)
        account = self.account(held.key)
        account.total_spent += cost
        self.spent += cost
        if held.day == account.day:
            account.day_spent += cost
        row: dict[str, Any] = {"key": held.key, "day": account.day, "day_spent": account.day_spent, "total_spent": account.total_spent}

        def work(connection: Connection) -> None:
            _END.run(connection, job=job)
            _FORGET.run(connection, key=held.key)
            _BOOK.run(connection, **row)

        await self._journal.transact(work)

    @property
    def _today(self) -> int:
        return self._clock.now() // DAY_SECONDS

    def _hold(self, held: Reservation) -> None:
        account = self.account(held.key)
        self._open[held.job] = held
        account.reserved += held.amount
        if held.day == account.day:
            account.day_reserved += held.amount

    def _release(self, held: Reservation) -> None:
        account = self.account(held.key)
        del self._open[held.job]
        account.reserved -= held.amount
        if held.day == account.day:
            account.day_reserved -= held.amount

    def _exhausted(self, key: Key, least: Money, left: Money) -> Problem:
        account, limits = self.account(key.id), key.limits
        daily = limits.day is not None and limits.day - account.day_spent - account.day_reserved < least
        forever = limits.total is not None and limits.total - account.total_spent - account.reserved < least
        until = "" if forever or not daily else "; it is renewed at 00:00 UTC"
        message = f"this key's budget has {format_money(left)} left, the job may cost {format_money(least)}{until}"
        again = None if forever else float(DAY_SECONDS - self._clock.now() % DAY_SECONDS)
        return Problem(429, "insufficient_quota", message, again_seconds=again or DAY_SECONDS, retry=False)


def spent_by_key(state: Path, keys: Iterable[str], clock: Clock) -> dict[str, tuple[Money, Money]]:
    """Key → (spent today, spent in all), read from outside while a gateway runs or not. Never writes."""
    file = state / FILE
    found = dict.fromkeys(keys, (Money(0), Money(0)))
    if not file.is_file():
        return found
    engine = create_engine(f"sqlite:///file:{file.absolute()}?mode=ro&uri=true")
    try:
        with engine.connect() as connection:
            for row in connection.execute(select(ACCOUNTS)).all():
                today = row.day_spent if row.day == clock.now() // DAY_SECONDS else Money(0)
                found[row.key] = (today, row.total_spent)
    finally:
        engine.dispose()
    return found

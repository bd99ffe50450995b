"""The day's cap: how much more this client may sign away within any 24 hours.

What counts is what a voucher adds to the one before it, since that is what its payee can take; it is taken down in the transaction that
advances the voucher's guard, so neither a crash nor a restart forgets it. Time here is the latest that was ever seen: a clock that is set
back frees nothing. Limits come from the settings and from `gpumarket wallet limit`; the smaller one holds.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from gpumarket.core.errors import SpendLimitReached
from gpumarket.core.units import Money, format_money
from gpumarket.sdk.tables import SPEND_LIMIT, SPENDING
from gpumarket.settlement.prepared import Prepared

DAY_SECONDS = 86_400
BUCKET_SECONDS = 60
"""What is spent within one is one row, and frees a day after its end: at most 1,441 rows are summed for a voucher."""

_AFTER = SPENDING.c.at > bindparam("after")
_LATEST = Prepared(select(func.max(SPENDING.c.at).label("at")))
_WITHIN = Prepared(select(SPENDING.c.at, SPENDING.c.amount).where(_AFTER).order_by(SPENDING.c.at))
_FORGET = Prepared(delete(SPENDING).where(~_AFTER))
_OF_MINUTE = Prepared(select(SPENDING.c.amount).where(SPENDING.c.at == bindparam("bucket")))
_ADD_MINUTE = Prepared(insert(SPENDING), ["at", "amount"])
_SET_MINUTE = Prepared(update(SPENDING).where(SPENDING.c.at == bindparam("bucket")), ["amount"])
_LIMIT = Prepared(select(SPEND_LIMIT.c.amount))


@dataclass(frozen=True, slots=True)
class Spending:
    """The day as it stands. `frees_at` is when the oldest of what was spent falls out of the day (unix seconds; 0: nothing was spent)."""

    limit: Money | None
    spent: Money
    now: int
    """The latest time ever seen, which may be ahead of the clock."""
    frees_at: int

    @property
    def left(self) -> Money | None:
        """What may still be signed away; None without a limit."""
        return None if self.limit is None else Money(max(0, self.limit - self.spent))


def standing(connection: Connection, clock: int, configured: Money | None) -> Spending:
    """What was spent within the 24 hours before `clock` (unix seconds), and the limit in force."""
    now = max(clock, _latest(connection))
    rows = _WITHIN.rows(connection, after=_day_before(now))
    limits = [limit for limit in (configured, stored_limit(connection)) if limit is not None]
    return Spending(
        limit=min(limits) if limits else None,
        spent=Money(sum(row["amount"] for row in rows)),
        now=now,
        frees_at=_free_from(rows[0]["at"]) if rows else 0,
    )


def spend(connection: Connection, clock: int, amount: Money, configured: Money | None) -> None:
    """Take down that `amount` more is signed away; inside the transaction that advances the guard. Raises SpendLimitReached."""
    before = standing(connection, clock, configured)
    if before.limit is not None and before.spent + amount > before.limit:
        raise SpendLimitReached(_refusal(connection, before, amount, clock), hint=_hint(before, amount), retryable=amount <= before.limit)
    _FORGET.run(connection, after=_day_before(before.now))
    _add(connection, before.now, amount)


def found(connection: Connection, clock: int, amount: Money) -> None:
    """Take down what was signed away before and this journal, an older copy, did not know of. It counts from now, since nobody can say
    when it was; it is never refused, since it has happened."""
    _add(connection, max(clock, _latest(connection)), amount)


def set_limit(connection: Connection, clock: int, limit: Money | None) -> None:
    """The owner's word: a new limit, or None for none of its own. What was taken down in times still to come, by a clock that ran ahead,
    counts from now: this alone mends such a clock."""
    connection.execute(delete(SPEND_LIMIT))
    if limit is not None:
        connection.execute(insert(SPEND_LIMIT).values(id=1, amount=limit))
    ahead = connection.execute(select(SPENDING.c.amount).where(SPENDING.c.at > clock)).all()
    if ahead:
        connection.execute(delete(SPENDING).where(SPENDING.c.at > clock))
        _add(connection, clock, Money(sum(row.amount for row in ahead)))


def _latest(connection: Connection) -> int:
    row = _LATEST.first(connection)
    return (row and row["at"]) or 0


def history(connection: Connection) -> dict[int, Money]:
    """What is taken down: beginning of its minute (unix seconds) → amount."""
    return {row.at: row.amount for row in connection.execute(select(SPENDING.c.at, SPENDING.c.amount))}


def stored_limit(connection: Connection) -> Money | None:
    """The limit that the journal itself holds."""
    row = _LIMIT.first(connection)
    return None if row is None else Money(row["amount"])


def take_over(connection: Connection, spent: Mapping[int, Money], limit: Money | None) -> None:
    """What the same key spent elsewhere, and the limit that held there. Nothing here becomes less strict; twice is as once."""
    here, before = history(connection), stored_limit(connection)
    for at, amount in spent.items():
        if at not in here:
            connection.execute(insert(SPENDING).values(at=at, amount=amount))
        elif here[at] < amount:
            connection.execute(update(SPENDING).where(SPENDING.c.at == at).values(amount=amount))
    if limit is not None and (before is None or limit < before):
        connection.execute(delete(SPEND_LIMIT))
        connection.execute(insert(SPEND_LIMIT).values(id=1, amount=limit))


def _add(connection: Connection, now: int, amount: Money) -> None:
    bucket = now - now % BUCKET_SECONDS
    row = _OF_MINUTE.first(connection, bucket=bucket)
    if row is None:
        _ADD_MINUTE.run(connection, at=bucket, amount=amount)
    else:
        _SET_MINUTE.run(connection, bucket=bucket, amount=Money(row["amount"] + amount))


def _day_before(now: int) -> int:
    """What begins after this is spent within the day before `now`, the whole of its minute counted."""
    return now - DAY_SECONDS - BUCKET_SECONDS


def _free_from(bucket: int) -> int:
    return bucket + BUCKET_SECONDS + DAY_SECONDS


def _refusal(connection: Connection, before: Spending, amount: Money, clock: int) -> str:
    assert before.limit is not None
    limit, spent = format_money(before.limit), format_money(before.spent)
    said = f"the day's limit is {limit}, {spent} are spent, this takes {format_money(amount)} more"
    if amount > before.limit:
        return f"{said}: more than a whole day's"
    text = f"{said}; enough is free at {_time(_free_for(connection, before, amount))}"
    return f"{text} (the clock was {before.now - clock} s ahead once: its latest time counts)" if before.now > clock else text


def _free_for(connection: Connection, before: Spending, amount: Money) -> int:
    """When enough of the day's spending has fallen out of it for `amount`."""
    assert before.limit is not None
    excess = before.spent + amount - before.limit
    at = before.now
    for row in _WITHIN.rows(connection, after=_day_before(before.now)):
        at, excess = row["at"], excess - row["amount"]
        if excess <= 0:
            break
    return _free_from(int(at))


def _hint(before: Spending, amount: Money) -> str:
    assert before.limit is not None
    raised = f"gpumarket wallet limit {format_money(Money(before.spent + amount))}, and GPUMARKET_CLIENT_SPEND_LIMIT where it is set"
    return f"raise it: {raised}" if amount > before.limit else f"wait, or raise it: {raised}"


def _time(at: int) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")

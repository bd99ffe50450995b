"""The client's signing guard out of its journal and into it (`gpumarket.settlement.guard_file`); an import never lowers an amount."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from gpumarket.core.errors import BadSignature
from gpumarket.core.units import Money
from gpumarket.sdk import spending
from gpumarket.sdk.tables import CHANNELS
from gpumarket.settlement import guard
from gpumarket.settlement.guard_file import Guarded, GuardedChannel


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did: channels that were new, that were raised, and that stood as high already."""

    added: int
    raised: int
    unchanged: int


def guarded(connection: Connection) -> Guarded:
    """All that a file takes along: every channel's guard, and what the day's cap reckons with."""
    return Guarded(guarded_channels(connection), spent=spending.history(connection), limit=spending.stored_limit(connection))


def take_over(connection: Connection, theirs: Guarded, now: int) -> Imported:
    """A whole file, in one transaction. Raises as `take_in`."""
    spending.take_over(connection, theirs.spent, theirs.limit)
    return take_in(connection, list(theirs.channels), now)


def guarded_channels(connection: Connection) -> list[GuardedChannel]:
    """Every channel of the journal with its guard."""
    rows = connection.execute(select(CHANNELS.c.id, CHANNELS.c.scheduler, CHANNELS.c.billed)).all()
    return [GuardedChannel(row.id, row.scheduler, guard.guarded(connection, row.id) or Money(0), row.billed) for row in rows]


def take_in(connection: Connection, channels: list[GuardedChannel], now: int) -> Imported:
    """Add what is not here, raise what is lower here. Raises BadSignature for a channel that pays somebody else here."""
    added = raised = 0
    for entry in channels:
        payee = connection.execute(select(CHANNELS.c.scheduler).where(CHANNELS.c.id == entry.channel)).scalar_one_or_none()
        if payee is None:
            _admit(connection, entry, now)
            added += 1
        elif payee != entry.payee:
            raise BadSignature(f"channel 0x{entry.channel.hex()} pays 0x{payee.hex()} here, 0x{entry.payee.hex()} in the file")
        elif (guard.guarded(connection, entry.channel) or 0) < entry.cumulative:
            guard.advance(connection, entry.channel, entry.cumulative)
            connection.execute(update(CHANNELS).where(CHANNELS.c.id == entry.channel).values(voucher=entry.cumulative))
            raised += 1
    return Imported(added, raised, len(channels) - added - raised)


def _admit(connection: Connection, entry: GuardedChannel, now: int) -> None:
    guard.admit(connection, entry.channel, entry.cumulative)
    values = {"id": entry.channel, "scheduler": entry.payee, "voucher": entry.cumulative, "billed": entry.billed}
    connection.execute(insert(CHANNELS).values(**values, closing=False, opened_at=now))

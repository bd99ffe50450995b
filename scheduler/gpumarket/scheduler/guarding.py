"""The scheduler's signing guard out of its ledger and into it (`gpumarket.settlement.guard_file`); an import never lowers an amount.

Its ledger is more than its guard: what clients paid in is in vouchers that only the ledger holds. So the ledger is what is to be moved; the
guard is for a key whose ledger is lost or older, and it says what is lost no further.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from gpumarket.core.daemon import StateFolder
from gpumarket.core.errors import BadSignature, JournalError
from gpumarket.core.units import Address, Hash, Money, hex0x
from gpumarket.scheduler import migrations
from gpumarket.scheduler import tables as t
from gpumarket.scheduler.settings import SchedulerSettings
from gpumarket.settlement import guard
from gpumarket.settlement.guard_file import ConsentedClose, Guarded, GuardedChannel
from gpumarket.settlement.journal import Journal


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did: channels that were new, that were raised, and that stood as high already."""

    added: int
    raised: int
    unchanged: int


@asynccontextmanager
async def journal_of(settings: SchedulerSettings) -> AsyncIterator[Journal]:
    """The ledger's journal without a market, made where there is none. Raises StateLocked while a scheduler works on it, JournalError."""
    with StateFolder(settings.state):
        migrations.upgrade(settings.database_url)
        journal = Journal(settings.database_url, t.metadata)
        journal.open()
        try:
            yield journal
        finally:
            await journal.close()


def guarded(connection: Connection) -> Guarded:
    """Every channel to a provider with its guard, and every client's channel to whose close this key has consented."""
    spokes = connection.execute(select(t.spokes.c.id, t.spokes.c.provider)).all()
    channels = [
        GuardedChannel(Hash(row.id), Address(row.provider), guard.guarded(connection, Hash(row.id)) or Money(0), Money(0)) for row in spokes
    ]
    hubs = connection.execute(select(t.client_channels).where(t.client_channels.c.close_signed)).all()
    closes = [
        ConsentedClose(Hash(r.id), Address(r.payer), Address(r.signer), Money(max(r.used, r.redeemed)), r.voucher, bytes(r.signature))
        for r in hubs
    ]
    return Guarded(channels, closes)


def take_over(connection: Connection, theirs: Guarded) -> Imported:
    """Add what is not here, raise what is lower here. Raises BadSignature for a channel that pays somebody else here, JournalError for a
    ledger that is too old to go on with."""
    done = [_spoke(connection, entry) for entry in theirs.channels]
    for close in theirs.closes:
        _close(connection, close)
    return Imported(done.count("added"), done.count("raised"), done.count("unchanged"))


def _spoke(connection: Connection, entry: GuardedChannel) -> str:
    row = connection.execute(select(t.spokes).where(t.spokes.c.id == entry.channel)).one_or_none()
    if row is None:
        guard.admit(connection, entry.channel, entry.cumulative)
        values = {"id": entry.channel, "provider": entry.payee, "deposit": entry.cumulative, "vouchered": entry.cumulative}
        unknown = {"expires_at": 0, "reserved": Money(0), "redeemed": Money(0), "closing": 0, "closed": False}  # the chain tells
        connection.execute(insert(t.spokes).values(**values, **unknown))
        return "added"
    if row.provider != entry.payee:
        raise BadSignature(f"channel {hex0x(entry.channel)} pays {hex0x(row.provider)} here, {hex0x(entry.payee)} in the file")
    if (guard.guarded(connection, entry.channel) or 0) >= entry.cumulative:
        return "unchanged"
    vouchered = max(row.vouchered, entry.cumulative)
    if vouchered + row.reserved > row.deposit:
        raise JournalError(
            f"channel {hex0x(entry.channel)}: {entry.cumulative} was signed before, and with what this ledger still reserves "
            f"({row.reserved}) that is more than the deposit of {row.deposit}: the ledger is too old to go on with",
            hint="bring a newer copy of the ledger back",
        )
    guard.advance(connection, entry.channel, entry.cumulative)
    connection.execute(update(t.spokes).where(t.spokes.c.id == entry.channel).values(vouchered=vouchered))
    return "raised"


def _close(connection: Connection, close: ConsentedClose) -> None:
    at = t.client_channels.c.id == close.channel
    if connection.execute(select(t.client_channels.c.id).where(at)).one_or_none() is not None:
        connection.execute(update(t.client_channels).where(at).values(close_signed=True))
        return
    values = {"id": close.channel, "payer": close.payer, "signer": close.signer, "used": close.used, "voucher": close.voucher}
    known = {"deposit": close.voucher, "signature": close.signature, "close_signed": True, "ladder": b""}
    nothing = {name: Money(0) for name in ("held", "open", "redeemed")}
    connection.execute(insert(t.client_channels).values(**values, **known, **nothing, expires_at=0, closing=0, closed=False))

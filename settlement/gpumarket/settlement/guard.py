"""The signing guard: the highest cumulative amount that was ever released for signature, per channel.

Invariant (I3): a key signs for a channel only what is strictly above this row, and the row is committed before the signature exists.
A channel without a row is refused: a key that was restored without its journal must not sign blindly. Call these inside the same
`Journal.transact` as the ledger entry that they belong to, and sign after it has returned.
"""

from __future__ import annotations

from sqlalchemy import Column, Connection, LargeBinary, MetaData, Table, bindparam, column, insert, select, table, update

from gpumarket.core.errors import JournalError
from gpumarket.core.units import MONEY_MAX, Hash, Money
from gpumarket.settlement.journal import MoneyType

_NAME = "voucher_guard"
_guard = table(_NAME, column("channel", LargeBinary(32)), column("cumulative", MoneyType()))
_advance = (
    update(_guard)
    .where(_guard.c.channel == bindparam("at"), _guard.c.cumulative < bindparam("to", type_=MoneyType()))
    .values(cumulative=bindparam("to", type_=MoneyType()))
)
_read = select(_guard.c.cumulative).where(_guard.c.channel == bindparam("at"))


def guard_table(metadata: MetaData) -> Table:
    """The guard's table in a journal's metadata; calling it twice gives the same table."""
    if _NAME in metadata.tables:
        return metadata.tables[_NAME]
    return Table(
        _NAME,
        metadata,
        Column("channel", LargeBinary(32), primary_key=True),
        Column("cumulative", MoneyType(), nullable=False),
    )


def advance(connection: Connection, channel: Hash, cumulative: int) -> None:
    """Raise the channel's guard to `cumulative`. Raises JournalError when it is not strictly higher, or the channel has no guard."""
    if not 0 <= cumulative <= MONEY_MAX:
        raise JournalError(f"refusing to sign {cumulative} for channel 0x{channel.hex()}: it does not fit uint96")
    if connection.execute(_advance, {"at": channel, "to": cumulative}).rowcount == 1:
        return
    last = guarded(connection, channel)
    if last is None:
        raise JournalError(
            f"refusing to sign for channel 0x{channel.hex()}: this journal holds no guard of it, so what was signed before is unknown",
            hint="restore the journal that belongs to this key, or close the channel and open another",
        )
    raise JournalError(f"refusing to sign {cumulative} for channel 0x{channel.hex()}: {last} was signed before, and only more may follow")


def admit(connection: Connection, channel: Hash, cumulative: int = 0) -> None:
    """Register a channel that this key has just opened, or whose last signed amount is known. Raises JournalError when it has a guard."""
    if guarded(connection, channel) is not None:
        raise JournalError(f"channel 0x{channel.hex()} has a guard already; admitting it again could lower it")
    connection.execute(insert(_guard), {"channel": channel, "cumulative": cumulative})


def guarded(connection: Connection, channel: Hash) -> Money | None:
    """The highest amount released for signature, or None for a channel without a guard."""
    found: Money | None = connection.execute(_read, {"at": channel}).scalar_one_or_none()
    return found

"""The sender's table: every transaction of this key, written down before it is broadcast, and what became of it.

One row per signed transaction; replacements share the nonce of what they replace. Money decisions never rest on this table: the chain's
events are the truth, this is only how to send the same thing again instead of another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    column,
    func,
    insert,
    select,
    table,
    update,
)

from gpumarket.core.errors import JournalError
from gpumarket.core.units import Hash
from gpumarket.settlement.journal import MoneyType

PENDING, MINED, FAILED, DROPPED = "pending", "mined", "failed", "dropped"
_NAME = "chain_transactions"
_outbox = table(
    _NAME,
    column("id", Integer),
    column("nonce", BigInteger),
    column("label", String(200)),
    column("tx_hash", LargeBinary(32)),
    column("raw", LargeBinary),
    column("recipient", LargeBinary(20)),
    column("data", LargeBinary),
    column("gas", BigInteger),
    column("max_fee", MoneyType()),
    column("priority_fee", MoneyType()),
    column("state", String(8)),
    column("block", BigInteger),
    column("gas_used", BigInteger),
)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A signed transaction. Fees in wei per gas."""

    id: int
    nonce: int
    label: str
    tx_hash: Hash
    raw: bytes
    recipient: bytes
    data: bytes
    gas: int
    max_fee: int
    priority_fee: int
    state: str = PENDING
    block: int = 0
    gas_used: int = 0


def sender_tables(metadata: MetaData) -> Table:
    """The sender's table in a journal's metadata; calling it twice gives the same table."""
    if _NAME in metadata.tables:
        return metadata.tables[_NAME]
    return Table(
        _NAME,
        metadata,
        Column("id", Integer, primary_key=True, autoincrement=True),
        Column("nonce", BigInteger, nullable=False, index=True),
        Column("label", String(200), nullable=False, index=True),
        Column("tx_hash", LargeBinary(32), nullable=False, unique=True),
        Column("raw", LargeBinary, nullable=False),
        Column("recipient", LargeBinary(20), nullable=False),
        Column("data", LargeBinary, nullable=False),
        Column("gas", BigInteger, nullable=False),
        Column("max_fee", MoneyType(), nullable=False),
        Column("priority_fee", MoneyType(), nullable=False),
        Column("state", String(8), nullable=False, index=True),
        Column("block", BigInteger, nullable=False),
        Column("gas_used", BigInteger, nullable=False),
    )


def add(connection: Connection, transaction: Outgoing) -> Outgoing:
    """Write one down; returns it with its id."""
    values = {name: getattr(transaction, name) for name in Outgoing.__slots__ if name != "id"}
    key = connection.execute(insert(_outbox).values(values).returning(_outbox.c.id)).scalar_one()
    return replace(transaction, id=int(key))


def settle(connection: Connection, transaction: Outgoing, state: str, block: int = 0, gas_used: int = 0) -> None:
    """Write down what became of a transaction. The others of its nonce can never be mined any more once it was."""
    if state in (MINED, FAILED):
        same_nonce = (_outbox.c.nonce == transaction.nonce) & (_outbox.c.state != DROPPED)
        connection.execute(update(_outbox).where(same_nonce).values(state=DROPPED))
    done = connection.execute(update(_outbox).where(_outbox.c.id == transaction.id).values(state=state, block=block, gas_used=gas_used))
    if done.rowcount != 1:
        raise JournalError(f"transaction {transaction.label} is not in the journal")


def drop(connection: Connection, transactions: Sequence[Outgoing]) -> None:
    """The node never took these: their nonces are free again."""
    for transaction in transactions:
        settle(connection, transaction, DROPPED)


def in_state(connection: Connection, *states: str) -> list[Outgoing]:
    """All in these states, by nonce and age."""
    rows = connection.execute(select(_outbox).where(_outbox.c.state.in_(states)).order_by(_outbox.c.nonce, _outbox.c.id))
    return [_row(row) for row in rows]


def at_nonce(connection: Connection, nonce: int) -> list[Outgoing]:
    """The transaction at a nonce and its replacements, oldest first; none that the node refused."""
    alive = (_outbox.c.nonce == nonce) & (_outbox.c.state != DROPPED)
    return [_row(row) for row in connection.execute(select(_outbox).where(alive).order_by(_outbox.c.id))]


def ever_at_nonce(connection: Connection, nonce: int) -> list[Outgoing]:
    """Everything that was ever signed for a nonce, newest first, refused ones last: any of these bytes may turn up in a block."""
    rows = connection.execute(select(_outbox).where(_outbox.c.nonce == nonce).order_by(_outbox.c.state == DROPPED, _outbox.c.id.desc()))
    return [_row(row) for row in rows]


def labelled(connection: Connection, label: str) -> Outgoing | None:
    """The newest with this label that was not refused and did not revert."""
    wanted = (_outbox.c.label == label) & _outbox.c.state.in_((PENDING, MINED))
    row = connection.execute(select(_outbox).where(wanted).order_by(_outbox.c.id.desc()).limit(1)).one_or_none()
    return None if row is None else _row(row)


def next_nonce(connection: Connection) -> int:
    """One above the highest nonce that was given to the chain; 0 for a new journal."""
    highest = connection.execute(select(func.max(_outbox.c.nonce)).where(_outbox.c.state != DROPPED)).scalar_one_or_none()
    return 0 if highest is None else int(highest) + 1


def _row(row: object) -> Outgoing:
    return Outgoing(**{name: getattr(row, name) for name in Outgoing.__slots__})

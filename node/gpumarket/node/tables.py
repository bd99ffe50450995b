"""The provider's journal: attempts with their evidence, vouchers, and a few facts that must survive a restart.

Invariant: a row of `attempts` is there before `Started` leaves, its ack before the next window, its receipt before `Finished` (I2).
Requests and outputs are never written: only hashes of them are in the lease, the receipt and the ack (I9); of evidence that this provider
judges on a panel only its number is, written once, before anything is committed to on chain.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, LargeBinary, MetaData, String, Table, UniqueConstraint

from gpumarket.settlement.chain import sender_tables
from gpumarket.settlement.journal import MoneyType
from gpumarket.settlement.redeemer import redemption_table

metadata = MetaData()

OPEN = "open"
"""Running, or ended by a crash: recovery turns it into DUE."""
DUE = "due"
"""Ended; the scheduler has not answered a claim yet."""
HELD = "held"
"""Claimed; the client may still report."""
OWED = "owed"
"""Claimed, and covered by the channel's newest voucher."""
REJECTED = "rejected"
CLOSED = "closed"
"""Claimed; nothing was earned."""
SHORT = "short"
"""Claimed; owed or closed at less than the client's own ack proves. The difference counts against the scheduler's credit for good."""
SETTLED = (OWED, REJECTED, CLOSED, SHORT)

attempts = Table(
    "attempts",
    metadata,
    Column("lease", LargeBinary(32), primary_key=True),
    Column("job", LargeBinary(32), nullable=False),
    Column("attempt", BigInteger, nullable=False),
    Column("scheduler", LargeBinary(20), nullable=False),
    Column("channel", LargeBinary(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("prompt_units", BigInteger, nullable=False),
    Column("nonce", LargeBinary(32), nullable=False),
    Column("request_hash", LargeBinary(32), nullable=False),
    Column("signed_lease", LargeBinary, nullable=False),
    Column("signed_order", LargeBinary, nullable=False),
    Column("signed_ack", LargeBinary),
    Column("signed_receipt", LargeBinary),
    Column("amount", MoneyType()),
    Column("reason", String(500), nullable=False, default=""),
    Column("opened_at", BigInteger, nullable=False),
    UniqueConstraint("job", "attempt", name="attempts_once"),
    Index("attempts_by_state", "state"),
)

vouchers = Table(
    "vouchers",
    metadata,
    Column("channel", LargeBinary(32), primary_key=True),
    Column("scheduler", LargeBinary(20), nullable=False),
    Column("cumulative", MoneyType(), nullable=False),
    Column("signature", LargeBinary(65), nullable=False),
    Column("owed", MoneyType(), nullable=False),
)

panel_numbers = Table(
    "panel_numbers",
    metadata,
    Column("dispute", LargeBinary(32), primary_key=True),
    Column("number", LargeBinary(8), nullable=False),
    Column("salt", LargeBinary(32), nullable=False),
    Column("written_at", BigInteger, nullable=False),
)

sealing_keys = Table(
    "sealing_keys",
    metadata,
    Column("public", LargeBinary(32), primary_key=True),
    Column("secret", LargeBinary(32), nullable=False),
)

facts = Table(
    "facts",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

OFFER_SEQUENCE = "offer_sequence"
LISTEN_PORT = "listen_port"

sender_tables(metadata)
redemption_table(metadata)
SCHEMA_VERSION = 1
metadata.info["version"] = SCHEMA_VERSION

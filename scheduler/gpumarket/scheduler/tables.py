"""Tables of the scheduler's ledger: money and reputation. Portable SQL; amounts are fixed-width text (MoneyType), hashes are bytes.

`metadata` and migrations/ describe the same schema; a test compares them.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, LargeBinary, MetaData, String, Table

from gpumarket.settlement.chain.outbox import sender_tables
from gpumarket.settlement.guard import guard_table
from gpumarket.settlement.journal import MoneyType
from gpumarket.settlement.redeemer import redemption_table

metadata = MetaData()
FOREVER = 2**62

jobs = Table(
    "jobs",
    metadata,
    Column("key", LargeBinary(32), primary_key=True),
    Column("client", LargeBinary(20), nullable=False),
    Column("channel", LargeBinary(32), nullable=False),
    Column("job_order", LargeBinary, nullable=False),
    Column("state", Integer, nullable=False),
    Column("open", MoneyType(), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("live_until", BigInteger, nullable=False),
    Index("jobs_live_until", "live_until"),
)
"""`live_until`: the deadline of a job in which nothing can change by itself any more, `FOREVER` before; a restart reads what is ahead."""

attempts = Table(
    "attempts",
    metadata,
    Column("lease", LargeBinary(32), primary_key=True),
    Column("job", LargeBinary(32), nullable=False),
    Column("number", Integer, nullable=False),
    Column("provider", LargeBinary(20), nullable=False),
    Column("signed_lease", LargeBinary, nullable=False),
    Column("offer", LargeBinary(32), nullable=False),
    Column("state", Integer, nullable=False),
    Column("amount", MoneyType(), nullable=False),
    Column("units", BigInteger, nullable=False),
    Column("complete", Boolean, nullable=False),
    Column("accepted", Boolean, nullable=False),
    Column("hold_until", BigInteger, nullable=False),
    Column("receipt", LargeBinary, nullable=False),
    Column("ack", LargeBinary, nullable=False),
    Column("outcome", Integer, nullable=False),
    Column("reason", String(200), nullable=False),
    Index("attempts_job", "job", "number", unique=True),
)

offers = Table(
    "offers",
    metadata,
    Column("hash", LargeBinary(32), primary_key=True),
    Column("signed_offer", LargeBinary, nullable=False),
)

client_channels = Table(
    "client_channels",
    metadata,
    Column("id", LargeBinary(32), primary_key=True),
    Column("payer", LargeBinary(20), nullable=False),
    Column("signer", LargeBinary(20), nullable=False),
    Column("deposit", MoneyType(), nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("voucher", MoneyType(), nullable=False),
    Column("signature", LargeBinary, nullable=False),
    Column("used", MoneyType(), nullable=False),
    Column("held", MoneyType(), nullable=False),
    Column("open", MoneyType(), nullable=False),
    Column("redeemed", MoneyType(), nullable=False),
    Column("closing", BigInteger, nullable=False),
    Column("closed", Boolean, nullable=False),
    Column("close_signed", Boolean, nullable=False),
    Column("ladder", LargeBinary, nullable=False),
)

spokes = Table(
    "spokes",
    metadata,
    Column("id", LargeBinary(32), primary_key=True),
    Column("provider", LargeBinary(20), nullable=False),
    Column("deposit", MoneyType(), nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("vouchered", MoneyType(), nullable=False),
    Column("reserved", MoneyType(), nullable=False),
    Column("redeemed", MoneyType(), nullable=False),
    Column("closing", BigInteger, nullable=False),
    Column("closed", Boolean, nullable=False),
    Index("spokes_provider", "provider"),
)

reputations = Table(
    "reputations",
    metadata,
    Column("provider", LargeBinary(20), primary_key=True),
    Column("kept", Float, nullable=False),
    Column("broken", Float, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("jailed_until", BigInteger, nullable=False),
    Column("rejections", Integer, nullable=False),
)

guard = guard_table(metadata)
transactions = sender_tables(metadata)
redemptions = redemption_table(metadata)

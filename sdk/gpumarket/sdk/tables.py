"""The client's journal as SQL tables: jobs, their attempts and output, and channels with their voucher guard.

Prompts and outputs lie here (a job could not be resumed without them), in a folder that only its owner reads; they are erased some
days after the job ended. Amounts are exact (`MoneyType`); nothing here is SQLite's alone.
"""

from __future__ import annotations

from sqlalchemy import Boolean, Column, Index, Integer, LargeBinary, MetaData, String, Table, Text

from gpumarket.settlement.chain.outbox import sender_tables
from gpumarket.settlement.guard import guard_table
from gpumarket.settlement.journal import MoneyType

METADATA = MetaData()

GUARD = guard_table(METADATA)
TRANSACTIONS = sender_tables(METADATA)

CHANNELS = Table(
    "client_channels",
    METADATA,
    Column("id", LargeBinary(32), primary_key=True),
    Column("scheduler", LargeBinary(20), nullable=False),
    Column("voucher", MoneyType, nullable=False),  # newest cumulative signed
    Column("billed", MoneyType, nullable=False),  # sum of what ended jobs cost by our own acks
    Column("closing", Boolean, nullable=False),  # no order goes on it any more
    Column("opened_at", Integer, nullable=False),
)

INTENTS = Table(
    "client_channel_intents",
    METADATA,
    Column("scheduler", LargeBinary(20), primary_key=True),
    Column("label", Text, nullable=False),  # names the transaction: sent again, it opens no second channel
    Column("amount", MoneyType, nullable=False),
    Column("expires_at", Integer, nullable=False),
)

SPENDING = Table(
    "client_spending",
    METADATA,
    Column("at", Integer, primary_key=True, autoincrement=False),  # unix seconds, the beginning of its minute; never falling
    Column("amount", MoneyType, nullable=False),  # what vouchers signed then added
)

SPEND_LIMIT = Table(
    "client_spend_limit",
    METADATA,
    Column("id", Integer, primary_key=True),  # 1: there is one row or none
    Column("amount", MoneyType, nullable=False),
)

JOBS = Table(
    "client_jobs",
    METADATA,
    Column("job", LargeBinary(32), primary_key=True),  # job key
    Column("alias", Text, nullable=False),
    Column("purpose", String(8), nullable=False),  # user, rerun, check
    Column("parent", LargeBinary(32)),  # the job that this one checks or repeats
    Column("state", String(10), nullable=False),  # ordered, leased, delivered, done, rejected, cancelled, failed
    Column("task", Integer, nullable=False),
    Column("channel", LargeBinary(32), nullable=False),
    Column("order", LargeBinary, nullable=False),  # serialized JobOrder
    Column("request", LargeBinary, nullable=False),
    Column("salt", LargeBinary(32), nullable=False),
    Column("options", Text, nullable=False),  # JSON: what the caller asked for beyond the wire
    Column("attempt", Integer, nullable=False),
    Column("max_amount", MoneyType, nullable=False),
    Column("billed", MoneyType, nullable=False),  # once ended
    Column("will_check", Boolean, nullable=False),
    Column("verdict", String(10), nullable=False),
    Column("verdict_json", Text, nullable=False),
    Column("report", LargeBinary),  # serialized ReportRequest that the scheduler does not have yet
    Column("finish_reason", String(16), nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("deadline", Integer, nullable=False),
    Column("ended_at", Integer, nullable=False),  # 0 while it runs
)
Index("client_jobs_state", JOBS.c.state)
Index("client_jobs_parent", JOBS.c.parent)

JOB_IDS = Table(
    "client_job_ids",
    METADATA,
    Column("job_id", LargeBinary(32), primary_key=True),  # made by the caller
    Column("job", LargeBinary(32), nullable=False),  # job key
    Column("fingerprint", LargeBinary(32), nullable=False),  # of what was asked under it
)

ATTEMPTS = Table(
    "client_attempts",
    METADATA,
    Column("job", LargeBinary(32), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("provider", LargeBinary(20), nullable=False),
    Column("lease", LargeBinary, nullable=False),  # serialized SignedLease
    Column("offer", LargeBinary, nullable=False),  # serialized SignedOffer
    Column("nonce", LargeBinary(32)),
    Column("ack", LargeBinary),  # newest SignedAck
    Column("receipt", LargeBinary),  # serialized SignedReceipt
    Column("reason", String(16), nullable=False),  # empty while it runs
    Column("detail", Text, nullable=False),
    Column("units", Integer, nullable=False),
    Column("amount", MoneyType, nullable=False),
)

OUTPUTS = Table(
    "client_outputs",
    METADATA,
    Column("job", LargeBinary(32), primary_key=True),
    Column("first", Integer, primary_key=True),  # absolute index of the first item
    Column("count", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),  # the items, all of one size
)

DISPUTES = Table(
    "client_disputes",
    METADATA,
    Column("job", LargeBinary(32), primary_key=True),
    Column("dispute", LargeBinary(32), nullable=False, unique=True),
    Column("nonce", LargeBinary(32), nullable=False),  # secret until the panel is drawn
    Column("evidence", LargeBinary, nullable=False),  # serialized Opening, the very bytes; erased at the end
    Column("outcome", String(16), nullable=False),  # empty while it runs
    Column("opened_at", Integer, nullable=False),
)

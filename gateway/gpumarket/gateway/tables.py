"""The gateway's ledger as SQL tables: what each key has spent, what is reserved for jobs under way, which answers are kept for whom.

No prompt and no output lies here: an answer is read back from the client's own journal, by its job.
"""

from __future__ import annotations

from sqlalchemy import Column, Index, Integer, LargeBinary, MetaData, String, Table

from gpumarket.settlement.journal import MoneyType

FILE = "ledger.db"
METADATA = MetaData()

ACCOUNTS = Table(
    "gateway_accounts",
    METADATA,
    Column("key", String(16), primary_key=True),
    Column("day", Integer, nullable=False),  # days since 1970-01-01 UTC that `day_spent` is of
    Column("day_spent", MoneyType, nullable=False),
    Column("total_spent", MoneyType, nullable=False),
)

RESERVATIONS = Table(
    "gateway_reservations",
    METADATA,
    Column("job", LargeBinary(32), primary_key=True),
    Column("key", String(16), nullable=False),
    Column("day", Integer, nullable=False),
    Column("amount", MoneyType, nullable=False),
)

ANSWERS = Table(
    "gateway_answers",
    METADATA,
    Column("key", String(16), primary_key=True),
    Column("name", LargeBinary(32), primary_key=True),  # SHA-256 of the Idempotency-Key
    Column("request", LargeBinary(32), nullable=False),  # SHA-256 of path and body
    Column("seed", LargeBinary(32), nullable=False),  # the jobs' ids follow from it
    Column("created_at", Integer, nullable=False),
)
Index("gateway_answers_created", ANSWERS.c.created_at)

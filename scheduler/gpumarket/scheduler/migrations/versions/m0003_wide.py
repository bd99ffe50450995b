"""Blocks, nonces, gas and times in 64 bits: SQLite's integers have them anyhow, PostgreSQL's have 32 where nobody asks for more."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_COUNTS = {"chain_transactions": ("nonce", "gas", "block", "gas_used"), "redemptions": ("gas", "at")}


def upgrade() -> None:
    """The same numbers, wider."""
    for name, columns in _COUNTS.items():
        with op.batch_alter_table(name) as table:
            for column in columns:
                table.alter_column(column, existing_type=sa.Integer(), type_=sa.BigInteger())

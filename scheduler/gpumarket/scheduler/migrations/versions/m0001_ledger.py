"""The ledger as it began: orders, attempts, channels, reputation, and the settlement tables beside them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from gpumarket.settlement.journal import MoneyType

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table."""
    op.create_table(
        "attempts",
        sa.Column("lease", sa.LargeBinary(32), primary_key=True),
        sa.Column("job", sa.LargeBinary(32), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("provider", sa.LargeBinary(20), nullable=False),
        sa.Column("signed_lease", sa.LargeBinary(), nullable=False),
        sa.Column("offer", sa.LargeBinary(32), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("amount", MoneyType(), nullable=False),
        sa.Column("units", sa.BigInteger(), nullable=False),
        sa.Column("complete", sa.Boolean(), nullable=False),
        sa.Column("accepted", sa.Boolean(), nullable=False),
        sa.Column("hold_until", sa.BigInteger(), nullable=False),
        sa.Column("receipt", sa.LargeBinary(), nullable=False),
        sa.Column("ack", sa.LargeBinary(), nullable=False),
        sa.Column("outcome", sa.Integer(), nullable=False),
        sa.Column("reason", sa.String(200), nullable=False),
    )
    op.create_index("attempts_job", "attempts", ["job", "number"], unique=True)
    op.create_table(
        "chain_transactions",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("nonce", sa.Integer(), nullable=False),
        sa.Column("label", sa.String(200), nullable=False),
        sa.Column("tx_hash", sa.LargeBinary(32), nullable=False, unique=True),
        sa.Column("raw", sa.LargeBinary(), nullable=False),
        sa.Column("recipient", sa.LargeBinary(20), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.Column("gas", sa.Integer(), nullable=False),
        sa.Column("max_fee", MoneyType(), nullable=False),
        sa.Column("priority_fee", MoneyType(), nullable=False),
        sa.Column("state", sa.String(8), nullable=False),
        sa.Column("block", sa.Integer(), nullable=False),
        sa.Column("gas_used", sa.Integer(), nullable=False),
    )
    op.create_index("ix_chain_transactions_label", "chain_transactions", ["label"])
    op.create_index("ix_chain_transactions_nonce", "chain_transactions", ["nonce"])
    op.create_index("ix_chain_transactions_state", "chain_transactions", ["state"])
    op.create_table(
        "client_channels",
        sa.Column("id", sa.LargeBinary(32), primary_key=True),
        sa.Column("payer", sa.LargeBinary(20), nullable=False),
        sa.Column("signer", sa.LargeBinary(20), nullable=False),
        sa.Column("deposit", MoneyType(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("voucher", MoneyType(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("used", MoneyType(), nullable=False),
        sa.Column("held", MoneyType(), nullable=False),
        sa.Column("open", MoneyType(), nullable=False),
        sa.Column("redeemed", MoneyType(), nullable=False),
        sa.Column("closing", sa.BigInteger(), nullable=False),
        sa.Column("closed", sa.Boolean(), nullable=False),
        sa.Column("close_signed", sa.Boolean(), nullable=False),
    )
    op.create_table(
        "jobs",
        sa.Column("key", sa.LargeBinary(32), primary_key=True),
        sa.Column("client", sa.LargeBinary(20), nullable=False),
        sa.Column("channel", sa.LargeBinary(32), nullable=False),
        sa.Column("job_order", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("open", MoneyType(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("live_until", sa.BigInteger(), nullable=False),
    )
    op.create_index("jobs_live_until", "jobs", ["live_until"])
    op.create_table(
        "offers",
        sa.Column("hash", sa.LargeBinary(32), primary_key=True),
        sa.Column("signed_offer", sa.LargeBinary(), nullable=False),
    )
    op.create_table(
        "redemptions",
        sa.Column("channel", sa.LargeBinary(32), primary_key=True),
        sa.Column("cumulative", MoneyType(), primary_key=True),
        sa.Column("payer", sa.LargeBinary(20), nullable=False),
        sa.Column("payee", sa.LargeBinary(20), nullable=False),
        sa.Column("amount", MoneyType(), nullable=True),
        sa.Column("tx", sa.LargeBinary(32), nullable=True),
        sa.Column("gas", sa.Integer(), nullable=True),
        sa.Column("at", sa.Integer(), nullable=False),
    )
    op.create_table(
        "reputations",
        sa.Column("provider", sa.LargeBinary(20), primary_key=True),
        sa.Column("kept", sa.Float(), nullable=False),
        sa.Column("broken", sa.Float(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("jailed_until", sa.BigInteger(), nullable=False),
        sa.Column("rejections", sa.Integer(), nullable=False),
    )
    op.create_table(
        "spokes",
        sa.Column("id", sa.LargeBinary(32), primary_key=True),
        sa.Column("provider", sa.LargeBinary(20), nullable=False),
        sa.Column("deposit", MoneyType(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("vouchered", MoneyType(), nullable=False),
        sa.Column("reserved", MoneyType(), nullable=False),
        sa.Column("redeemed", MoneyType(), nullable=False),
        sa.Column("closing", sa.BigInteger(), nullable=False),
        sa.Column("closed", sa.Boolean(), nullable=False),
    )
    op.create_index("spokes_provider", "spokes", ["provider"])
    op.create_table(
        "voucher_guard",
        sa.Column("channel", sa.LargeBinary(32), primary_key=True),
        sa.Column("cumulative", MoneyType(), nullable=False),
    )


def downgrade() -> None:
    """Drop them; for tests of the migrations only, it forgets money."""
    op.drop_table("voucher_guard")
    op.drop_table("spokes")
    op.drop_table("reputations")
    op.drop_table("redemptions")
    op.drop_table("offers")
    op.drop_table("jobs")
    op.drop_table("client_channels")
    op.drop_table("chain_transactions")
    op.drop_table("attempts")

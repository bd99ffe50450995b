"""Older vouchers of a client's channel, kept beside the newest: which of them is redeemed depends on what was earned."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Channels of before know only their newest voucher."""
    with op.batch_alter_table("client_channels") as table:
        table.add_column(sa.Column("ladder", sa.LargeBinary(), nullable=True))
    channels = sa.table("client_channels", sa.column("ladder", sa.LargeBinary()))
    op.execute(channels.update().values(ladder=b""))
    with op.batch_alter_table("client_channels") as table:
        table.alter_column("ladder", existing_type=sa.LargeBinary(), nullable=False)

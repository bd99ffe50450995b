"""Alembic's environment: one connection, the scheduler's metadata, one transaction for all steps."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine, pool

from gpumarket.scheduler.tables import metadata

engine = create_engine(context.config.get_main_option("sqlalchemy.url") or "", poolclass=pool.NullPool)
with engine.begin() as connection:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True, transaction_per_migration=False)
    with context.begin_transaction():
        context.run_migrations()

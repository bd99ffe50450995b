"""Alembic's environment: one connection, the scheduler's metadata, one transaction for all steps: a process that is killed in the middle
leaves the database as it was.

SQLite's driver opens no transaction before a CREATE, so BEGIN is said here; without it half of a migration would stay.
"""

from __future__ import annotations

from typing import Any

from alembic import context
from sqlalchemy import Connection, create_engine, event, pool
from sqlalchemy.engine import make_url

from gpumarket.scheduler.tables import metadata
from gpumarket.settlement import postgres
from gpumarket.settlement.database import claim

url = make_url(context.config.get_main_option("sqlalchemy.url") or "")
if url.get_backend_name() == "postgresql":
    engine = postgres.engine_of(url, read_only=False)
else:
    engine = create_engine(url, poolclass=pool.NullPool)

    @event.listens_for(engine, "connect")
    def say_begin_ourselves(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA wal_autocheckpoint=0")  # into the file only once its seal knows

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


try:
    with engine.connect() as connection:
        claim(connection)  # nobody migrates a database that another process works on
        with connection.begin():
            context.configure(connection=connection, target_metadata=metadata, render_as_batch=True, transaction_per_migration=False)
            with context.begin_transaction():
                context.run_migrations()
finally:
    engine.dispose()

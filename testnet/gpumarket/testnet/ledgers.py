"""The books of a market's roles, read from outside: what each has written down, in values. Never writes.

All tables of one database are read in one transaction, so its rows fit each other, whether its role runs or not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, create_engine, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from gpumarket.core.errors import ConfigError, JournalError
from gpumarket.node import tables as node_tables
from gpumarket.scheduler import tables as scheduler_tables
from gpumarket.sdk import tables as client_tables
from gpumarket.settlement.database import shown

Rows = tuple[Any, ...]
LEDGER, JOURNAL = "ledger.db", "journal.db"


@dataclass(frozen=True, slots=True)
class SchedulerBooks:
    """Rows of the scheduler's ledger."""

    jobs: Rows
    attempts: Rows
    client_channels: Rows
    spokes: Rows
    guard: Rows
    reputations: Rows


@dataclass(frozen=True, slots=True)
class ProviderBooks:
    """Rows of a provider's journal."""

    attempts: Rows
    vouchers: Rows


@dataclass(frozen=True, slots=True)
class ClientBooks:
    """Rows of the client's journal."""

    jobs: Rows
    attempts: Rows
    channels: Rows
    guard: Rows


def scheduler_books(state: Path, database: str = "") -> SchedulerBooks:
    """`database` is the scheduler's setting: empty is the file in its state folder. Raises JournalError where there is no ledger."""
    return scheduler_books_at(database or _sqlite_url(state / LEDGER))


def scheduler_books_at(url: str) -> SchedulerBooks:
    """Of the ledger at a SQLAlchemy URL. Raises JournalError where it cannot be read, ConfigError for what is no URL."""
    t = scheduler_tables
    return SchedulerBooks(*_read(url, t.jobs, t.attempts, t.client_channels, t.spokes, t.guard, t.reputations))


def provider_books(state: Path) -> ProviderBooks:
    """Raises JournalError where there is no journal."""
    return ProviderBooks(*_read(_sqlite_url(state / JOURNAL), node_tables.attempts, node_tables.vouchers))


def client_books(state: Path) -> ClientBooks:
    """Raises JournalError where there is no journal."""
    t = client_tables
    return ClientBooks(*_read(_sqlite_url(state / JOURNAL), t.JOBS, t.ATTEMPTS, t.CHANNELS, t.GUARD))


def attempts_at(state: Path, provider: bytes) -> dict[tuple[bytes, int], str]:
    """(job, attempt) → how it ended, empty while it runs, of a client's attempts at one provider. Raises JournalError."""
    table = client_tables.ATTEMPTS
    query = select(table.c.job, table.c.number, table.c.reason).where(table.c.provider == provider)
    with _reading(_sqlite_url(state / JOURNAL)) as connection:
        return {(bytes(row.job), int(row.number)): str(row.reason) for row in connection.execute(query)}


def _sqlite_url(file: Path) -> str:
    return f"sqlite:///{file.absolute()}"


def _read(url: str, *tables: Table) -> list[Rows]:
    try:
        with _reading(url) as connection:
            return [tuple(connection.execute(select(table)).all()) for table in tables]
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise JournalError(
            f"the books at {shown(url)} cannot be read: {cause}", hint="is it this role's database, and may you read it?"
        ) from error


def _opened_as(file: Path) -> str:
    """SQLite reads a database with a log through files beside it, which it cannot make in a folder that is mounted read-only. Without a log
    nobody has the database open, and all of it is in the one file."""
    resting = not file.with_name(f"{file.name}-wal").exists() and not os.access(file.parent, os.W_OK)
    return "immutable=1" if resting else "mode=ro"


@contextmanager
def _reading(url: str) -> Iterator[Connection]:
    try:
        where = make_url(url)
    except SQLAlchemyError as error:
        raise ConfigError(f"{shown(url)} is no database URL", hint="write it like sqlite:////path/ledger.db") from error
    sqlite = where.get_backend_name() == "sqlite"
    if sqlite:
        file = Path(where.database or "")
        if not file.is_file():
            raise JournalError(f"there is no journal at {file}", hint="gpumarket testnet status")
        engine = create_engine(f"sqlite:///file:{file}?{_opened_as(file)}&uri=true")
    else:
        engine = create_engine(where, isolation_level="REPEATABLE READ")
    try:
        with engine.connect() as connection:
            if sqlite:
                connection.exec_driver_sql("BEGIN")  # the driver opens no transaction for a SELECT: each would see another moment
            yield connection
    finally:
        engine.dispose()

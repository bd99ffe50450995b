"""The books of a testnet's roles, read from outside while they run: what each has written down, in values. Never writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, create_engine, select

from gpumarket.core.errors import JournalError
from gpumarket.node import tables as node_tables
from gpumarket.scheduler import tables as scheduler_tables
from gpumarket.sdk import tables as client_tables

Rows = tuple[Any, ...]


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


def scheduler_books(state: Path) -> SchedulerBooks:
    """Raises JournalError where there is no ledger."""
    t = scheduler_tables
    with _reading(state / "ledger.db") as connection:
        return SchedulerBooks(*(_rows(connection, x) for x in (t.jobs, t.attempts, t.client_channels, t.spokes, t.guard, t.reputations)))


def provider_books(state: Path) -> ProviderBooks:
    """Raises JournalError where there is no journal."""
    with _reading(state / "journal.db") as connection:
        return ProviderBooks(_rows(connection, node_tables.attempts), _rows(connection, node_tables.vouchers))


def client_books(state: Path) -> ClientBooks:
    """Raises JournalError where there is no journal."""
    t = client_tables
    with _reading(state / "journal.db") as connection:
        return ClientBooks(*(_rows(connection, x) for x in (t.JOBS, t.ATTEMPTS, t.CHANNELS, t.GUARD)))


@contextmanager
def _reading(file: Path) -> Iterator[Connection]:
    if not file.is_file():
        raise JournalError(f"there is no journal at {file}", hint="gpumarket testnet status")
    engine = create_engine(f"sqlite:///file:{file}?mode=ro&uri=true")
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _rows(connection: Connection, table: Table) -> Rows:
    return tuple(connection.execute(select(table)).all())

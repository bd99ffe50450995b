"""A journal's database: how its connections are set up, and what must hold before one is used."""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, Column, Connection, Engine, Integer, MetaData, Table, create_engine, event, insert, inspect, select, update
from sqlalchemy.engine import make_url

from gpumarket.core.errors import ConfigError, JournalError
from gpumarket.settlement import postgres
from gpumarket.settlement.prepared import run_raw

PRAGMAS: tuple[str, ...] = (
    "busy_timeout=5000",
    "journal_mode=WAL",
    "synchronous=FULL",
    "foreign_keys=ON",
    "wal_autocheckpoint=0",
    "temp_store=MEMORY",
)
"""Of every SQLite connection. FULL: a commit is on the disk before it is acknowledged. Checkpoints are ours to make: the seal follows.
What a savepoint may have to undo stays in memory: the default is a file in /var/tmp."""
_own = MetaData()
_version = Table("journal_version", _own, Column("id", Integer, primary_key=True), Column("version", Integer, nullable=False))


def engine_of(url: str, *, read_only: bool) -> Engine:
    """An engine whose connections and transactions are a journal's. Raises JournalError for a database in memory, ConfigError for one that
    journals are not kept in."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        return postgres.engine_of(parsed, read_only=read_only)
    if parsed.get_backend_name() != "sqlite":
        raise ConfigError(f"{parsed.drivername} is no database of a journal", hint=f"SQLite is, and PostgreSQL: {postgres.DRIVER}://...")
    if parsed.database in (None, "", ":memory:"):
        raise JournalError("a journal in memory would survive nothing", hint="give a file: sqlite:////path/journal.db")
    engine = create_engine(parsed)

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves: the driver would not open a transaction before SAVEPOINT
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        if read_only:
            connection.execute("PRAGMA query_only=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        run_raw(connection, "BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def claim(connection: Connection) -> None:
    """Before anything is read or changed: raises StateLocked while another process works on the database. A SQLite file lies in a state
    folder, which is locked."""
    if connection.dialect.name == "postgresql":
        postgres.claim(connection)


def quick_check(connection: Connection) -> None:
    """Raises JournalError for a SQLite file that is damaged, or that cannot be written as journals are; for a server that loses commits."""
    if connection.dialect.name == "postgresql":
        postgres.require_durable(connection)
        return
    journal = connection.engine.url.database
    found = connection.exec_driver_sql("PRAGMA quick_check").scalar_one()
    if found != "ok":
        raise JournalError(f"the journal {journal} is damaged: {found}", hint="stop, copy the files away, restore the newest backup")
    if connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() != "wal":
        raise JournalError(
            f"the journal {journal} cannot be put into SQLite's WAL mode: its file system does not allow that, or its disk fails",
            hint="put the state folder on a local disk that works",
        )


def check_version(connection: Connection, metadata: MetaData) -> None:
    """Make what is missing in a new journal. Raises JournalError for one that another version of the program wrote."""
    wanted = int(metadata.info.get("version", 1))
    _own.create_all(connection)
    found = connection.execute(select(_version.c.version)).scalar_one_or_none()
    # Each opening commits something: the log is never empty in use. Changed and changed back: SQLite writes no page that stays as it is.
    for step in (1, -1):
        connection.execute(update(_version).values(version=_version.c.version + step))
    if found is None:
        connection.execute(insert(_version), {"id": 1, "version": wanted})
    elif found != wanted:
        raise JournalError(
            f"the journal has version {found}, this program wants {wanted}",
            hint="run the program version that wrote it, or its migration",
        )
    metadata.create_all(connection)
    inspector = inspect(connection)
    for table in metadata.sorted_tables:
        missing = set(table.columns.keys()) - {column["name"] for column in inspector.get_columns(table.name)}
        if missing:
            raise JournalError(
                f"the journal's table {table.name} has no column {', '.join(sorted(missing))}: another version wrote it",
                hint="run the program version that wrote it, or its migration",
            )


def shown(url: str) -> str:
    """The URL for people and logs: no user, no password, no parameters, among which one may stand."""
    parsed = make_url(url)
    return URL.create(parsed.drivername, host=parsed.host, port=parsed.port, database=parsed.database).render_as_string()

"""PostgreSQL under a journal: durable sessions, and one process at a time on one database.

The session that writes holds an advisory lock from its first statement to its end, and a journal has no other session that writes: who has
lost the lock has lost the only connection by which it could commit, so two processes never sign from one database (I3).
Must never: open a second writing session for the first one's place, believe a server that answers before it has synced.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import OperationalError

from gpumarket.core.errors import ConfigError, JournalError, StateLocked

DRIVER = "postgresql+psycopg"
LOCK = int.from_bytes(b"gpumarke", "big")
"""Key of the advisory lock. Such locks are a database's own: a scheduler has a database, not a server, to itself."""
LOCK_WAIT_SECONDS = 5.0
"""For the lock, as for any row: the server may not have noticed yet that the process before this one is gone."""
_NETWORK = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "application_name": "gpumarket",
}
"""libpq's: a server that is gone without a word is given up after half a minute. A URL's own settings win."""
_SESSION = """
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') NOT IN ('on', 'remote_apply');
SET lock_timeout = '{wait}ms';
SET tcp_keepalives_idle = 10;
SET tcp_keepalives_interval = 5;
SET tcp_keepalives_count = 3
"""
"""The same from the server's side: a process whose machine is gone loses its lock after half a minute."""
_LOCK_NOT_AVAILABLE = "55P03"


def engine_of(url: URL, *, read_only: bool) -> Engine:
    """An engine whose sessions are a journal's. Raises ConfigError for another driver, and for a URL that holds a password."""
    if url.drivername != DRIVER:
        raise ConfigError(f"{url.drivername} is no driver of a ledger", hint=f"write {DRIVER}://user@host/database")
    if url.password is not None or "password" in url.query:
        raise ConfigError(
            "the database's URL holds a password, and settings are no place for one",
            hint="write host:port:database:user:password into a file that only you may read, and name it in PGPASSFILE",
        )
    given = {name: value for name, value in _NETWORK.items() if name not in url.query}
    level = "REPEATABLE READ" if read_only else "READ COMMITTED"  # a reader's statements see one state; a writer is alone
    engine = create_engine(url, connect_args=given, isolation_level=level)

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: Any) -> None:
        connection.autocommit = True
        connection.execute(_SESSION.format(wait=int(LOCK_WAIT_SECONDS * 1_000)))
        if read_only:
            connection.execute("SET default_transaction_read_only = on")
        connection.autocommit = False

    return engine


def claim(connection: Connection) -> None:
    """Take the database for this session, until it ends. Raises StateLocked while another process holds it."""
    try:
        connection.exec_driver_sql(f"SELECT pg_advisory_lock({LOCK})")
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
            raise
        raise StateLocked(
            f"another process works on the database {connection.engine.url.database}",
            hint="stop it first; two schedulers have a key and a database each",
        ) from error
    connection.commit()


def require_durable(connection: Connection) -> None:
    """Raises JournalError for a server, or a session, whose commit may be lost with the power."""
    for name, wanted in (("fsync", ("on",)), ("full_page_writes", ("on",)), ("synchronous_commit", ("on", "remote_apply"))):
        found = connection.exec_driver_sql(f"SHOW {name}").scalar_one()
        if found not in wanted:
            raise JournalError(
                f"the database server runs with {name}={found}: what it commits may be lost with the power",
                hint=f"set {name} = on in postgresql.conf and restart the server",
            )

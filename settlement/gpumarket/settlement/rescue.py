"""What can still be read of a journal, damaged or not: channels and the newest vouchers, so that money can be redeemed by hand.

Works on a copy in a private temporary folder: the original, its log and its seal are not touched. Whatever cannot be read is told.
Never: a repair, a guess, a row that SQLite did not give.
"""

from __future__ import annotations

import fcntl
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpumarket.core.errors import ConfigError, JournalError
from gpumarket.settlement.seal import Seal

_QUERIES = {
    "vouchers": "SELECT channel, scheduler AS payer, cumulative, signature, owed FROM vouchers",
    "client_channels": "SELECT * FROM client_channels",
    "spokes": "SELECT id AS channel, provider, deposit, vouchered, reserved, redeemed, closed FROM spokes",
    "voucher_guard": "SELECT channel, cumulative AS signed_at_most FROM voucher_guard",
}
"""Table → what of it is money. A signature beside a cumulative amount is a voucher that its holder may redeem."""
_MONEY = frozenset({"cumulative", "owed", "voucher", "vouchered", "used", "held", "open", "deposit", "reserved", "redeemed", "billed"})


@dataclass
class Rescued:
    """One database of a state folder. `flaw` is why a daemon would refuse it, empty when it would not; amounts are base units."""

    file: str
    flaw: str
    in_use: bool
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


def rescue(state: Path) -> list[Rescued]:
    """Every journal in a state folder. Raises ConfigError where there is none."""
    found = [_rescued(file) for file in databases(state)]
    if not found:
        raise ConfigError(f"there is no journal in {state}", hint="name the state folder of a provider, scheduler or client")
    return found


def databases(state: Path) -> list[Path]:
    """Files of the journals in a state folder, also of one whose file is gone while its seal is there."""
    names = {file.name.removesuffix(".seal") for file in state.glob("*.db.seal")} | {file.name for file in state.glob("*.db")}
    return [state / name for name in sorted(names)]


def flaw_of(database: Path) -> str:
    """Why a journal would be refused, empty when it would not. Changes nothing."""
    try:
        Seal(database).inspect()
    except JournalError as error:
        return error.message
    with tempfile.TemporaryDirectory() as folder, closing(_copy(database, Path(folder))) as copy:
        try:
            answer = copy.execute("PRAGMA quick_check").fetchone()[0]
        except sqlite3.DatabaseError as error:
            return f"the journal {database} cannot be read: {error}"
    return "" if answer == "ok" else f"the journal {database} is damaged: {answer}"


def in_use(state: Path) -> bool:
    """Whether a daemon or client works on the folder now."""
    try:
        with (state / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _rescued(database: Path) -> Rescued:
    busy = in_use(database.parent)
    result = Rescued(str(database), "" if busy else flaw_of(database), busy)
    with tempfile.TemporaryDirectory() as folder, closing(_copy(database, Path(folder))) as copy:
        for table, query in _QUERIES.items():
            rows = list(_rows(copy, table, query, result.unread))
            if rows:
                result.tables[table] = rows
    return result


def _copy(database: Path, folder: Path) -> sqlite3.Connection:
    """The file with its log, copied: SQLite recovers the log there."""
    for name in ("", "-wal"):
        source = database.with_name(database.name + name)
        if source.exists():
            shutil.copyfile(source, folder / (database.name + name))
    connection = sqlite3.connect(folder / database.name)
    connection.row_factory = sqlite3.Row
    return connection


def _rows(copy: sqlite3.Connection, table: str, query: str, unread: list[str]) -> Iterator[dict[str, Any]]:
    """Row by row, as far as it goes; a table that is not there is none of this role's."""
    try:
        if not copy.execute("SELECT count(*) FROM sqlite_master WHERE name = ?", (table,)).fetchone()[0]:
            return
        for row in copy.execute(query):
            yield {name: _shown(name, row[name]) for name in row.keys()}  # noqa: SIM118  a sqlite3.Row iterates over its values
    except sqlite3.DatabaseError as error:
        unread.append(f"{table}: {error}")


def _shown(name: str, value: Any) -> Any:
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if name in _MONEY | {"signed_at_most"} and isinstance(value, str) and value.isdigit():
        return str(int(value))
    return value

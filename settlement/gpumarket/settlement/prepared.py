"""Statements that are made once and run often, on a SQLite journal: what a run costs is then SQLite's work and little else.

A statement that is built, looked up and wrapped anew each time costs many times as much as SQLite's part of it, and an order runs two
dozen. Text, types and order of the parameters are SQLAlchemy's, from the tables; a failure is raised as SQLAlchemy raises it, so that the
journal tells its disk's faults from a work's own. Invariant: a run is part of whatever transaction its connection is in.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, Delete, Insert, Select, Update
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import TypeEngine

Convert = Callable[[Any], Any]
_DIALECT = SQLiteDialect_pysqlite()


class Prepared:
    """One statement. `columns` are those that an insert or update sets; every other parameter is a `bindparam` in it.

    Values are given by name: of the column, or of the `bindparam`.
    """

    def __init__(self, statement: Insert | Update | Delete | Select[Any], columns: Sequence[str] = ()) -> None:
        compiled = statement.compile(dialect=_DIALECT, column_keys=list(columns) or None)
        self._text = str(compiled)
        self._parameters = [(name, _of(compiled.binds[name].type, "bind_processor")) for name in compiled.positiontup or ()]
        shown = statement.selected_columns if isinstance(statement, Select) else ()
        self._columns = [(str(column.key), _of(column.type, "result_processor", None)) for column in shown]

    def run(self, connection: Connection, **values: Any) -> int:
        """Run it; how many rows it changed. Raises SQLAlchemyError."""
        return self._execute(connection, values).rowcount

    def rows(self, connection: Connection, **values: Any) -> list[dict[str, Any]]:
        """What it selects, by the columns' names. Raises SQLAlchemyError."""
        return [self._row(row) for row in self._execute(connection, values).fetchall()]

    def first(self, connection: Connection, **values: Any) -> dict[str, Any] | None:
        """The first row of what it selects, None where there is none. Raises SQLAlchemyError."""
        cursor = self._execute(connection, values)
        row = cursor.fetchone()
        cursor.close()
        return None if row is None else self._row(row)

    def _execute(self, connection: Connection, values: dict[str, Any]) -> sqlite3.Cursor:
        given = [values[name] if convert is None else convert(values[name]) for name, convert in self._parameters]
        return run_raw(connection, self._text, given)

    def _row(self, row: Sequence[Any]) -> dict[str, Any]:
        return {name: value if convert is None else convert(value) for (name, convert), value in zip(self._columns, row, strict=True)}


def run_raw(connection: Connection, text: str, given: Sequence[Any] = ()) -> sqlite3.Cursor:
    """Run a statement as it stands. Raises SQLAlchemyError, as SQLAlchemy would."""
    raw = connection.connection.dbapi_connection
    assert isinstance(raw, sqlite3.Connection), "this is for SQLite's journals"
    try:
        return raw.execute(text, given)
    except sqlite3.Error as error:  # without its parameters: prompts are among them
        raise DBAPIError.instance(text, None, error, sqlite3.Error, hide_parameters=True, dialect=_DIALECT) from error


def _of(kind: TypeEngine[Any], which: str, *more: Any) -> Convert | None:
    """How a type's values are given to SQLite, or taken from it; None: as they are."""
    found: Convert | None = getattr(kind.dialect_impl(_DIALECT), which)(_DIALECT, *more)
    return found

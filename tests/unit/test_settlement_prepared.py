"""Prepared statements give and take what SQLAlchemy would, and fail as it does, without the values they were given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Boolean, Column, Connection, Integer, LargeBinary, MetaData, Table, bindparam, insert, select, update
from sqlalchemy.exc import IntegrityError, OperationalError

from gpumarket.core.units import Money
from gpumarket.settlement.database import engine_of
from gpumarket.settlement.journal import MoneyType
from gpumarket.settlement.prepared import Prepared

METADATA = MetaData()
THINGS = Table(
    "things",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("amount", MoneyType, nullable=False),
    Column("open", Boolean, nullable=False),
    Column("data", LargeBinary),
)
ADD = Prepared(insert(THINGS), ["id", "amount", "open", "data"])
ALL = Prepared(select(THINGS).order_by(THINGS.c.id))
ONE = Prepared(select(THINGS).where(THINGS.c.id == bindparam("at")))
RAISE = Prepared(update(THINGS).where(THINGS.c.id == bindparam("at"), THINGS.c.amount < bindparam("to")), ["amount"])


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    engine = engine_of(f"sqlite:///{tmp_path}/things.db", read_only=False)
    with engine.begin() as made:
        METADATA.create_all(made)
    with engine.connect() as found:
        yield found
    engine.dispose()


def test_prepared_gives_and_takes_what_sqlalchemy_does(connection: Connection) -> None:
    with connection.begin():
        ADD.run(connection, id=1, amount=Money(10**20), open=True, data=b"\0\xff")
        connection.execute(insert(THINGS).values(id=2, amount=Money(7), open=False, data=None))
    assert ALL.rows(connection) == [dict(row) for row in connection.execute(select(THINGS).order_by(THINGS.c.id)).mappings()]
    assert ONE.first(connection, at=1) == {"id": 1, "amount": 10**20, "open": True, "data": b"\0\xff"}
    assert ONE.first(connection, at=3) is None


def test_prepared_compares_money_by_its_amount(connection: Connection) -> None:
    with connection.begin():
        ADD.run(connection, id=1, amount=Money(9), open=True, data=None)
        assert RAISE.run(connection, at=1, to=Money(9), amount=Money(10)) == 0
        assert RAISE.run(connection, at=1, to=Money(10), amount=Money(10)) == 1
    with pytest.raises(ValueError, match="uint96"):
        RAISE.run(connection, at=1, to=Money(-1), amount=Money(0))


def test_prepared_is_part_of_the_transaction_that_its_connection_is_in(connection: Connection) -> None:
    with connection.begin() as transaction:
        ADD.run(connection, id=1, amount=Money(1), open=True, data=None)
        transaction.rollback()
    assert ALL.rows(connection) == []


def test_prepared_fails_as_sqlalchemy_does_and_tells_no_values(connection: Connection) -> None:
    with connection.begin():
        ADD.run(connection, id=1, amount=Money(1), open=True, data=b"a prompt")
        with pytest.raises(IntegrityError) as caught:
            ADD.run(connection, id=1, amount=Money(2), open=True, data=b"a prompt")
    assert "a prompt" not in str(caught.value)
    with connection.begin():
        connection.exec_driver_sql("DROP TABLE things")
    with pytest.raises(OperationalError):
        ALL.rows(connection)

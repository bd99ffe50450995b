"""The client's disputes in its journal. A row is there, nonce and evidence included, before the challenge leaves (I2)."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, RowMapping, insert, select, update

from gpumarket.core.units import Hash
from gpumarket.sdk.tables import DISPUTES


@dataclass(frozen=True, slots=True)
class StoredDispute:
    """A dispute that this client opened. `outcome` is empty while it runs; `evidence` is empty after it."""

    job: Hash
    dispute: Hash
    nonce: Hash
    evidence: bytes
    outcome: str
    opened_at: int


def add(connection: Connection, stored: StoredDispute) -> None:
    """A new dispute, before anybody hears of it."""
    connection.execute(
        insert(DISPUTES).values(
            job=stored.job,
            dispute=stored.dispute,
            nonce=stored.nonce,
            evidence=stored.evidence,
            outcome=stored.outcome,
            opened_at=stored.opened_at,
        )
    )


def of_job(connection: Connection, job: Hash) -> StoredDispute | None:
    """The dispute about a job."""
    row = connection.execute(select(DISPUTES).where(DISPUTES.c.job == job)).mappings().one_or_none()
    return None if row is None else _stored(row)


def everything(connection: Connection) -> list[StoredDispute]:
    """All disputes, newest first."""
    return [_stored(row) for row in connection.execute(select(DISPUTES).order_by(DISPUTES.c.opened_at.desc())).mappings()]


def end(connection: Connection, dispute: Hash, outcome: str) -> None:
    """It is over: keep how, erase the evidence."""
    connection.execute(update(DISPUTES).where(DISPUTES.c.dispute == dispute).values(outcome=outcome, evidence=b""))


def _stored(row: RowMapping) -> StoredDispute:
    return StoredDispute(
        Hash(row["job"]), Hash(row["dispute"]), Hash(row["nonce"]), bytes(row["evidence"]), row["outcome"], row["opened_at"]
    )

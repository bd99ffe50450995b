"""The list of jobs, from the journal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection

from gpumarket.core.errors import ConfigError, JobFailed, MatchError, VerificationError
from gpumarket.core.terms import Task
from gpumarket.core.units import Address, Hash, Money
from gpumarket.sdk import store
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.results import JobSummary, Spent

ENDED = (JobFailed, VerificationError, MatchError, ConfigError)
"""Errors that end one job and say nothing about the next."""


def spent(desk: Desk, job: Hash) -> Spent | None:
    """Of one job and what was bought because of it; None for a job that is not in the journal."""
    return desk.journal.read(lambda c: _spent(c, job))


def _spent(connection: Connection, job: Hash) -> Spent | None:
    stored = store.load_job(connection, job)
    if stored is None:
        return None
    kinds = ("check", "rerun")
    below = [found for kind in kinds for child in store.children(connection, job, kind) if (found := _spent(connection, child))]
    over = stored.state not in (*store.RUNNING, "delivered") and all(found.over for found in below)
    return Spent(Money(stored.billed + sum(found.amount for found in below)), over)


def summaries(desk: Desk, *, checks: bool) -> list[JobSummary]:
    """Newest first."""
    rows = desk.journal.read(lambda c: [(row, store.load_attempts(c, Hash(row["job"]))) for row in store.list_jobs(c)])
    return [_summary(row, attempts) for row, attempts in rows if checks or row["purpose"] != "check"]


def _summary(row: Mapping[str, Any], attempts: list[store.StoredAttempt]) -> JobSummary:
    return JobSummary(
        job=Hash(row["job"]),
        task=Task(row["task"]),
        model=row["alias"],
        purpose=row["purpose"],
        state=row["state"],
        provider=Address(attempts[-1].lease.provider) if attempts else None,
        attempts=len(attempts),
        cost=Money(row["billed"]),
        max_cost=Money(row["max_amount"]),
        verdict=row["verdict"],
        created_at=row["created_at"],
        deadline=row["deadline"],
    )

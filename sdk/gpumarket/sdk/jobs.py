"""The list of jobs, from the journal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpumarket.core.errors import ConfigError, JobFailed, MatchError, VerificationError
from gpumarket.core.terms import Task
from gpumarket.core.units import Address, Hash, Money
from gpumarket.sdk import store
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.results import JobSummary

ENDED = (JobFailed, VerificationError, MatchError, ConfigError)
"""Errors that end one job and say nothing about the next."""


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

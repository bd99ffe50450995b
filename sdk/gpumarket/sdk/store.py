"""Reads and writes of the client's journal, one function a fact. Each write runs inside `Journal.transact`, so it is durable when awaited.

Invariant: what a job record says was true before anything left the process. Nothing here signs, sends or decides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from gpumarket.core.codec import from_proto, open_receipt, parse
from gpumarket.core.signing import Domain
from gpumarket.core.terms import Ack, JobSpec, Lease, Task
from gpumarket.core.units import Address, Hash, Money
from gpumarket.sdk.session import AttemptEnd
from gpumarket.sdk.tables import ATTEMPTS, JOBS, OUTPUTS
from gpumarket.settlement.prepared import Prepared
from gpumarket.v1 import terms_pb2 as pb

RUNNING = ("ordered", "leased")
"""States in which a job still holds its maximum; from "delivered" on it is billed."""
DAY_SECONDS = 86_400
_ADD_JOB = Prepared(insert(JOBS), [column.key for column in JOBS.c if column.key != "report"])
_JOB = Prepared(select(JOBS).where(JOBS.c.job == bindparam("at")))
_ADD_ATTEMPT = Prepared(insert(ATTEMPTS), ["job", "number", "provider", "lease", "offer", "reason", "detail", "units", "amount"])
_ATTEMPTS = Prepared(select(ATTEMPTS).where(ATTEMPTS.c.job == bindparam("at")).order_by(ATTEMPTS.c.number))
_ADD_OUTPUT = Prepared(insert(OUTPUTS), OUTPUTS.c.keys())
_OUTPUT = Prepared(select(OUTPUTS.c.count, OUTPUTS.c.data).where(OUTPUTS.c.job == bindparam("at")).order_by(OUTPUTS.c.first))


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A job as the journal has it."""

    job: Hash
    alias: str
    purpose: str
    parent: Hash | None
    state: str
    channel: Hash
    order: pb.JobOrder
    request: bytes
    salt: Hash
    options: Mapping[str, Any]
    attempt: int
    billed: Money
    will_check: bool
    verdict: str
    verdict_facts: Mapping[str, Any]
    finish_reason: str
    created_at: int
    spec: JobSpec

    @property
    def task(self) -> Task:
        return self.spec.task


@dataclass(frozen=True, slots=True)
class StoredAttempt:
    """An attempt as the journal has it. `reason` is empty while it runs."""

    number: int
    lease: Lease
    signed_lease: pb.SignedLease
    offer: pb.SignedOffer
    nonce: Hash | None
    signed_ack: pb.SignedAck | None
    ack: Ack | None
    signed_receipt: pb.SignedReceipt | None
    reason: str
    detail: str
    units: int
    amount: Money

    @property
    def end(self) -> AttemptEnd:
        return AttemptEnd(self.number, self.lease.provider, self.reason, self.detail, self.units, self.amount)


# --- jobs ----------------------------------------------------------------------------------------------------------------------


def add_job(connection: Connection, job: StoredJob) -> None:
    """A new order, before it is sent."""
    _ADD_JOB.run(
        connection,
        job=job.job,
        alias=job.alias,
        purpose=job.purpose,
        parent=job.parent,
        state=job.state,
        task=int(job.task),
        channel=job.channel,
        order=job.order.SerializeToString(deterministic=True),
        request=job.request,
        salt=job.salt,
        options=json.dumps(dict(job.options)),
        attempt=0,
        max_amount=job.spec.max_amount,
        billed=Money(0),
        will_check=False,
        verdict="",
        verdict_json="{}",
        finish_reason="",
        created_at=job.created_at,
        deadline=job.spec.deadline,
        ended_at=0,
    )


def set_job(connection: Connection, job: Hash, **values: Any) -> None:
    """Change columns of a job."""
    _set_job(tuple(values)).run(connection, at=job, **values)


def set_verdict(connection: Connection, job: Hash, verdict: str, facts: Mapping[str, Any], **values: Any) -> None:
    """The verdict and what it rests on."""
    set_job(connection, job, verdict=verdict, verdict_json=json.dumps(dict(facts)), **values)


def load_job(connection: Connection, job: Hash) -> StoredJob | None:
    row = _JOB.first(connection, at=job)
    return _job(row) if row else None


def scheduler_of(connection: Connection, job: Hash) -> Address:
    """Whom a job of the journal was ordered from, and belongs to."""
    stored = load_job(connection, job)
    assert stored is not None
    return stored.spec.scheduler


def list_jobs(connection: Connection, states: Sequence[str] = (), limit: int = 1_000) -> list[Mapping[str, Any]]:
    """Newest first, as rows without request and order."""
    columns = [c for c in JOBS.c if c.name not in ("order", "request", "salt", "options", "report")]
    query = select(*columns).order_by(JOBS.c.created_at.desc(), JOBS.c.job).limit(limit)
    if states:
        query = query.where(JOBS.c.state.in_(states))
    return [dict(row) for row in connection.execute(query).mappings()]


def job_keys(connection: Connection, states: Sequence[str], purposes: Sequence[str]) -> list[Hash]:
    """Oldest first."""
    query = select(JOBS.c.job).where(JOBS.c.state.in_(states), JOBS.c.purpose.in_(purposes)).order_by(JOBS.c.created_at)
    return [Hash(row.job) for row in connection.execute(query)]


def children(connection: Connection, parent: Hash, purpose: str) -> list[Hash]:
    """Checks or reruns of a job, oldest first."""
    query = select(JOBS.c.job).where(JOBS.c.parent == parent, JOBS.c.purpose == purpose).order_by(JOBS.c.created_at)
    return [Hash(row.job) for row in connection.execute(query)]


def replaced(connection: Connection, job: Hash) -> list[Hash]:
    """Rejected jobs that a rerun stands for, oldest first; none for a job that is no rerun."""
    found: list[Hash] = []
    query = select(JOBS.c.parent, JOBS.c.purpose)
    while (row := connection.execute(query.where(JOBS.c.job == job)).first()) and row.purpose == "rerun":
        job = Hash(row.parent)
        found.insert(0, job)
    return found


def waiting_reports(connection: Connection) -> list[tuple[Hash, bytes]]:
    """Reports that the scheduler does not have yet."""
    query = select(JOBS.c.job, JOBS.c.report).where(JOBS.c.report.is_not(None)).order_by(JOBS.c.created_at)
    return [(Hash(row.job), row.report) for row in connection.execute(query)]


def open_maxima(connection: Connection, channel: Hash) -> Money:
    """Sum of the maxima of jobs that still run on a channel."""
    query = select(JOBS.c.max_amount).where(JOBS.c.channel == channel, JOBS.c.state.in_(RUNNING))
    return Money(sum(row.max_amount for row in connection.execute(query)))


def prune(connection: Connection, before: int) -> None:
    """Erase requests and outputs of jobs that ended before a time; receipts, leases and amounts stay."""
    old = select(JOBS.c.job).where(JOBS.c.ended_at > 0, JOBS.c.ended_at < before, JOBS.c.request != b"")
    connection.execute(delete(OUTPUTS).where(OUTPUTS.c.job.in_(old)))
    connection.execute(update(JOBS).where(JOBS.c.ended_at > 0, JOBS.c.ended_at < before).values(request=b"", options="{}"))


# --- attempts ------------------------------------------------------------------------------------------------------------------


def add_attempt(connection: Connection, job: Hash, lease: pb.SignedLease, offer: pb.SignedOffer) -> None:
    """A lease that was accepted, before its provider is called."""
    number = lease.lease.attempt
    _ADD_ATTEMPT.run(
        connection,
        job=job,
        number=number,
        provider=lease.lease.provider,
        lease=lease.SerializeToString(deterministic=True),
        offer=offer.SerializeToString(deterministic=True),
        reason="",
        detail="",
        units=0,
        amount=Money(0),
    )
    set_job(connection, job, state="leased", attempt=number)


def set_attempt(connection: Connection, job: Hash, number: int, **values: Any) -> None:
    """Change columns of an attempt."""
    _set_attempt(tuple(values)).run(connection, at=job, which=number, **values)


def end_attempt(connection: Connection, job: Hash, end: AttemptEnd, ack: pb.SignedAck | None, receipt: pb.SignedReceipt | None) -> None:
    """How an attempt ended, with the ack that closes it."""
    values: dict[str, Any] = {"reason": end.reason, "detail": end.detail[:2_000], "units": end.units, "amount": end.amount}
    if ack is not None:
        values["ack"] = ack.SerializeToString(deterministic=True)
    if receipt is not None:
        values["receipt"] = receipt.SerializeToString(deterministic=True)
    set_attempt(connection, job, end.number, **values)


def load_attempts(connection: Connection, job: Hash) -> list[StoredAttempt]:
    """All attempts, first to last."""
    return [_attempt(row) for row in _ATTEMPTS.rows(connection, at=job)]


# --- output --------------------------------------------------------------------------------------------------------------------


def add_output(connection: Connection, job: Hash, first: int, items: Sequence[bytes]) -> None:
    """Items from an absolute index; all of one size."""
    _ADD_OUTPUT.run(connection, job=job, first=first, count=len(items), data=b"".join(items))


def load_output(connection: Connection, job: Hash) -> list[bytes]:
    """Every item of a job's output, in order."""
    return [item for row in _OUTPUT.rows(connection, at=job) for item in _split(row["data"], row["count"])]


def _split(data: bytes, count: int) -> Iterator[bytes]:
    size = len(data) // count
    return (data[i * size : (i + 1) * size] for i in range(count))


@lru_cache(maxsize=256)
def _set_job(columns: tuple[str, ...]) -> Prepared:
    return Prepared(update(JOBS).where(JOBS.c.job == bindparam("at")), columns)


@lru_cache(maxsize=256)
def _set_attempt(columns: tuple[str, ...]) -> Prepared:
    return Prepared(update(ATTEMPTS).where(ATTEMPTS.c.job == bindparam("at"), ATTEMPTS.c.number == bindparam("which")), columns)


# --- rows ----------------------------------------------------------------------------------------------------------------------


def _job(row: Mapping[Any, Any]) -> StoredJob:
    order = parse(pb.JobOrder, row["order"])
    return StoredJob(
        job=Hash(row["job"]),
        alias=row["alias"],
        purpose=row["purpose"],
        parent=Hash(row["parent"]) if row["parent"] else None,
        state=row["state"],
        channel=Hash(row["channel"]),
        order=order,
        request=row["request"],
        salt=Hash(row["salt"]),
        options=json.loads(row["options"]),
        attempt=row["attempt"],
        billed=Money(row["billed"]),
        will_check=row["will_check"],
        verdict=row["verdict"],
        verdict_facts=json.loads(row["verdict_json"]),
        finish_reason=row["finish_reason"],
        created_at=row["created_at"],
        spec=from_proto(JobSpec, order.spec),
    )


def _attempt(row: Mapping[Any, Any]) -> StoredAttempt:
    lease = parse(pb.SignedLease, row["lease"])
    ack = parse(pb.SignedAck, row["ack"]) if row["ack"] else None
    return StoredAttempt(
        number=row["number"],
        lease=from_proto(Lease, lease.lease),
        signed_lease=lease,
        offer=parse(pb.SignedOffer, row["offer"]),
        nonce=Hash(row["nonce"]) if row["nonce"] else None,
        signed_ack=ack,
        ack=from_proto(Ack, ack.ack) if ack else None,
        signed_receipt=parse(pb.SignedReceipt, row["receipt"]) if row["receipt"] else None,
        reason=row["reason"],
        detail=row["detail"],
        units=row["units"],
        amount=Money(row["amount"]),
    )


def receipt_holds(domain: Domain, attempt: StoredAttempt) -> bool:
    """Whether the stored receipt of an attempt is its provider's over its lease. Raises BadSignature for one that is not."""
    if attempt.signed_receipt is None:
        return False
    return open_receipt(domain, attempt.signed_receipt, attempt.lease.provider).lease == attempt.lease.struct_hash

"""The client's word on delivered jobs: journaled first, sent then, sent again after a crash until the scheduler has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from sqlalchemy import Connection

from gpumarket.core.codec import parse
from gpumarket.core.errors import Busy, GpumarketError, NetworkError
from gpumarket.core.units import Hash, Money, hex0x
from gpumarket.sdk import store
from gpumarket.sdk.account import refund
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.logs import log
from gpumarket.sdk.openings import Delivered
from gpumarket.sdk.results import Verdict, VerdictState
from gpumarket.v1 import market_pb2 as mpb

_WIRE = {
    VerdictState.ACCEPTED: mpb.VERDICT_ACCEPTED,
    VerdictState.UNCHECKED: mpb.VERDICT_ACCEPTED,
    VerdictState.GREY: mpb.VERDICT_GREY,
    VerdictState.REJECTED: mpb.VERDICT_REJECTED,
}
REASON_CHARS_MAX = 1_000


async def conclude(
    desk: Desk, subject: Delivered, verdict: Verdict, checks: Sequence[Delivered], drawn: Sequence[int], traceparent: str = ""
) -> None:
    """Journal a verdict with its report, then send the report.

    What a rejected attempt cost goes back to the client's books at once; attempts lost before it earned their acks, and keep them.
    """
    rejected = verdict.state is VerdictState.REJECTED
    report = mpb.ReportRequest(
        job=subject.job, attempt=subject.attempt, verdict=_WIRE[verdict.state], reason=verdict.reason[:REASON_CHARS_MAX]
    )
    if rejected:
        report.subject.CopyFrom(subject.opening)
        report.checks.extend(check.opening for check in checks)
        report.drawn.extend(drawn)
    now = desk.clock.now()
    facts = verdict_facts(verdict)

    def work(connection: Connection) -> None:
        state = "rejected" if rejected else "done"
        raw = report.SerializeToString(deterministic=True)
        stored = store.load_job(connection, subject.job)
        store.set_verdict(connection, subject.job, verdict.state.value, facts, state=state, ended_at=now, report=raw)
        if rejected and stored is not None:
            store.set_job(connection, subject.job, billed=Money(stored.billed - subject.cost))
            refund(connection, stored.channel, subject.cost)

    await desk.journal.transact(work)
    if rejected:
        channel = Hash(subject.opening.lease.lease.client_channel)
        desk.account.forgive(channel, subject.cost)
    with desk.tracing.span("client.report", parent=traceparent, verdict=verdict.state.value) as span:
        await send(desk, subject.job, report, span.context)


async def send(desk: Desk, job: Hash, report: mpb.ReportRequest, traceparent: str = "") -> None:
    """Send a report; it leaves the journal when the scheduler has answered. One that cannot be delivered now stays for `send_all`."""
    try:
        status = await desk.schedulers.line(desk.journal.read(partial(store.scheduler_of, job=job))).report(report, traceparent)
        log.info("reported", job=hex0x(job), verdict=mpb.Verdict.Name(report.verdict), state=status.state)
    except (NetworkError, Busy) as error:
        log.warning("report_waits", job=hex0x(job), reason=error.message)
        return
    except GpumarketError as error:
        log.warning("report_refused", job=hex0x(job), code=error.code, reason=error.message)
    await desk.journal.transact(lambda c: store.set_job(c, job, report=None))


async def send_all(desk: Desk) -> None:
    """Send what could not be sent before."""
    for job, raw in desk.journal.read(store.waiting_reports):
        await send(desk, job, parse(mpb.ReportRequest, raw))


def verdict_facts(verdict: Verdict) -> dict[str, object]:
    """A verdict as the journal keeps it."""
    return {
        "reason": verdict.reason,
        "statistic": None if math.isnan(verdict.statistic) else verdict.statistic,
        "checkers": [c.hex() for c in verdict.checkers],
        "cost": str(verdict.cost),
    }

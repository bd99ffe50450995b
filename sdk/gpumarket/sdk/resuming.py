"""Jobs that a crash interrupted: read back, continued from what was delivered, paid once.

A job that was only ordered is ordered again (the same order gets the same lease). One that was running is closed at what the journal
holds of it and goes on elsewhere with reason "client-restart", a text to its end: a stop string then cuts what comes of it. One that was
delivered but not yet judged is checked now. Checks themselves are not resumed: their jobs are closed, and the result that they were for is
checked anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from sqlalchemy import Connection

from gpumarket.core.codec import parse
from gpumarket.core.errors import ConfigError, JobFailed, ResultRejected
from gpumarket.core.units import Address, Hash, Money, hex0x
from gpumarket.sdk import job_ids, outcomes, reports, store
from gpumarket.sdk.buying import STOPPED, Bought, Purchase, rejected_result
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.openings import delivered
from gpumarket.sdk.ordering import Ask, plan_of
from gpumarket.sdk.results import RejectedResult, Verdict, VerdictState
from gpumarket.sdk.running import JobRun
from gpumarket.sdk.session import Phase, Progress, RetryElsewhere, restored
from gpumarket.v1 import terms_pb2 as pb


async def resume(desk: Desk, job: Hash) -> Bought:
    """Bring a job to its end. Raises JobFailed or ResultRejected for one that ended without a result, ConfigError for an unknown one."""
    stored = desk.journal.read(lambda c: store.load_job(c, job))
    if stored is None:
        raise ConfigError(f"job {hex0x(job)} is not in this journal", hint="gpumarket job list")
    if stored.state == "cancelled" and stored.finish_reason:
        return Bought(job, Verdict(VerdictState.NOT_DRAWN, STOPPED), Money(0))
    if stored.state in ("failed", "cancelled"):
        reason = stored.verdict_facts.get("reason") or "see its attempts"
        raise JobFailed(f"job {hex0x(job)} {stored.state}: {reason}", hint=f"gpumarket job get {hex0x(job)}")
    if stored.state == "rejected":
        return await _replacement(desk, stored)
    purchase = _purchase(desk, stored)
    if stored.state == "done":
        return Bought(job, verdict_of(stored), Money(purchase.spent_on_checks), tuple(purchase.rejected))
    if stored.state == "delivered":
        return await purchase.conclude_delivered(job)
    run = await _run(desk, stored)
    async with aclosing(purchase.follow(run)) as output:
        async for _ in output:
            pass
    assert purchase.outcome is not None
    return purchase.outcome


async def ordered_before(desk: Desk, ask: Ask) -> Bought | None:
    """The end of the job that was ordered under this job id, brought about where it was interrupted; None for a fresh id or none.

    Raises JobIdReused when the id stands for another request, JobFailed for a job that ended without a result: its id is used up.
    """
    if ask.job_id is None:
        return None
    job = desk.journal.read(partial(job_ids.find, job_id=ask.job_id, asked=ask.fingerprint))
    return None if job is None else await resume(desk, job)


def orphaned_checks(connection: Connection) -> list[Hash]:
    """Check jobs that an earlier process left unfinished. Ask before this one buys any."""
    return store.job_keys(connection, (*store.RUNNING, "delivered"), ("check",))


async def close_checks(desk: Desk, orphans: Sequence[Hash]) -> None:
    """End check jobs of an earlier process: those answered are paid, the others lapse at the scheduler."""
    for job in orphans:
        stored = desk.journal.read(partial(store.load_job, job=job))
        if stored is None:
            continue
        if stored.state == "delivered":
            evidence = desk.journal.read(partial(delivered, job=job))
            verdict = Verdict(VerdictState.ACCEPTED, "the client was restarted before it was weighed")
            await reports.conclude(desk, evidence, verdict, [], ())
            continue
        channel = desk.account.known(stored.channel)  # before its end is written: a channel first read after it no longer counts the job
        end = partial(store.set_verdict, job=job, verdict="", facts={"reason": "the client was restarted"}, state="cancelled")
        await desk.journal.transact(partial(end, ended_at=desk.clock.now()))
        if channel is not None:
            desk.account.release(channel, stored.spec.max_amount, Money(0))


def ask_of(stored: store.StoredJob) -> Ask:
    """What was asked for, from the journal."""
    limit = stored.options.get("max_cost")
    return Ask(
        alias=stored.alias,
        model=stored.spec.model,
        task=stored.task,
        request=stored.request,
        units=stored.spec.prompt_units,
        output_units=stored.spec.max_output_units,
        profile=stored.spec.profile,
        max_cost=None if limit is None else Money(int(limit)),
        constraints=parse(pb.Constraints, stored.order.constraints),
        options=stored.options,
        purpose=stored.purpose,
        parent=stored.parent,
    )


def verdict_of(stored: store.StoredJob) -> Verdict:
    """A verdict as it was journaled."""
    facts = stored.verdict_facts
    return Verdict(
        VerdictState(stored.verdict or VerdictState.NOT_DRAWN),
        str(facts.get("reason", "")),
        float(facts.get("statistic") or 0.0),
        tuple(Address(bytes.fromhex(c)) for c in facts.get("checkers", ())),
        Money(int(facts.get("cost", 0))),
    )


def _purchase(desk: Desk, stored: store.StoredJob) -> Purchase:
    """The purchase that a job belongs to, with what it rejected and spent before: max_cost and reruns_max count from its first job."""

    def past(connection: Connection) -> tuple[list[RejectedResult], Money]:
        replaced = store.replaced(connection, stored.job)
        rejected = [rejected_result(connection, job) for job in replaced]
        return rejected, outcomes.spent_on_checks(connection, (*replaced, stored.job))

    rejected, spent_on_checks = desk.journal.read(past)
    return Purchase(desk, ask_of(stored), spent_on_checks=spent_on_checks, rejected=rejected)


async def _run(desk: Desk, stored: store.StoredJob) -> JobRun:
    channel = desk.account.known(stored.channel)
    if channel is None:
        raise ConfigError(f"the channel of job {hex0x(stored.job)} is not known on this chain", hint="check GPUMARKET_CHAIN_ADDRESS_BOOK")
    attempts, output = desk.journal.read(lambda c: (store.load_attempts(c, stored.job), store.load_output(c, stored.job)))
    restarts = 1 + sum(a.reason == "client-restart" for a in attempts)
    plan = plan_of(stored.spec, stored.request, desk.settings.attempts_max + restarts)
    ended = tuple(a.end for a in attempts if a.reason)
    progress = Progress(plan, ends=ended)
    if attempts:
        last = attempts[-1]
        progress = replace(progress, phase=Phase.ORDERED if last.reason else Phase.LEASED, attempt=last.number, lease=last.lease)
    run = JobRun(desk, stored, channel, restored(progress, 0, output), probability=desk.settings.check_probability)
    if desk.clock.now() >= stored.spec.deadline and (not attempts or attempts[-1].reason):
        await run.expire()
    elif attempts and attempts[-1].reason:
        run.resume_retry(RetryElsewhere(attempts[-1].end, attempts[-1].ack), attempts[-1].signed_receipt)
    elif attempts:
        await run.restart()
    return run


async def _replacement(desk: Desk, stored: store.StoredJob) -> Bought:
    reruns = desk.journal.read(lambda c: store.children(c, stored.job, "rerun"))
    if reruns:
        return await resume(desk, reruns[-1])
    reason: Any = stored.verdict_facts.get("reason", "")
    raise ResultRejected(f"the result of job {hex0x(stored.job)} was rejected and not paid: {reason}", hint="run it again as a new job")

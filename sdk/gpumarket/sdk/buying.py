"""One purchase from order to verdict: run the job, have it checked when the draw says so, run it again elsewhere when it was wrong.

Invariant: what all of it costs together (the job, its checks, reruns) never passes max_cost; a rejected result is never handed out as good.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from sqlalchemy import Connection

from gpumarket.core.errors import FundsError, MatchError, ResultRejected
from gpumarket.core.units import Hash, Money, format_money, hex0x
from gpumarket.sdk import store
from gpumarket.sdk.checks import Checker
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.logprobs import Logprobs
from gpumarket.sdk.ordering import Ask, place, plan_of
from gpumarket.sdk.results import RejectedResult, Verdict, VerdictState
from gpumarket.sdk.running import JobRun
from gpumarket.sdk.session import Phase, Progress
from gpumarket.telemetry.spans import Span
from gpumarket.v1 import market_pb2 as mpb

STOPPED = "the answer ended at a stop string: its client left, and nobody checks it"


@dataclass(slots=True)
class Bought:
    """A purchase that is over: the job that counts, its verdict, and what was rejected on the way. `logprobs` of the whole answer, or
    of none of it: they are not journaled, so that a resumed job has lost those of before."""

    job: Hash
    verdict: Verdict
    check_cost: Money
    rejected: tuple[RejectedResult, ...] = ()
    explanation: mpb.Explanation | None = None
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(slots=True)
class Purchase:
    """A purchase under way. Iterate `items()`, then read `outcome`: None when it was left before its end. `run` is the first one."""

    desk: Desk
    ask: Ask
    outcome: Bought | None = None
    spent_on_checks: int = 0
    rejected: list[RejectedResult] = field(default_factory=list)
    run: JobRun | None = None
    _leaving: str | None = None

    @property
    def spent(self) -> Money:
        """What the purchase cost besides the job that counts: checks, and what stays paid of rejected jobs."""
        return Money(self.spent_on_checks + sum(r.cost for r in self.rejected))

    async def items(self) -> AsyncGenerator[tuple[bytes, ...], None]:
        """Output of the first run as it comes; when that is rejected, nothing more: `outcome` names the job that replaced it."""
        with self._traced("client.job") as span:
            run = self.run = await self._start(self.ask)
            if self._leaving is not None:
                run.leave(self._leaving)
            async with aclosing(run.items()) as output:
                async for items in output:
                    yield items
            if run.progress.phase is not Phase.CANCELLED:
                await self._conclude(run)
            span.note(verdict=self._verdict_word)

    def leave(self, finish_reason: str = "") -> None:
        """As `JobRun.leave`, also before there is a run."""
        self._leaving = finish_reason
        if self.run is not None:
            self.run.leave(finish_reason)

    def stopped(self) -> Bought:
        """The purchase of a job that was left at a stop string: what came is the answer, and nobody checks it."""
        assert self.run is not None and self.run.progress.phase is Phase.CANCELLED
        verdict = Verdict(VerdictState.NOT_DRAWN, STOPPED)
        self.outcome = Bought(self.run.job.job, verdict, Money(0), (), self.run.explanation, whole_logprobs(self.run))
        return self.outcome

    async def finish(self) -> Bought:
        """Run to the end."""
        async with aclosing(self.items()) as output:
            async for _ in output:
                pass
        assert self.outcome is not None
        return self.outcome

    async def follow(self, run: JobRun) -> AsyncGenerator[tuple[bytes, ...], None]:
        """As `items`, for a job that was read back from the journal."""
        with self._traced("client.resume") as span:
            self.run, run.traceparent = run, span.context
            async with aclosing(run.items()) as output:
                async for items in output:
                    yield items
            await self._conclude(run)
            span.note(verdict=self._verdict_word)

    async def conclude_delivered(self, job: Hash, explanation: mpb.Explanation | None = None) -> Bought:
        """Verdict for a job that is delivered; reruns as long as results are rejected."""
        verdict, logprobs = await self._verdict(job), whole_logprobs(self.run)
        while verdict.state is VerdictState.REJECTED:
            run = await self._rerun(job, verdict)
            async with aclosing(run.items()) as output:
                async for _ in output:
                    pass
            job, explanation, logprobs = run.job.job, run.explanation, whole_logprobs(run)
            verdict = await self._verdict(job) if run.will_check else Verdict(VerdictState.NOT_DRAWN)
        self.outcome = Bought(job, verdict, Money(self.spent_on_checks), tuple(self.rejected), explanation, logprobs)
        return self.outcome

    def _traced(self, name: str) -> Span:
        """The span that everything of this purchase belongs to."""
        span = self.desk.tracing.span(name, task=self.ask.task.name.lower())
        self.ask = replace(self.ask, traceparent=span.context)
        return span

    @property
    def _verdict_word(self) -> str:
        return "" if self.outcome is None else self.outcome.verdict.state.value

    async def _conclude(self, run: JobRun) -> None:
        if run.will_check:
            await self.conclude_delivered(run.job.job, run.explanation)
        else:
            verdict, spent = Verdict(VerdictState.NOT_DRAWN), Money(self.spent_on_checks)
            self.outcome = Bought(run.job.job, verdict, spent, tuple(self.rejected), run.explanation, whole_logprobs(run))

    async def _start(self, ask: Ask) -> JobRun:
        job, channel = await place(self.desk, ask)
        if ask.approve is not None:  # asked once: what it allowed holds for checks and reruns, too
            self.ask = replace(self.ask, approve=None, max_cost=Money(int(job.options["max_cost"])))
        plan = plan_of(job.spec, job.request, self.desk.settings.attempts_max)
        run = JobRun(self.desk, job, channel, Progress(plan), probability=self.desk.settings.check_probability)
        run.explain, run.traceparent = ask.explain, ask.traceparent
        return run

    async def _verdict(self, job: Hash) -> Verdict:
        billed = self.desk.journal.read(lambda c: _billed(c, job))
        left = None if self.ask.max_cost is None else Money(max(0, self.ask.max_cost - billed - self.spent))
        distrusted = [r.provider for r in self.rejected]  # whoever was just outvoted is no help as a checker
        verdict = await Checker(self.desk, self.ask, job, left, asked=distrusted).conclude()
        self.spent_on_checks += verdict.cost
        return verdict

    async def _rerun(self, job: Hash, verdict: Verdict) -> JobRun:
        """The same job elsewhere, with what is left of max_cost. Raises ResultRejected when that cannot be."""
        self.rejected.append(self.desk.journal.read(lambda c: rejected_result(c, job)))
        provider = self.rejected[-1].provider
        told = f"the result of {hex0x(provider)} was rejected and is not paid: {verdict.reason}"
        if len(self.rejected) > self.desk.settings.reruns_max:
            raise ResultRejected(
                f"{len(self.rejected)} results were rejected in a row, the last one: {told}", hint="gpumarket market explain"
            )
        ask = self.ask
        constraints = type(ask.constraints)()
        constraints.CopyFrom(ask.constraints)
        constraints.exclude_providers.extend(r.provider for r in self.rejected)
        left = None if ask.max_cost is None else Money(max(0, ask.max_cost - self.spent))
        try:
            return await self._start(replace(ask, constraints=constraints, max_cost=left, purpose="rerun", parent=job, job_id=None))
        except (MatchError, FundsError) as error:
            raise ResultRejected(
                f"{told}; it was not run again: {error.message} ({format_money(self.spent)} went to checks and lost attempts)",
                hint=error.hint or "raise max_cost",
            ) from error


def whole_logprobs(run: JobRun | None) -> tuple[Logprobs, ...]:
    """Of every token of the answer, or none."""
    return tuple(run.logprobs) if run is not None and not run.first else ()


def rejected_result(connection: Connection, job: Hash) -> RejectedResult:
    """A rejected job as its buyer is told of it, from the journal."""
    stored, attempts = store.load_job(connection, job), store.load_attempts(connection, job)
    assert stored is not None and attempts, "only what was delivered is rejected"
    return RejectedResult(job, attempts[-1].lease.provider, str(stored.verdict_facts.get("reason", "")), stored.billed)


def _billed(connection: Connection, job: Hash) -> Money:
    stored = store.load_job(connection, job)
    return stored.billed if stored else Money(0)

"""Has a delivered result recomputed by others, and tells the scheduler what came of it.

The client draws, with its own randomness and after delivery: which inputs, and whom, by stake, from the registry, of another owner. A
checker gets request and output, never the provider's numbers, and answers with its own, signed. `panel` decides by majority; whoever
is outside it, checker included, is not paid.

Never: a check of a check, a checker of the client's own liking, a rejection without two agreeing checks.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field, replace

from gpumarket.core.codec import parse
from gpumarket.core.errors import FundsError, JobFailed, MatchError, NetworkError, VerificationError
from gpumarket.core.terms import Task
from gpumarket.core.units import Address, Hash, Money, hex0x
from gpumarket.sdk import reports
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.hub import Hub
from gpumarket.sdk.logs import log
from gpumarket.sdk.offers import checkers
from gpumarket.sdk.openings import Delivered, delivered
from gpumarket.sdk.ordering import Ask, place, plan_of
from gpumarket.sdk.panel import Panel
from gpumarket.sdk.pool import Observation
from gpumarket.sdk.results import Verdict, VerdictState
from gpumarket.sdk.running import JobRun
from gpumarket.sdk.session import Progress
from gpumarket.settlement import verification as rules
from gpumarket.v1 import terms_pb2 as pb

CHECKER_TRIES = 4
"""Checkers in a row that may fail to answer before no more are asked."""
_STATES = {
    rules.Verdict.ACCEPTED: VerdictState.ACCEPTED,
    rules.Verdict.GREY: VerdictState.GREY,
    rules.Verdict.REJECTED: VerdictState.REJECTED,
}


@dataclass(slots=True)
class Checker:
    """The check of one delivered job. `budget` is what all its checks may cost together (None: no limit was given)."""

    desk: Desk
    ask: Ask
    job: Hash
    budget: Money | None
    spent: int = 0
    answers: list[Delivered] = field(default_factory=list)
    asked: list[Address] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    async def conclude(self) -> Verdict:
        """Check, decide, journal, report. Every way out leaves a verdict in the journal."""
        subject = self.desk.journal.read(lambda c: delivered(c, self.job))
        panel = self._panel(subject)
        request = _check_request(subject, panel.drawn)
        while len(self.answers) < self.desk.settings.checks_max and not (panel.answers and panel.settled):
            answer = await self._ask_somebody(subject, request)
            if answer is None:
                break
            self.answers.append(answer)
            panel = replace(panel, answers=(*panel.answers, rules.open_evidence(self.desk.domain, answer.opening)))
        verdict, rests_on = self._verdict(panel)
        checks = [self.answers[i] for i in rests_on]
        await reports.conclude(self.desk, subject, verdict, checks, panel.drawn, self.ask.traceparent)
        self._pool(panel, verdict)
        for index, answer in enumerate(self.answers):
            await self._conclude_answer(panel, subject, index, answer)
        return verdict

    def _panel(self, subject: Delivered) -> Panel:
        evidence = rules.open_evidence(self.desk.domain, subject.opening)
        profile = rules.profile_by_digest(evidence.lease.profile)
        drawn: tuple[int, ...] = ()
        if evidence.lease.task in (Task.EMBED, Task.INFER):
            start = evidence.own_start
            count = len(evidence.output) - start
            drawn = tuple(start + i for i in rules.draw_subset(count, self.desk.settings.check_share, self.desk.random))
        return Panel(profile, evidence, drawn, self.desk.owner_of)

    def _verdict(self, panel: Panel) -> tuple[Verdict, tuple[int, ...]]:
        if not panel.answers:
            reason = "no checker available: " + ("; ".join(self.notes) or "nobody else holds this model and takes checks")
            return Verdict(VerdictState.UNCHECKED, reason, cost=Money(self.spent)), ()
        decision, rests_on = panel.decide()
        checkers_ = tuple(answer.provider for answer in self.answers)
        reason = "; ".join([decision.reason, *self.notes])
        return Verdict(_STATES[decision.verdict], reason, decision.statistic, checkers_, Money(self.spent)), rests_on

    def _pool(self, panel: Panel, verdict: Verdict) -> None:
        """Count a text job that passed alone; what its provider's jobs say together decides who gets the next one."""
        lease = panel.subject.lease
        if lease.task is not Task.GENERATE or verdict.state not in (VerdictState.ACCEPTED, VerdictState.GREY):
            return
        seen = Observation(lease.provider, lease.profile, verdict.statistic, panel.subject.receipt.output_units)
        if self.desk.pool.observe(seen) is rules.Verdict.REJECTED:
            log.warning("provider_distrusted", provider=hex0x(lease.provider), reason="its checked answers together do not fit the profile")

    async def _conclude_answer(self, panel: Panel, subject: Delivered, index: int, answer: Delivered) -> None:
        """A checker's job is held until its numbers are judged, too."""
        witnesses = panel.witnesses_against(index)
        if not witnesses:
            await reports.conclude(
                self.desk, answer, Verdict(VerdictState.ACCEPTED, "not contradicted by two others"), [], (), self.ask.traceparent
            )
            return
        by_lease = {d.opening.lease.signature: d for d in (subject, *self.answers)}
        found = [d for d in by_lease.values() if rules.open_evidence(self.desk.domain, d.opening) in witnesses]
        verdict = Verdict(VerdictState.REJECTED, "its numbers are contradicted by two others that agree")
        await reports.conclude(self.desk, answer, verdict, found, panel.drawn, self.ask.traceparent)

    # --- buying a check ----------------------------------------------------------------------------------------------------

    async def _ask_somebody(self, subject: Delivered, request: pb.CheckRequest) -> Delivered | None:
        """Numbers of a freshly drawn checker; None when nobody is left or the budget is used up."""
        hub = self.desk.schedulers.line(Address(subject.opening.lease.lease.scheduler))
        for _ in range(CHECKER_TRIES):
            try:
                found = await checkers(self.desk, hub, self.ask.model, subject.opening.lease.lease.profile)
            except NetworkError as error:
                self.notes.append(f"the book could not be read: {error.message}")
                return None
            taken = {self.desk.owner_of(p) for p in (subject.provider, *(a.provider for a in self.answers))} | {
                self.desk.signer.address,
                self.desk.account.payer,
            }
            left = [c for c in found if c.address not in self.asked]
            chosen = rules.draw_checker(left, taken, self.desk.random)
            if chosen is None:
                return None
            self.asked.append(chosen)
            try:
                return await self._buy(hub, chosen, request, taken)
            except FundsError as error:
                self.notes.append(f"no check was bought: {error.message}")
                return None
            except (MatchError, JobFailed, VerificationError, NetworkError) as error:
                self.notes.append(f"checker {hex0x(chosen)} gave no answer: {error.message}")
        return None

    async def _buy(self, hub: Hub, checker: Address, request: pb.CheckRequest, owners: set[Address]) -> Delivered:
        units = _units(request)
        ask = Ask(
            alias=self.ask.alias,
            model=self.ask.model,
            task=Task.CHECK,
            request=request.SerializeToString(deterministic=True),
            units=units,
            output_units=units,
            profile=self.ask.profile,
            max_cost=None if self.budget is None else Money(max(0, self.budget - self.spent)),
            constraints=pb.Constraints(require_provider=checker, exclude_owners=sorted(owners)),
            purpose="check",
            parent=self.job,
            traceparent=self.ask.traceparent,
            scheduler=hub.address,  # which judges both
        )
        job, channel = await place(self.desk, ask)
        run = JobRun(self.desk, job, channel, Progress(plan_of(job.spec, job.request, attempts_max=1)), probability=1.0)
        run.traceparent = ask.traceparent
        try:
            async with aclosing(run.items()) as output:
                async for _ in output:
                    pass
        finally:
            self.spent += run.billed
        return self.desk.journal.read(lambda c: delivered(c, job.job))


def _check_request(subject: Delivered, drawn: tuple[int, ...]) -> pb.CheckRequest:
    """What a checker gets: the drawn inputs or rows, or prompt and answer with every attempt's seed."""
    if drawn:
        raw = subject.opening.request
        tensors = subject.opening.order.spec.task == pb.TASK_INFER
        return rules.check_of(parse(pb.TensorRequest, raw) if tensors else parse(pb.EmbedRequest, raw), drawn)
    return pb.CheckRequest(
        generate=parse(pb.GenerateRequest, subject.opening.request),
        output=[int.from_bytes(item, "little") for item in subject.output],
        segments=subject.segments,
    )


def _units(request: pb.CheckRequest) -> int:
    if request.embed.inputs:
        return sum(len(i.ids) for i in request.embed.inputs)
    if request.HasField("infer"):
        return max(1, request.infer.rows)
    return len(request.generate.prompt) + len(request.output)

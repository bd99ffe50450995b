"""One job under random histories of leases, claims, retries, acks, verdicts and time: what it moves is counted in two channels beside it.

The pure lifecycle is driven as the ledger drives it. The model knows what the client acked and what each attempt's provider holds of it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import scheduler_jobs as kit
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulation.profiles import EXAMPLES, EXAMPLES_ALL, run

from gpumarket.core.errors import GpumarketError
from gpumarket.core.terms import Ack, Outcome
from gpumarket.core.units import Address, Hash
from gpumarket.scheduler import lifecycle as life
from gpumarket.scheduler.jobs import Attempt, AttemptState, Job, charged
from gpumarket.scheduler.moves import move_hub, move_spoke
from gpumarket.settlement.channel import PaidChannel, ReceivedChannel, ReceiveVoucher, check, handle
from gpumarket.settlement.pricing import attempt_amount

UNITS = st.integers(0, kit.UNITS)


class LifecycleMachine(RuleBasedStateMachine):
    """The job, its client's channel, its providers' channel."""

    @initialize()
    def begin(self) -> None:
        self.now = kit.NOW
        hub = ReceivedChannel(Hash(b"c" * 32), Address(bytes(20)), 10**6, 10**9)
        self.hub = handle(hub, ReceiveVoucher(10**5, b"s" * 65))
        self.spoke = PaidChannel(Hash(b"s" * 32), kit.PROVIDER, 10**6, 10**9)
        spec = kit.spec_of()
        self.job = Job(spec.key, spec, b"", Hash(b"c" * 32), self.now)
        self.apply(life.grant(self.job, kit.next_attempt(self.job), until=0))
        self.acked: dict[int, Ack] = {}
        self.rejected: set[int] = set()

    def apply(self, change: life.Change) -> None:
        """As `Ledger.apply`: all moves, or none."""
        job, moves = change
        hub, spoke = self.hub, self.spoke
        for move in moves:
            if isinstance(move, life.Move):
                if move.attempt is None:
                    hub = move_hub(hub, move)
                else:
                    spoke = move_spoke(spoke, move)
        self.job, self.hub, self.spoke = job, hub, spoke

    # --- the client ------------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.job.newest.state is AttemptState.OPEN)
    @rule(units=UNITS, complete=st.booleans(), will_check=st.booleans())
    def client_acks(self, units: int, complete: bool, will_check: bool) -> None:
        number = len(self.job.attempts)
        last = self.acked.get(number)
        if last is not None and (last.complete or units < last.units):
            return
        rest = kit.UNITS - self.job.newest.lease.prefix_units
        units = rest if complete else min(units, rest)
        self.acked[number] = kit.ack_of(self.job, units, complete=complete, will_check=complete and will_check, attempt=number)

    @rule(truth=st.booleans(), reason=st.sampled_from(["lost", "failed", "bad-output", "client-restart"]))
    def client_retries(self, truth: bool, reason: str) -> None:
        """`Billing.retry`, with the last ack or, from a liar, none."""
        number = len(self.job.attempts)
        ack = self.acked.get(number) if truth else None
        try:
            life.may_retry(self.job, number)
            units, _ = life.next_prefix(self.job, number, ack, reason)
            self.apply(life.close(self.job, number, ack, b"a" if ack else b"", reason, self.now, kit.CHECK))
            if self.now < self.job.spec.deadline and units < kit.UNITS:
                self.apply(life.grant(self.job, kit.next_attempt(self.job, units), until=0))
        except GpumarketError:
            return

    @rule(number=st.integers(1, 3))
    def client_accepts(self, number: int) -> None:
        if number <= len(self.job.attempts):
            self.apply(life.accept(self.job, number))

    @rule(number=st.integers(1, 3))
    def two_checks_reject(self, number: int) -> None:
        if number > len(self.job.attempts):
            return
        if self.job.attempt(number).state is AttemptState.OWED:
            with pytest.raises(GpumarketError):
                life.reject(self.job, number, "two checks")
            return
        self.apply(life.reject(self.job, number, "two checks"))
        self.rejected.add(number)

    @rule(number=st.integers(1, 3))
    def one_check_suspects(self, number: int) -> None:
        if number <= len(self.job.attempts):
            self.apply(life.suspect(self.job, number, self.now + kit.CHECK))

    # --- the provider ----------------------------------------------------------------------------------------------------------

    @rule(number=st.integers(1, 3), held=st.booleans(), outcome=st.sampled_from([Outcome.COMPLETED, Outcome.CANCELLED, Outcome.FAILED]))
    def provider_claims(self, number: int, held: bool, outcome: Outcome) -> None:
        """`Billing.claim`: with the ack that it holds, or without one that was lost on the way; again and again."""
        if number > len(self.job.attempts):
            return
        ack = self.acked.get(number) if held else None
        attempt = self.job.attempt(number)
        units = ack.units if ack is not None else 0
        sent = kit.UNITS - attempt.lease.prefix_units if outcome is Outcome.COMPLETED else units
        receipt = replace(kit.receipt_of(self.job, sent, outcome), lease=attempt.hash)
        raw = b"r", b"a" if ack is not None else b""
        if ack is not None:
            self.apply(life.raise_to(self.job, number, ack, raw[1], self.now, kit.CHECK, kit.GRACE))
        self.apply(life.claim(self.job, number, receipt, ack, raw, self.now, kit.CHECK))

    @rule(seconds=st.sampled_from([1, 30, 61, 200, 700]))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds
        self.apply(life.due(self.job, self.now, kit.GRACE))

    # --- what must hold --------------------------------------------------------------------------------------------------------

    @invariant()
    def channels_are_what_the_job_moved(self) -> None:
        if not hasattr(self, "job"):
            return
        check(self.hub)
        check(self.spoke)
        held = [a for a in self.job.attempts if a.state is AttemptState.HELD]
        owed = [a for a in self.job.attempts if a.state is AttemptState.OWED]
        assert (self.hub.open, self.hub.held) == (self.job.open, sum(map(charged, held)))
        assert self.hub.used == sum(map(charged, owed)), "I5: each attempt is paid once"
        assert self.spoke.vouchered == sum(a.amount for a in owed), "I5: each attempt is paid once"
        reserved = sum(a.lease.maximum for a in self.job.attempts if a.state is AttemptState.OPEN) + sum(a.amount for a in held)
        assert self.spoke.reserved == reserved, "I1: what is reserved is what may still be paid"

    @invariant()
    def job_never_costs_more_than_its_maximum(self) -> None:
        if hasattr(self, "job"):
            assert self.job.spent + self.job.open <= self.job.spec.max_amount, "I4"
            assert all(a.amount <= a.lease.maximum for a in self.job.attempts)
            assert [a.state for a in self.job.attempts[:-1]].count(AttemptState.OPEN) == 0, "only the newest attempt is open"

    @invariant()
    def rejected_work_is_never_paid(self) -> None:
        if hasattr(self, "job"):
            for number in self.rejected:
                attempt: Attempt = self.job.attempt(number)
                assert (attempt.state, attempt.amount) == (AttemptState.REJECTED, 0)

    def teardown(self) -> None:
        """I6: time alone ends it; nothing stays open, held or reserved, and `next_due` says when to look."""
        if not hasattr(self, "job"):
            return
        for _ in range(50):
            when = life.next_due(self.job, kit.GRACE)
            if not when:
                break
            self.now = max(self.now, when)
            self.apply(life.due(self.job, self.now, kit.GRACE))
        assert life.finished(self.job), f"I6: {self.job.state.name} {[(a.state.name, a.hold_until) for a in self.job.attempts]}"
        assert (self.hub.open, self.hub.held, self.spoke.reserved) == (0, 0, 0)
        for number, attempt in enumerate(self.job.attempts, start=1):
            ack = self.acked.get(number)
            if attempt.state is AttemptState.OWED and ack is not None and attempt.ack == b"a":
                most = attempt_amount(attempt.lease, prompt_units=kit.UNITS, units=max(ack.units, attempt.units), complete=True)
                assert attempt.amount <= most, "I7"


@pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(EXAMPLES_ALL, marks=[pytest.mark.slow, pytest.mark.timeout(3_600)])])
def test_lifecycle_random_histories_pay_once_and_end(examples: int) -> None:
    run(LifecycleMachine, examples)

"""A job's state machine: what each event earns, moves and refuses; money is conserved whatever comes in whatever order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_jobs import CHECK, GRACE, MOST, NOW, PROVIDER, UNITS, ack_of, claim, leased, next_attempt

from gpumarket.core.errors import OutOfFunds, ProtocolError
from gpumarket.core.terms import Outcome
from gpumarket.core.units import ZERO_HASH, Money
from gpumarket.scheduler import lifecycle as life
from gpumarket.scheduler.lifecycle import AttemptState, Change, Job, JobState, Judge, Move, Understated
from gpumarket.scheduler.reputation import Deed


class Books:
    """Both channels of a job, as the instructions move them."""

    def __init__(self) -> None:
        self.open = self.held = self.used = self.reserved = self.paid = 0

    def take(self, change: Change) -> Job:
        job, moves = change
        for move in moves:
            if not isinstance(move, Move):
                continue
            self._move(move)
            assert min(self.open, self.held, self.used, self.reserved, self.paid) >= 0, move
        assert self.open == job.open
        assert self.held == sum(life.charged(a) for a in job.attempts if a.state is AttemptState.HELD)
        assert self.used == sum(life.charged(a) for a in job.attempts if a.state is AttemptState.OWED)
        assert self.paid == sum(a.amount for a in job.attempts if a.state is AttemptState.OWED)
        assert self.open + self.held + self.used <= job.spec.max_amount
        opened = sum(a.lease.maximum for a in job.attempts if a.state is AttemptState.OPEN)
        assert self.reserved == opened + sum(a.amount for a in job.attempts if a.state is AttemptState.HELD)
        return job

    def _move(self, move: Move) -> None:
        source, target = move.side.value.split(" to ")
        names = {"vouchered": "paid", "free": ""}
        if move.attempt is None:
            names = {"free": ""}
        for name, sign in ((source, -1), (target, 1)):
            known = names.get(name, name)
            if known:
                setattr(self, known, getattr(self, known) + sign * move.amount)


def test_complete_claim_without_check_is_owed_and_frees_the_rest() -> None:
    books = Books()
    job = books.take(leased())
    job = books.take(claim(job, ack_of(job, UNITS, complete=True)))
    assert (job.state, job.newest.state, job.newest.amount) == (JobState.COMPLETED, AttemptState.OWED, 1_000)
    assert (books.open, books.used, books.paid, books.reserved) == (0, 1_010, 1_000, 0)


def test_claim_with_check_is_held_until_accepted() -> None:
    books = Books()
    job = books.take(leased())
    job = books.take(claim(job, ack_of(job, UNITS, complete=True, will_check=True)))
    assert (job.state, job.newest.state) == (JobState.CHECKING, AttemptState.HELD)
    job = books.take(life.accept(job, 1))
    assert (job.state, books.paid) == (JobState.COMPLETED, 1_000)
    assert life.accept(job, 1)[1] == []


def test_acceptance_before_the_claim_is_remembered() -> None:
    books = Books()
    job = books.take(leased())
    job = books.take(life.accept(job, 1))
    job = books.take(claim(job, ack_of(job, UNITS, complete=True, will_check=True)))
    assert job.newest.state is AttemptState.OWED


def test_claim_within_a_window_of_the_end_counts_as_complete_but_is_held() -> None:
    books = Books()
    job = books.take(leased())
    job = books.take(claim(job, ack_of(job, UNITS - 16)))
    assert (job.state, job.newest.state, job.newest.amount) == (JobState.DELIVERED, AttemptState.HELD, 840)
    job = books.take(life.due(job, NOW + CHECK, GRACE))
    assert (job.state, books.paid) == (JobState.COMPLETED, 840)


def test_cancelled_claim_pays_the_acked_part_and_keeps_the_job_open() -> None:
    books = Books()
    job = books.take(leased())
    job = books.take(claim(job, ack_of(job, 30), units=40, outcome=Outcome.CANCELLED))
    assert (job.state, job.newest.state, job.open) == (JobState.LEASED, AttemptState.HELD, MOST - 303)
    job = books.take(life.due(job, job.spec.deadline + GRACE, GRACE))
    assert (job.state, books.open, books.paid) == (JobState.CANCELLED, 0, 300)


def test_claim_with_nothing_acked_earns_nothing() -> None:
    books = Books()
    job = books.take(leased())
    job = books.take(claim(job, None, units=0, outcome=Outcome.FAILED))
    assert (job.newest.state, books.reserved, books.paid) == (AttemptState.CLOSED, 0, 0)


def test_failed_outcome_is_blamed_on_the_provider() -> None:
    _, moves = claim(leased()[0], None, units=0, outcome=Outcome.FAILED)
    assert Judge(PROVIDER, Deed.FAILED) in moves


def test_client_restart_blames_nobody() -> None:
    _, moves = life.close(leased()[0], 1, None, b"", "client-restart", NOW, CHECK)
    assert Judge(PROVIDER, Deed.BLAMELESS) in moves


def test_leaving_before_the_claim_ends_the_job_and_keeps_only_what_that_claim_may_still_show() -> None:
    books = Books()
    job = books.take(leased())
    job = books.take(life.leave(job, 1, ack_of(job, 30), b"", NOW, CHECK))
    assert (job.state, job.newest.state, job.newest.units) == (JobState.CANCELLED, AttemptState.HELD, 30)
    assert books.open > 0, "its provider may show a higher ack"
    job = books.take(claim(job, ack_of(job, 30), units=40, outcome=Outcome.CANCELLED))
    assert (books.open, books.held) == (0, 303)
    job = books.take(life.due(job, NOW + CHECK, GRACE))
    assert (job.state, books.paid, life.finished(job)) == (JobState.CANCELLED, 300, True)


def test_leaving_after_the_claim_frees_the_rest_at_once_and_blames_nobody() -> None:
    books = Books()
    job = books.take(leased())
    job = books.take(claim(job, ack_of(job, 30), units=40, outcome=Outcome.CANCELLED))
    job, moves = life.leave(job, 1, ack_of(job, 30), b"", NOW, CHECK)
    job = books.take((job, moves))
    assert (job.state, books.open, books.held) == (JobState.CANCELLED, 0, 303)
    assert not [move for move in moves if isinstance(move, Judge)]
    assert life.leave(job, 1, None, b"", NOW, CHECK) == (job, [])
    with pytest.raises(ProtocolError, match="ended"):
        life.may_retry(job, 1)


def test_leaving_a_provider_that_shows_a_higher_ack_pays_it_by_that() -> None:
    books = Books()
    job = books.take(leased())
    job = books.take(life.leave(job, 1, ack_of(job, 30), b"", NOW, CHECK))
    job = books.take(show(job, 1, 50, NOW))
    assert (job.state, job.newest.units, job.newest.amount) == (JobState.CANCELLED, 50, 500)


def test_leaving_a_job_that_was_completed_meanwhile_changes_nothing() -> None:
    books = Books()
    job = books.take(leased())
    job = books.take(claim(job, ack_of(job, UNITS - 16)))
    assert life.leave(job, 1, ack_of(job, UNITS - 16), b"", NOW, CHECK) == (job, [])


def test_retry_with_an_unknown_reason_is_refused() -> None:
    with pytest.raises(ProtocolError, match="no reason"):
        life.close(leased()[0], 1, None, b"", "because", NOW, CHECK)


def test_rejection_returns_everything_and_ends_the_job() -> None:
    books = Books()
    job = books.take(leased())
    job = books.take(claim(job, ack_of(job, UNITS, complete=True, will_check=True)))
    job = books.take(life.reject(job, 1, "differs"))
    assert (job.state, job.newest.state) == (JobState.REJECTED, AttemptState.REJECTED)
    assert (books.open, books.held, books.used, books.reserved, books.paid) == (0, 0, 0, 0, 0)
    assert life.reject(job, 1, "differs")[1] == [], "a rejection twice jails once"


def test_rejection_of_what_is_owed_is_refused() -> None:
    job = claim(leased()[0], ack_of(leased()[0], UNITS, complete=True))[0]
    with pytest.raises(ProtocolError, match="owed already"):
        life.reject(job, 1, "late")


def test_rejection_before_the_claim_leaves_nothing_to_claim() -> None:
    books = Books()
    job = books.take(leased())
    job = books.take(life.reject(job, 1, "differs"))
    job = books.take(claim(job, ack_of(job, UNITS, complete=True)))
    assert (job.newest.state, books.paid) == (AttemptState.REJECTED, 0)


def test_second_attempt_while_the_first_is_open_is_refused() -> None:
    job = leased()[0]
    with pytest.raises(ProtocolError, match="still open"):
        life.grant(job, next_attempt(job), until=0)


def test_attempt_number_that_does_not_follow_is_refused() -> None:
    job = life.close(leased()[0], 1, None, b"", "lost", NOW, CHECK)[0]
    attempt = next_attempt(job)
    odd = replace(attempt, lease=replace(attempt.lease, attempt=5))
    with pytest.raises(ProtocolError, match="does not follow"):
        life.grant(job, odd, until=0)


def test_retry_of_an_older_attempt_is_refused() -> None:
    job = life.close(leased()[0], 1, None, b"", "lost", NOW, CHECK)[0]
    job = life.grant(job, next_attempt(job), until=0)[0]
    with pytest.raises(ProtocolError, match="not the newest"):
        life.may_retry(job, 1)


def test_retry_after_the_job_lapsed_is_refused() -> None:
    job = life.due(leased()[0], NOW + 10_000, GRACE)[0]
    assert job.state is JobState.EXPIRED
    with pytest.raises(ProtocolError, match="ended"):
        life.may_retry(job, 1)


def test_retry_with_everything_spent_is_refused() -> None:
    job, _ = claim(leased()[0], ack_of(leased()[0], UNITS, complete=True))
    poor = replace(job, spec=replace(job.spec, max_amount=Money(1_010)))
    with pytest.raises(OutOfFunds):
        life.may_retry(poor, 1)


def test_prefix_of_the_next_attempt_is_what_the_client_holds() -> None:
    job = leased()[0]
    ack = ack_of(job, 30)
    assert life.next_prefix(job, 1, ack, "lost") == (30, ack.output_hash)
    assert life.next_prefix(job, 1, ack, "bad-output") == (0, ZERO_HASH)
    assert life.next_prefix(job, 1, None, "lost") == (0, ZERO_HASH)


def show(job: Job, number: int, units: int, now: int = NOW, *, complete: bool = False) -> Change:
    """A claim's higher ack, as billing takes it."""
    return life.raise_to(job, number, ack_of(job, units, complete=complete, attempt=number), b"higher", now, CHECK, GRACE)


def caught_up(job: Job, units: int) -> Change:
    """A retry's ack, as billing takes it before the attempt is closed."""
    return life.catch_up(job, len(job.attempts), ack_of(job, units), b"higher", NOW, CHECK)


def retried(books: Books, closing_units: int) -> Job:
    """Attempt 1 closed by its client at `closing_units`, attempt 2 open."""
    job = books.take(leased())
    ack = ack_of(job, closing_units) if closing_units else None
    job = books.take(life.close(job, 1, ack, b"closing", "lost", NOW, CHECK))
    return books.take(life.grant(job, next_attempt(job, closing_units), until=0))


@pytest.mark.parametrize("closing", [0, 10])
def test_higher_ack_after_a_retry_is_paid_once_the_next_attempt_has_ended(closing: int) -> None:
    books = Books()
    job = books.take(show(retried(books, closing), 1, 90))
    assert (job.attempts[0].state, job.attempts[0].amount) == (AttemptState.HELD, 10 * closing)
    job = books.take(life.due(job, NOW + CHECK, GRACE))
    assert job.attempts[0].state is AttemptState.HELD, "not owed by time while more may come"
    job = books.take(claim(job, ack_of(job, UNITS - closing, complete=True), UNITS - closing, number=2))
    assert job.attempts[1].state is AttemptState.OWED
    assert books.open > 0, "what the first attempt is still owed is not released"
    job = books.take(show(job, 1, 90))
    job = books.take(claim(job, ack_of(job, 90, attempt=1), number=1))
    assert (job.attempts[0].amount, books.open) == (900, 0)
    job = books.take(life.due(job, NOW + CHECK, GRACE))
    assert books.paid == 900 + 10 * (UNITS - closing)
    assert life.finished(job)


def test_rest_is_kept_until_the_closed_attempts_provider_has_claimed_or_its_hold_is_over() -> None:
    books = Books()
    job = retried(books, 0)
    job = books.take(claim(job, ack_of(job, UNITS, complete=True), number=2))
    assert books.open == MOST - 1_010, "the first provider may yet show what it holds"
    shown = books.take(claim(books.take(show(job, 1, 90)), ack_of(job, 90, attempt=1), number=1))
    assert (shown.attempts[0].amount, books.open) == (900, 0)
    books.open, books.held, books.reserved = job.open, 0, 0
    job = books.take(life.due(job, life.next_due(job, GRACE), GRACE))
    assert (job.attempts[0].state, books.open) == (AttemptState.EXPIRED, 0)


def test_higher_ack_never_passes_what_is_left_of_the_order() -> None:
    books = Books()
    job = leased()[0]
    job = replace(job, spec=replace(job.spec, max_amount=Money(1_500)), open=1_500)
    books.open, books.reserved = job.open, job.newest.lease.maximum
    job = books.take(life.close(job, 1, None, b"", "lost", NOW, CHECK))
    job = books.take(life.grant(job, next_attempt(job), until=0))
    job = books.take(show(job, 1, 90))
    job = books.take(claim(job, ack_of(job, UNITS, complete=True), number=2))
    job = books.take(show(job, 1, 90))
    assert job.attempts[0].amount == 486, "1500 - 1010, less the fee"
    job = books.take(life.due(job, NOW + CHECK, GRACE))
    assert life.finished(job)


def test_higher_ack_counts_against_the_client_once() -> None:
    job, moves = show(retried(Books(), 10), 1, 90)
    assert Understated() in moves
    assert Understated() not in show(job, 1, 90)[1]
    assert Understated() not in show(retried(Books(), 10), 1, 10)[1]


def test_higher_ack_after_the_claim_grace_is_too_late() -> None:
    job = retried(Books(), 10)
    assert show(job, 1, 90, job.spec.deadline + GRACE) == (job, [])


def test_higher_ack_of_an_attempt_that_its_provider_claimed_itself_changes_nothing() -> None:
    job, _ = claim(leased()[0], ack_of(leased()[0], 30), units=40, outcome=Outcome.CANCELLED)
    assert show(job, 1, 90) == (job, [])


def test_retry_with_an_ack_that_its_provider_never_got_raises_the_claim() -> None:
    books = Books()
    job = books.take(leased())
    job = books.take(claim(job, ack_of(job, 30), units=40, outcome=Outcome.CANCELLED))
    job = books.take(caught_up(job, 40))
    assert (job.newest.state, job.newest.amount, books.held) == (AttemptState.HELD, 400, 404)
    assert job.newest.hold_until == NOW + CHECK, "a client's word does not delay what is held"
    job = books.take(life.close(job, 1, ack_of(job, 40), b"", "lost", NOW, CHECK))
    job = books.take(life.grant(job, next_attempt(job, 40), until=0))
    job = books.take(claim(job, ack_of(job, 60, complete=True), 60, number=2))
    job = books.take(life.due(job, NOW + CHECK, GRACE))
    assert (books.paid, books.open) == (1_000, 0), "every unit is paid for once, whoever delivered it"


def test_retry_with_a_higher_ack_after_the_hold_is_owed_at_once() -> None:
    books = Books()
    job = books.take(leased())
    job = books.take(claim(job, ack_of(job, 30), units=40, outcome=Outcome.CANCELLED))
    job = books.take(life.due(job, NOW + CHECK, GRACE))
    assert (job.newest.state, books.paid) == (AttemptState.OWED, 300)
    job = books.take(caught_up(job, 40))
    assert (job.newest.state, books.paid, books.used, books.held) == (AttemptState.OWED, 400, 404, 0)


def test_retry_with_the_only_ack_of_a_closed_claim_holds_it() -> None:
    books = Books()
    job = books.take(leased())
    job = books.take(claim(job, None, units=8, outcome=Outcome.CANCELLED))
    assert job.newest.state is AttemptState.CLOSED
    job = books.take(caught_up(job, 8))
    assert (job.newest.state, books.held) == (AttemptState.HELD, 80)
    assert job.newest.hold_until == NOW + CHECK
    job = books.take(life.due(job, NOW + CHECK, GRACE))
    assert books.paid == 80


def test_retry_never_lowers_a_claim_and_never_passes_its_lease() -> None:
    job = claim(leased()[0], ack_of(leased()[0], 30), units=40, outcome=Outcome.CANCELLED)[0]
    assert caught_up(job, 30) == (job, [])
    assert caught_up(job, 10) == (job, [])
    assert caught_up(job, 10**6)[0].newest.amount == job.newest.lease.maximum
    complete = claim(leased()[0], ack_of(leased()[0], UNITS, complete=True))[0]
    assert caught_up(complete, UNITS + 1) == (complete, [])


def test_higher_ack_is_paid_though_the_next_attempt_is_never_claimed() -> None:
    books = Books()
    job = books.take(show(retried(books, 10), 1, 90))
    over = job.spec.deadline + GRACE
    job = books.take(life.due(job, over, GRACE))
    assert (job.state, job.newest.state, books.open) == (JobState.EXPIRED, AttemptState.EXPIRED, 809), "800 and its fee, rounded up"
    assert life.next_due(job, GRACE) == over + GRACE
    job = books.take(show(job, 1, 90, over + 1))
    assert job.attempts[0].amount == 900
    job = books.take(life.due(job, over + GRACE, GRACE))
    assert (books.paid, books.open) == (900, 0)


def test_rejected_job_that_keeps_money_for_a_shown_ack_is_due_twice_and_no_more() -> None:
    books = Books()
    job = books.take(show(retried(books, 55), 1, 67))
    job = books.take(claim(job, ack_of(job, 26, complete=True, will_check=True), 26, number=2))
    job = books.take(life.reject(job, 2, "differs"))
    over = job.spec.deadline + GRACE
    assert life.next_due(job, GRACE) == over
    job = books.take(life.due(job, over, GRACE))
    assert books.open == 122, "120 and its fee, rounded up: what the shown ack lacks"
    assert life.next_due(job, GRACE) == over + GRACE, "the same time again would be due for ever"
    assert life.due(job, over, GRACE)[0] is job
    job = books.take(life.due(job, over + GRACE, GRACE))
    assert (books.open, life.next_due(job, GRACE), life.finished(job)) == (0, 0, True)


def test_retry_below_an_ack_that_was_claimed_is_refused() -> None:
    job = claim(leased()[0], ack_of(leased()[0], 60), units=90, outcome=Outcome.CANCELLED)[0]
    with pytest.raises(ProtocolError, match="60 units"):
        life.close(job, 1, ack_of(job, 10), b"", "lost", NOW, CHECK)


def test_completion_by_the_providers_word_alone_ends_with_the_clients_retry() -> None:
    books = Books()
    job = books.take(leased())
    job = books.take(claim(job, None, units=10))
    assert (job.state, job.newest.state) == (JobState.DELIVERED, AttemptState.HELD)
    job = books.take(life.close(job, 1, None, b"", "lost", NOW, CHECK))
    assert (job.newest.state, books.held, books.reserved) == (AttemptState.CLOSED, 0, 0)
    job = books.take(life.grant(job, next_attempt(job), until=0))
    assert job.newest.lease.maximum == 1_000


def test_hold_is_prolonged_by_one_check_once() -> None:
    job = claim(leased()[0], ack_of(leased()[0], UNITS, complete=True, will_check=True))[0]
    job = life.suspect(job, 1, NOW + 2 * CHECK)[0]
    assert job.newest.hold_until == NOW + 2 * CHECK
    assert life.suspect(job, 1, NOW + 9 * CHECK) == (job, [])


def test_retries_of_one_job_end() -> None:
    job = leased()[0]
    for number in range(1, life.ATTEMPTS_MAX):
        job = life.close(job, number, None, b"", "lost", NOW, CHECK)[0]
        life.may_retry(job, number)
        job = life.grant(job, next_attempt(job), until=0)[0]
    with pytest.raises(ProtocolError, match="more are not made"):
        life.may_retry(job, life.ATTEMPTS_MAX)


def test_attempt_that_was_never_leased_is_refused() -> None:
    with pytest.raises(ProtocolError, match="no attempt"):
        leased()[0].attempt(2)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["claim", "retry", "leave", "accept", "reject", "suspect", "tick", "late claim", "higher ack"]),
        st.integers(0, UNITS),
        st.booleans(),
        st.booleans(),
        st.sampled_from(list(Outcome)),
    ),
    max_size=14,
)


@settings(max_examples=300, deadline=None)
@given(EVENTS)
def test_any_sequence_of_events_conserves_money_and_ends(events: list[tuple[str, int, bool, bool, Outcome]]) -> None:
    books, now = Books(), NOW
    job = books.take(leased())
    for kind, units, complete, will_check, outcome in events:
        newest = len(job.attempts)
        ack = ack_of(job, units, complete=complete, will_check=complete and will_check)
        try:
            if kind == "claim":
                job = books.take(claim(job, ack, units, outcome, number=newest))
            elif kind == "late claim":
                job = books.take(claim(job, ack, units, outcome, number=1))
            elif kind == "higher ack":
                job = books.take(show(job, max(1, newest - 1), units, now, complete=complete))
            elif kind == "accept":
                job = books.take(life.accept(job, newest))
            elif kind == "suspect":
                job = books.take(life.suspect(job, newest, now + CHECK))
            elif kind == "reject":
                job = books.take(life.reject(job, newest, "differs"))
            elif kind == "leave":
                job = books.take(life.leave(job, newest, ack, b"", now, CHECK))
            elif kind == "tick":
                now += units * 10
                job = books.take(life.due(job, now, GRACE))
            else:
                life.may_retry(job, newest)
                job = books.take(life.catch_up(job, newest, ack, b"", now, CHECK))
                job = books.take(life.close(job, newest, ack, b"", "lost", now, CHECK))
                prefix = min(UNITS - 1, life.next_prefix(job, newest, ack, "lost")[0])
                job = books.take(life.grant(job, next_attempt(job, prefix), until=0))
        except (ProtocolError, OutOfFunds):
            continue
    job = books.take(life.due(job, job.spec.deadline + GRACE, GRACE))
    last = 0
    while (at := life.next_due(job, GRACE)) != 0:
        assert at > last, "due again at a time that was carried out"
        last, before = at, job
        job = books.take(life.due(job, at, GRACE))
        assert job is not before, "a timer with nothing to do"
    assert life.finished(job)
    assert job.state not in (JobState.LEASED, JobState.DELIVERED, JobState.CHECKING)
    assert books.held == books.open == books.reserved == 0
    assert life.next_due(job, GRACE) == 0


def test_suspicion_of_an_earlier_attempt_leaves_the_money_of_the_running_one() -> None:
    """A client that called a whole answer bad, ordered it elsewhere and then doubts the first: the second is paid all the same."""
    job, _ = leased()
    job, _ = life.close(job, 1, ack_of(job, UNITS, complete=True, will_check=True), b"a", "bad-output", NOW, CHECK)
    job, _ = life.grant(job, next_attempt(job), until=0)
    kept = job.open
    job, _ = life.suspect(job, 1, NOW + CHECK)
    job, _ = life.due(job, NOW + 30, GRACE)
    assert (job.state, job.open) == (JobState.LEASED, kept)
    job, _ = claim(job, ack_of(job, UNITS, complete=True, attempt=2), number=2)
    assert job.attempt(2).state is AttemptState.OWED

"""The client's session machine: whatever peers send, no item twice, no ack too far, money only for what was acked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdk_terms import DEADLINE, NOW, a_hash, lease, receipt, rows_plan, text_plan

from gpumarket.core.errors import ProtocolError
from gpumarket.core.terms import Outcome, output_chain, token_item
from gpumarket.core.units import Hash
from gpumarket.sdk.job_plan import JobPlan
from gpumarket.sdk.session import (
    AttemptFailed,
    ClientLeaves,
    Conclude,
    Event,
    FinishedReceived,
    FrameReceived,
    GiveUp,
    Instruction,
    LeaseReceived,
    Leave,
    Phase,
    Progress,
    Record,
    RetryElsewhere,
    StartedReceived,
    StreamIdle,
    handle,
    restored,
)

NONCE = a_hash("nonce")


def started(plan: JobPlan) -> Progress:
    progress, _ = handle(Progress(plan), LeaseReceived(lease(plan.spec)))
    progress, _ = handle(progress, StartedReceived(1, NONCE))
    return progress


def frame(start: int, tokens: list[int], attempt: int = 1) -> FrameReceived:
    return FrameReceived(attempt, tuple(token_item(t) for t in tokens), start + len(tokens))


def whole_text(progress: Progress, total: int, *, will_check: bool = False) -> tuple[Progress, list[Instruction]]:
    tokens = list(range(10, 10 + total))
    progress, steps = handle(progress, frame(0, tokens))
    finished = receipt(progress, units=total, output_hash=output_chain(token_item(t) for t in tokens))
    progress, more = handle(progress, FinishedReceived(1, finished, "length", will_check, NOW))
    return progress, steps + more


def test_session_whole_answer_holds_the_last_item_back_until_the_receipt() -> None:
    progress, steps = whole_text(started(text_plan(6)), 6, will_check=True)
    record, conclude = steps
    assert isinstance(record, Record)
    assert len(record.items) == 5
    assert isinstance(conclude, Conclude)
    assert len(conclude.items) == 1
    assert (conclude.ack.units, conclude.ack.complete, conclude.ack.will_check) == (6, True, True)
    assert progress.phase is Phase.DELIVERED
    # 6 output tokens at 2, 10 prompt tokens at 1 per million, 1 % fee, all in base units
    assert progress.billed == (6 * 2 + 10) * 10**12 * 101 // 100


@pytest.mark.parametrize(
    "event",
    [
        frame(0, []),
        frame(1, [5]),
        frame(-1, [5]),
        FrameReceived(1, (b"\1\2\3",), 1),
        frame(0, list(range(13))),
        StartedReceived(1, NONCE),
    ],
    ids=["empty", "gap", "repeated", "no-token", "too-many", "second-start"],
)
def test_session_bad_message_ends_the_attempt_and_delivers_nothing(event: Event) -> None:
    progress, steps = handle(started(text_plan()), event)
    (retry,) = steps
    assert isinstance(retry, RetryElsewhere)
    assert (retry.end.reason, retry.end.amount, retry.ack) == ("bad-output", 0, None)
    assert progress.items == 0


def test_session_frame_before_started_ends_the_attempt() -> None:
    progress, _ = handle(Progress(text_plan()), LeaseReceived(lease(text_plan().spec)))
    _, (retry,) = handle(progress, frame(0, [1]))
    assert isinstance(retry, RetryElsewhere)


def test_session_tokens_after_a_stop_token_end_the_attempt() -> None:
    plan = replace(text_plan(), stop_tokens=frozenset({9}))
    _, (retry,) = handle(started(plan), frame(0, [9, 5]))
    assert isinstance(retry, RetryElsewhere)
    progress, _ = handle(started(plan), frame(0, [5, 9]))
    _, (retry,) = handle(progress, frame(2, [6]))
    assert isinstance(retry, RetryElsewhere)
    assert retry.end.units == 1


@pytest.mark.parametrize("field", ["lease", "nonce", "request_hash", "output_hash", "prefix_hash"])
def test_session_receipt_with_another_hash_is_bad_output(field: str) -> None:
    progress, _ = handle(started(text_plan(3)), frame(0, [1, 2, 3]))
    bent: dict[str, Any] = {field: a_hash("wrong")}
    good = receipt(progress, units=3, output_hash=output_chain(token_item(t) for t in (1, 2, 3)))
    _, (retry,) = handle(progress, FinishedReceived(1, replace(good, **bent), "", False, NOW))
    assert isinstance(retry, RetryElsewhere)
    assert retry.end.reason == "bad-output"
    assert field in retry.end.detail
    assert retry.end.units == 2


def test_session_receipt_of_an_unfinished_answer_is_bad_output() -> None:
    progress, _ = handle(started(text_plan(5)), frame(0, [1, 2]))
    early = receipt(progress, units=2, output_hash=output_chain(token_item(t) for t in (1, 2)))
    _, (retry,) = handle(progress, FinishedReceived(1, early, "stop", False, NOW))
    assert isinstance(retry, RetryElsewhere)
    _, (retry,) = handle(progress, FinishedReceived(1, replace(early, outcome=Outcome.REFUSED), "", False, NOW))
    assert isinstance(retry, RetryElsewhere)
    assert retry.end.reason == "refused"


def test_session_lease_that_does_not_continue_is_refused() -> None:
    progress, _ = handle(started(text_plan()), frame(0, [1, 2]))
    progress, _ = handle(progress, AttemptFailed(1, "lost", "", NOW))
    spec = progress.plan.spec
    for wrong in (
        lease(spec, attempt=2),
        lease(spec, attempt=3, prefix_units=2, prefix_hash=progress.output_hash),
        lease(spec, attempt=2, prefix_units=2, prefix_hash=a_hash("other")),
    ):
        with pytest.raises(ProtocolError):
            handle(progress, LeaseReceived(wrong))
    progress, _ = handle(progress, LeaseReceived(lease(spec, attempt=2, prefix_units=2, prefix_hash=progress.output_hash)))
    assert progress.phase is Phase.LEASED


def test_session_events_of_an_ended_attempt_change_nothing() -> None:
    progress, _ = handle(started(text_plan()), AttemptFailed(1, "lost", "", NOW))
    for event in (frame(0, [1]), AttemptFailed(1, "lost", "", NOW), StreamIdle(1), ClientLeaves(1), StartedReceived(1, NONCE)):
        assert handle(progress, event) == (progress, [])


def test_session_gives_up_after_its_attempts_or_at_its_deadline() -> None:
    _, (step,) = handle(started(text_plan(attempts=1)), AttemptFailed(1, "lost", "", NOW))
    assert isinstance(step, GiveUp)
    _, (step,) = handle(started(text_plan()), AttemptFailed(1, "lost", "", DEADLINE - 1))
    assert isinstance(step, GiveUp)
    _, (step,) = handle(started(text_plan()), AttemptFailed(1, "lost", "", DEADLINE - 3))
    assert isinstance(step, RetryElsewhere)


def test_session_leaving_acks_what_came_and_pays_no_prompt() -> None:
    progress, _ = handle(started(text_plan()), frame(0, [1]))
    progress, (leave,) = handle(progress, ClientLeaves(1))
    assert isinstance(leave, Leave)
    assert leave.ack is not None
    assert (leave.ack.units, leave.ack.complete) == (1, False)
    assert progress.billed == 2 * 10**12 * 101 // 100


def test_session_rows_ack_before_an_item_that_no_longer_fits_the_window() -> None:
    plan = rows_plan(1, 4, 2)
    _, (record,) = handle(started(plan), FrameReceived(1, (np.zeros(2, "<f4").tobytes(),), 1))
    assert isinstance(record, Record)
    assert record.ack is not None, "window 4, 1 unacked, the next row has 4 units: without an ack both sides would wait"


def test_session_rows_must_be_finite_and_of_one_size() -> None:
    plan = rows_plan(1, 1, 1)
    row, nan = np.zeros(2, "<f4").tobytes(), np.full(2, np.nan, "<f4").tobytes()
    for items in ((nan,), (row, row + row), (b"",), (row[:3],), (row,) * 4):
        _, (retry,) = handle(started(plan), FrameReceived(1, items, len(items)))
        assert isinstance(retry, RetryElsewhere), items


@st.composite
def scripts(draw: st.DrawFn) -> tuple[int, list[tuple[str, int]]]:
    total = draw(st.integers(1, 30))
    moves = st.tuples(st.sampled_from(["frame", "frame", "frame", "repeat", "skip", "die", "idle", "finish", "late"]), st.integers(1, 6))
    return total, draw(st.lists(moves, max_size=60))


@settings(max_examples=300, deadline=None)
@given(scripts())
def test_session_never_delivers_twice_nor_acks_too_far(script: tuple[int, list[tuple[str, int]]]) -> None:
    """Frames lost, repeated, out of order, attempts dying anywhere: what is delivered is always a prefix of the one true answer."""
    total, moves = script
    truth = [token_item(100 + i) for i in range(total)]
    plan = text_plan(total, attempts=50)
    progress = Progress(plan)
    delivered: list[bytes] = []
    acked = sent = 0

    def take(event: Event) -> None:
        nonlocal progress, acked
        progress, steps = handle(progress, event)
        for step in steps:
            if isinstance(step, Record | Conclude):
                assert step.first == len(delivered)
                delivered.extend(step.items)
            if step.ack is not None:
                assert progress.lease is not None
                covered = progress.lease.prefix_units + step.ack.units
                assert acked <= covered <= len(delivered)
                assert step.ack.output_hash == output_chain(delivered[:covered])
                acked = covered

    for move, size in moves:
        if progress.phase is Phase.ORDERED:
            following = lease(plan.spec, attempt=progress.attempt + 1, prefix_units=progress.units, prefix_hash=progress.output_hash)
            take(LeaseReceived(following))
            take(StartedReceived(progress.attempt, Hash(a_hash(f"nonce {progress.attempt}"))))
            sent = progress.units
        if progress.phase is not Phase.STREAMING:
            break
        assert progress.lease is not None
        at, attempt, prefix = sent, progress.attempt, progress.lease.prefix_units
        if move in ("frame", "repeat", "skip", "late"):
            start = {"frame": at, "repeat": max(0, at - 1), "skip": at + 1, "late": at}[move]
            items = tuple(truth[start : start + size])
            if move == "late":
                attempt -= 1
            elif move == "frame":
                sent += len(items)
            if items:
                take(FrameReceived(attempt, items, start + len(items) - prefix))
        elif move == "idle":
            take(StreamIdle(attempt))
        elif move == "die":
            take(AttemptFailed(attempt, "lost", "", NOW))
        else:
            claimed = receipt(progress, units=total - prefix, output_hash=output_chain(truth))
            take(FinishedReceived(attempt, claimed, "length", False, NOW))
        assert delivered == truth[: len(delivered)]
    if progress.phase is Phase.DELIVERED:
        assert delivered == truth
        assert sum(end.units for end in progress.ends) == total
        fee_free = total * 2 * 10**12 + 10 * 10**12
        assert fee_free <= progress.billed <= fee_free * 101 // 100


def test_session_restored_from_a_journal_continues_where_it_was() -> None:
    plan = text_plan()
    progress, _ = handle(started(plan), frame(0, [1, 2, 3]))
    items = [token_item(t) for t in (1, 2, 3)]
    again = restored(Progress(plan, phase=Phase.LEASED, attempt=1, lease=progress.lease), 0, items)
    assert (again.units, again.output_hash, again.attempt_units) == (progress.units, progress.output_hash, 3)
    _, (retry,) = handle(again, AttemptFailed(1, "client-restart", "", NOW))
    assert isinstance(retry, RetryElsewhere)
    assert retry.ack is not None
    assert retry.ack.units == 3

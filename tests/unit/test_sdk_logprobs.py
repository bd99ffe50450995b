"""A provider's logprobs are handed out only where they could be what was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sdk_terms import DEADLINE, NOW, lease, receipt, text_plan

from gpumarket.core.terms import Outcome, output_chain, token_item
from gpumarket.core.units import Hash
from gpumarket.sdk.logprobs import Logprobs, logprobs_flaw, logprobs_of
from gpumarket.sdk.session import (
    ClientLeaves,
    Conclude,
    FinishedReceived,
    FrameReceived,
    LeaseReceived,
    Leave,
    Progress,
    Record,
    RetryElsewhere,
    StartedReceived,
    handle,
    left_amount,
)
from gpumarket.v1 import provider_pb2 as ppb

NONCE = Hash(b"\x05" * 32)


def told(token: int, count: int = 2) -> Logprobs:
    return Logprobs(token, -1.0, tuple((token + i, -1.0 - i) for i in range(count)))


def items(*tokens: int) -> tuple[bytes, ...]:
    return tuple(token_item(token) for token in tokens)


def test_logprobs_that_fit_pass() -> None:
    assert logprobs_flaw(2, items(5, 6), (told(5), told(6))) == ""
    assert logprobs_flaw(0, items(5), (Logprobs(5, 0.0, ()),)) == ""
    assert logprobs_flaw(1, items(9), (Logprobs(9, -3.0, ((5, -0.1),)),)) == ""
    assert logprobs_flaw(None, items(5), ()) == ""


@pytest.mark.parametrize(
    ("bend", "says"),
    [
        (lambda e: replace(e, token=6), "another one"),
        (lambda e: replace(e, logprob=0.1), "no logarithm"),
        (lambda e: replace(e, logprob=math.nan), "no logarithm"),
        (lambda e: replace(e, top=((5, -1.0), (6, -math.inf))), "no logarithm"),
        (lambda e: replace(e, top=e.top[:1]), "1 alternatives"),
        (lambda e: replace(e, top=(*e.top, (8, -3.0))), "3 alternatives"),
        (lambda e: replace(e, top=((5, -1.0), (5, -1.0))), "twice"),
        (lambda e: replace(e, top=e.top[::-1]), "descend"),
        (lambda e: replace(e, logprob=-1.5), "two logprobs"),
        (lambda e: replace(e, top=((6, -1.5), (7, -2.0))), "leave out"),
        (lambda e: replace(e, logprob=-0.2, top=((5, -0.2), (6, -0.2))), "more than 1"),
    ],
)
def test_logprobs_that_do_not_fit_are_named(bend: Callable[[Logprobs], Logprobs], says: str) -> None:
    assert says in logprobs_flaw(2, items(5), (bend(told(5)),))


def test_logprobs_missing_or_unasked_are_named() -> None:
    assert "beside 2" in logprobs_flaw(2, items(5, 6), (told(5),))
    assert "nobody asked" in logprobs_flaw(None, items(5), (told(5),))


def test_logprobs_of_a_message_with_lists_of_two_lengths_lack_the_rest() -> None:
    entry = ppb.TokenLogprobs(token=5, logprob=-1, top=[5, 6], top_logprobs=[-1])
    assert logprobs_flaw(2, items(5), logprobs_of(ppb.Frame(tokens=[5], logprobs=[entry]))) == "1 alternatives to a token; 2 were asked for"


# --- in the session --------------------------------------------------------------------------------------------------------------


def started(total: int = 12) -> Progress:
    plan = replace(text_plan(total), top_logprobs=2)
    progress, _ = handle(Progress(plan), LeaseReceived(lease(plan.spec)))
    return handle(progress, StartedReceived(1, NONCE))[0]


def frame(first: int, tokens: list[int], entries: list[Logprobs] | None = None) -> FrameReceived:
    return FrameReceived(1, items(*tokens), first + len(tokens), tuple(told(t) for t in tokens) if entries is None else tuple(entries))


def test_session_logprobs_come_with_their_items_the_last_one_with_the_receipt() -> None:
    progress, (record,) = handle(started(3), frame(0, [10, 11, 12]))
    assert isinstance(record, Record)
    assert (record.items, record.logprobs) == (items(10, 11), (told(10), told(11)))
    finished = receipt(progress, units=3, output_hash=output_chain(items(10, 11, 12)))
    progress, (conclude,) = handle(progress, FinishedReceived(1, finished, "length", False, NOW))
    assert isinstance(conclude, Conclude)
    assert (conclude.items, conclude.logprobs) == (items(12), (told(12),))


def test_session_logprobs_that_do_not_fit_end_the_attempt_as_bad_output() -> None:
    _, (retry,) = handle(started(), frame(0, [10, 11], [told(10)]))
    assert isinstance(retry, RetryElsewhere)
    assert (retry.end.reason, retry.end.units) == ("bad-output", 0)


@pytest.mark.parametrize(("outcome", "sent", "prompt"), [(Outcome.CANCELLED, 5, 0), (Outcome.COMPLETED, 5, 10), (Outcome.COMPLETED, 12, 0)])
def test_session_job_that_was_left_pays_the_prompt_only_to_whom_had_the_answer_out(outcome: Outcome, sent: int, prompt: int) -> None:
    """The lease's window is 4: 5 units sent lie within it of the 3 that were acked, 12 do not."""
    progress, _ = handle(started(), frame(0, [10, 11, 12]))
    progress, (leave,) = handle(progress, ClientLeaves(1, "stop"))
    assert isinstance(leave, Leave)
    assert (progress.finish_reason, leave.end.units) == ("stop", 3)
    last: Any = receipt(progress, units=sent, output_hash=Hash(b"\x07" * 32), outcome=outcome, finished_at=DEADLINE)
    assert left_amount(progress, last) == (3 * 2 + prompt) * 10**12 * 101 // 100

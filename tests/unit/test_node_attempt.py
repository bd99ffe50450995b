"""The attempt's state machine: the window, the acks, the one end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_fixtures import generate_job, on_sale, text_hash

from gpumarket.core.errors import ProtocolError
from gpumarket.core.terms import Ack, Outcome, Task, output_chain, token_item
from gpumarket.core.units import Hash
from gpumarket.node.attempt import (
    Acked,
    AckKept,
    Attempt,
    Broke,
    Cancelled,
    Close,
    Conclude,
    Ended,
    Event,
    Gone,
    Instruction,
    KeepAck,
    Late,
    Phase,
    Produced,
    Send,
    Stalled,
)
from gpumarket.node.meter import Item

MODEL = on_sale(Task.GENERATE)
JOB = generate_job(MODEL, window=8)


def attempt() -> Attempt:
    return Attempt(JOB.lease, Hash(b"\x07" * 32), JOB.spec.request_hash, JOB.prompt_units)


def tokens(*ids: int) -> Produced:
    return Produced(tuple(Item(token_item(i), 1) for i in ids))


def ack(units: int, upto: int | None = None, *, complete: bool = False, will_check: bool = False) -> Acked:
    value = Ack(JOB.lease.struct_hash, units, text_hash(range(units if upto is None else upto)), complete, will_check)
    return Acked(value, b"signed")


def sent(instructions: object) -> int:
    assert isinstance(instructions, list | tuple)
    return sum(len(i.items) for i in instructions if isinstance(i, Send))


def test_attempt_without_acks_stops_after_exactly_one_window() -> None:
    machine = attempt()
    assert sent(machine.handle(tokens(*range(5)))) == 5
    assert sent(machine.handle(tokens(*range(5, 20)))) == 3
    assert machine.meter.sent == 8
    assert machine.waiting_for_ack
    assert not machine.hungry
    assert machine.handle(Ended("length")) == []


def test_attempt_window_moves_only_when_the_ack_is_durable() -> None:
    machine = attempt()
    machine.handle(tokens(*range(20)))
    (keep,) = machine.handle(ack(4))
    assert isinstance(keep, KeepAck)
    assert machine.meter.sent == 8
    assert sent(machine.handle(AckKept(keep.ack))) == 4
    assert machine.meter.sent == 12


def test_attempt_completes_with_the_receipt_of_what_was_sent() -> None:
    machine = attempt()
    machine.handle(tokens(0, 1, 2))
    assert machine.handle(Ended("stop")) == [Conclude(Outcome.COMPLETED, "stop")]
    receipt = machine.receipt(5)
    assert (receipt.output_units, receipt.output_hash, receipt.outcome) == (3, text_hash(range(3)), Outcome.COMPLETED)
    last = ack(3, complete=True, will_check=True)
    (keep,) = machine.handle(last)
    assert isinstance(keep, KeepAck)
    assert machine.handle(AckKept(keep.ack)) == (Close(),)
    assert machine.phase is Phase.CLOSED
    assert machine.handle(Gone()) == ()


@pytest.mark.parametrize(
    ("event", "match"),
    [
        (ack(5, 4), "hash"),
        (ack(9), "were sent"),
        (ack(3, complete=True), "complete"),
        (Acked(Ack(Hash(b"\x01" * 32), 3, text_hash(range(3)), False, False), b""), "another lease"),
    ],
)
def test_attempt_false_ack_is_refused_and_changes_nothing(event: Acked, match: str) -> None:
    machine = attempt()
    machine.handle(tokens(*range(20)))
    (keep,) = machine.handle(ack(2))
    with pytest.raises(ProtocolError, match=match):
        machine.handle(event)
    assert isinstance(keep, KeepAck)
    assert machine.meter.last_ack == keep.ack
    assert machine.phase is Phase.STREAMING


def test_attempt_ack_going_back_is_refused() -> None:
    machine = attempt()
    machine.handle(tokens(*range(8)))
    machine.handle(ack(6))
    with pytest.raises(ProtocolError, match="after one of 6"):
        machine.handle(ack(4))


def test_attempt_second_last_ack_with_another_word_is_refused() -> None:
    machine = attempt()
    machine.handle(tokens(0))
    machine.handle(Ended("stop"))
    machine.handle(ack(1, complete=True, will_check=True))
    with pytest.raises(ProtocolError, match="the last"):
        machine.handle(ack(1, complete=True))


def test_attempt_repeated_ack_is_no_news() -> None:
    machine = attempt()
    machine.handle(tokens(*range(8)))
    machine.handle(ack(6))
    assert machine.handle(ack(6)) == ()


@pytest.mark.parametrize(
    ("event", "outcome", "closes"),
    [
        (Gone(), Outcome.CANCELLED, True),
        (Stalled(), Outcome.CANCELLED, True),
        (Cancelled(), Outcome.CANCELLED, False),
        (Late(), Outcome.EXPIRED, False),
        (Broke("engine_failed"), Outcome.FAILED, False),
    ],
)
def test_attempt_ended_early_keeps_what_was_sent(event: Event, outcome: Outcome, closes: bool) -> None:
    machine = attempt()
    machine.handle(tokens(*range(20)))
    instructions = machine.handle(event)
    assert isinstance(instructions[0], Conclude)
    assert instructions[0].outcome is outcome
    assert (Close() in instructions) is closes
    assert machine.receipt(1).output_units == 8
    assert machine.handle(Produced((Item(b"late", 1),))) == ()


def test_attempt_item_larger_than_half_a_window_goes_when_no_ack_is_due() -> None:
    machine = attempt()
    assert sent(machine.handle(Produced((Item(b"a", 3), Item(b"b", 20), Item(b"c", 20))))) == 2
    assert machine.meter.sent == 23
    kept = Ack(JOB.lease.struct_hash, 23, output_chain([b"a", b"b"]), False, False)
    machine.handle(Acked(kept, b""))
    assert sent(machine.handle(AckKept(kept))) == 1


def test_attempt_ack_in_the_middle_of_an_item_is_refused() -> None:
    machine = attempt()
    machine.handle(Produced((Item(b"a", 3), Item(b"b", 3))))
    with pytest.raises(ProtocolError, match="whole"):
        machine.handle(Acked(Ack(JOB.lease.struct_hash, 4, output_chain([b"a"]), False, False), b""))


EVENTS = st.one_of(
    st.integers(1, 6).map(lambda n: ("produce", n)),
    st.integers(0, 40).map(lambda n: ("ack", n)),
    st.sampled_from([("end", 0), ("gone", 0), ("late", 0), ("cancel", 0), ("broke", 0), ("stall", 0)]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_attempt_any_order_of_events_never_passes_the_window_and_ends_once(script: list[tuple[str, int]]) -> None:
    machine = attempt()
    made = 0
    seen: list[Instruction] = []
    kept = 0
    for name, n in script:
        instructions: list[Instruction] = []
        if name == "produce":
            if machine.hungry:
                instructions = list(machine.handle(tokens(*range(made, made + n))))
                made += n
        elif name == "ack":
            try:
                instructions = list(machine.handle(ack(n)))
            except ProtocolError:
                assert n > machine.meter.sent or n < kept or machine.phase is Phase.CLOSED
        else:
            endings: dict[str, Event] = {
                "end": Ended("stop"),
                "gone": Gone(),
                "late": Late(),
                "cancel": Cancelled(),
                "broke": Broke("x"),
                "stall": Stalled(),
            }
            instructions = list(machine.handle(endings[name]))
        for instruction in list(instructions):
            if isinstance(instruction, KeepAck):
                kept = instruction.ack.units
                instructions += list(machine.handle(AckKept(instruction.ack)))
        seen += instructions
        assert machine.meter.sent <= machine.meter.acked + JOB.window
    assert sum(isinstance(i, Conclude) for i in seen) <= 1
    assert sum(isinstance(i, Close) for i in seen) <= 1
    assert sent(seen) == machine.meter.sent
    if machine.outcome is not None:
        assert machine.receipt(1).output_hash == text_hash(range(machine.meter.sent))

"""What attempts earn and cost: never above what was promised, whatever the split into attempts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumarket.core.terms import Ack, JobSpec, Lease, Outcome, Receipt, Task, keccak256
from gpumarket.core.units import MONEY_MAX, Address, Hash, Money
from gpumarket.settlement.pricing import attempt_amount, attempt_maximum, client_amount, counts_as_complete

H, A = keccak256(b"h"), Address(b"\1" * 20)
PROMPT, OUTPUT = 3_000_001, 7_000_003  # per million, so that everything rounds
units = st.integers(0, 100_000)
prices = st.integers(0, 10**24)
fees = st.integers(0, 200_000)


def spec(task: Task = Task.GENERATE, max_amount: int = MONEY_MAX, prompt: int = 100, output: int = 50) -> JobSpec:
    return JobSpec(A, A, H, task, H, H, prompt, output, Money(max_amount), H, H, 1)


def lease(task: Task = Task.GENERATE, maximum: int = MONEY_MAX, prompt: int = PROMPT, output: int = OUTPUT, fee: int = 10_000) -> Lease:
    return Lease(H, H, 1, A, A, A, H, task, Money(prompt), Money(output), Money(maximum), fee, H, H, H, 32, 0, H, 1, 2)


def receipt(output_units: int, outcome: Outcome = Outcome.COMPLETED) -> Receipt:
    return Receipt(H, H, H, H, 0, H, 5, output_units, outcome, 1)


def test_amount_generate_pays_the_prompt_only_to_the_attempt_that_completes() -> None:
    assert attempt_amount(lease(), prompt_units=100, units=10, complete=False) == 10 * OUTPUT // 10**6
    assert attempt_amount(lease(), prompt_units=100, units=10, complete=True) == 10 * OUTPUT // 10**6 + 100 * PROMPT // 10**6


@pytest.mark.parametrize("task", [Task.EMBED, Task.CHECK])
def test_amount_of_inputs_is_by_delivered_input_tokens(task: Task) -> None:
    for complete in (False, True):
        assert attempt_amount(lease(task), prompt_units=100, units=40, complete=complete) == 40 * PROMPT // 10**6


def test_amount_never_passes_the_lease() -> None:
    assert attempt_amount(lease(maximum=5), prompt_units=10**6, units=10**6, complete=True) == 5
    assert attempt_amount(lease(), prompt_units=100, units=0, complete=False) == 0


@given(units, units, prices, prices, fees, st.integers(0, 10**26), st.integers(0, 10**26), units)
def test_maximum_covers_what_can_be_earned_and_keeps_the_client_within_its_limit(
    prompt: int, output: int, prompt_price: int, output_price: int, fee: int, max_amount: int, spent: int, prefix: int
) -> None:
    for task in (Task.GENERATE, Task.EMBED):
        order = spec(task, max_amount, max(1, prompt), output)
        maximum = attempt_maximum(order, prompt_price, output_price, fee, spent=spent, prefix_units=prefix)
        left = max_amount - spent
        assert maximum == 0 or client_amount(maximum, fee) <= left
        full = attempt_maximum(replace(order, max_amount=Money(MONEY_MAX)), prompt_price, output_price, fee, spent=0, prefix_units=prefix)
        if client_amount(full, fee) <= left:
            assert maximum == full  # nothing is withheld that the limit allows
        elif left > 0:
            assert client_amount(maximum + 1, fee) > left  # and the limit is used to its last unit
        rest = max(0, (output if task is Task.GENERATE else max(1, prompt)) - prefix)
        earned = attempt_amount(
            lease(task, maximum=full, prompt=min(prompt_price, MONEY_MAX), output=min(output_price, MONEY_MAX)),
            prompt_units=max(1, prompt),
            units=rest,
            complete=True,
        )
        uncapped = attempt_amount(
            lease(task, prompt=min(prompt_price, MONEY_MAX), output=min(output_price, MONEY_MAX)),
            prompt_units=max(1, prompt),
            units=rest,
            complete=True,
        )
        assert earned == uncapped <= full


@given(st.lists(st.tuples(units, st.booleans()), max_size=5), fees, st.integers(0, 10**12))
def test_all_attempts_together_never_cost_more_than_max_amount(attempts: list[tuple[int, bool]], fee: int, max_amount: int) -> None:
    order, spent, prefix = spec(max_amount=max_amount, output=100_000), 0, 0
    for delivered, complete in attempts:
        maximum = attempt_maximum(order, PROMPT, OUTPUT, fee, spent=spent, prefix_units=prefix)
        terms = lease(maximum=maximum, fee=fee)
        spent += client_amount(attempt_amount(terms, prompt_units=order.prompt_units, units=delivered, complete=complete), fee)
        prefix += delivered
        assert spent <= max_amount


def ack(acked: int, complete: bool = False) -> Ack:
    return Ack(H, acked, Hash(bytes(32)), complete, False)


@pytest.mark.parametrize(
    ("last", "stated", "complete"),
    [
        (ack(100, True), receipt(100), True),
        (ack(100, True), receipt(100, Outcome.CANCELLED), True),  # the client's word is enough
        (ack(68), receipt(100), True),  # one window short
        (ack(67), receipt(100), False),
        (ack(68), receipt(100, Outcome.CANCELLED), False),
        (ack(68), receipt(100, Outcome.FAILED), False),
        (None, receipt(32), True),
        (None, receipt(33), False),
    ],
)
def test_complete_by_ack_or_by_receipt_within_one_window(last: Ack | None, stated: Receipt, complete: bool) -> None:
    assert counts_as_complete(last, stated, 32) is complete

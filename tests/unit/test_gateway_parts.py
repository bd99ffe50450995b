"""The parts of a shared job: every input once, every token once, every base unit once."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpumarket.core.units import ZERO_ADDRESS, Hash, Money
from gpumarket.gateway.sharing import parts
from gpumarket.sdk.results import EmbedResult, RejectedResult, Usage, Verdict, VerdictState


def result(tokens: list[int], cost: int, check: int, lost: int) -> EmbedResult:
    return EmbedResult(
        job=Hash(bytes(32)),
        model="m",
        provider=ZERO_ADDRESS,
        receipt=None,
        signed_receipt=None,
        lease=cast(Any, None),
        verdict=Verdict(VerdictState.NOT_DRAWN),
        cost=Money(cost),
        check_cost=Money(check),
        usage=Usage(sum(tokens), 0),
        attempts=(),
        rejected=(RejectedResult(Hash(bytes(32)), ZERO_ADDRESS, "wrong", Money(lost)),),
        vectors=np.arange(2 * len(tokens), dtype=np.float32).reshape(-1, 2),
        input_tokens=tuple(tokens),
    )


@given(
    st.lists(st.lists(st.integers(1, 10**6), min_size=1, max_size=4), min_size=1, max_size=6),
    st.integers(0, 10**24),
    st.integers(0, 10**24),
    st.integers(0, 10**24),
)
def test_parts_add_up_and_keep_their_order(riders: list[list[int]], cost: int, check: int, lost: int) -> None:
    whole = result([tokens for rider in riders for tokens in rider], cost, check, lost)
    found = parts(whole, [len(rider) for rider in riders])
    assert sum(part.total_cost for part in found) == whole.total_cost == cost + check + lost
    assert [list(part.input_tokens) for part in found] == riders
    assert np.array_equal(np.concatenate([part.vectors for part in found]), whole.vectors)
    total = sum(whole.input_tokens)
    for part, rider in zip(found, riders, strict=True):
        assert part.usage.prompt_tokens == sum(rider)
        assert abs(part.total_cost - whole.total_cost * sum(rider) / total) <= max(1, whole.total_cost * 2**-50)

"""The number of a panel member: what is measured of honest and of cheating results lies on its side of the profile's bound."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from dispute_kit import DOMAIN, Deal

from gpumarket.core.errors import EngineFailed, ProtocolError
from gpumarket.core.signing import LocalKey
from gpumarket.core.terms import Task, VerificationProfile, keccak256
from gpumarket.core.units import Hash
from gpumarket.settlement.disputes import NUMBER_MAX, bound, number
from gpumarket.settlement.verification import EMBED_FP32, TEXT_FP32, Evidence, open_evidence

CLIENT, SCHEDULER, PROVIDER = (LocalKey(bytes([i]) * 32) for i in range(1, 4))
DEAL = Deal(CLIENT, SCHEDULER, PROVIDER, Hash(keccak256(b"model")))
TOKENS = list(range(100, 200))


def row(*values: float) -> bytes:
    return np.array(values, dtype="<f4").tobytes()


def embedded(*rows: bytes, skip: int = 0) -> Evidence:
    return open_evidence(DOMAIN, DEAL.embed([[1, 2]] * len(rows), rows, skip=skip))


def written(skip: int = 0) -> Evidence:
    return open_evidence(DOMAIN, DEAL.text([1, 2, 3], TOKENS, skip=skip))


def gaps(gross: int, *, small: float = 0.07, count: int = len(TOKENS), first: int = 0) -> list[bytes]:
    values = np.full(count, small, dtype="<f4")
    values[first : first + gross] = 1.5
    return [values.tobytes()]


@pytest.mark.parametrize(("difference", "beyond"), [(1.3e-7, False), (1.5e-4, True), (1.1e-3, True)])
def test_number_embeddings_measured_differences_fall_on_the_right_side(difference: float, beyond: bool) -> None:
    found = number(EMBED_FP32, embedded(row(0.5, 0.25), row(0.125, 0.5)), [row(0.5, 0.25), row(0.125 + difference, 0.5)])
    assert found == pytest.approx(difference * 1e9, rel=0.1)
    assert (found > bound(EMBED_FP32)) is beyond


@pytest.mark.parametrize("delivered", [row(0.5), row(math.nan, 0.5), row(math.inf, 0.5), row(0.5, 0.5, 0.5)])
def test_number_rows_that_cannot_be_compared_give_the_largest(delivered: bytes) -> None:
    assert number(EMBED_FP32, embedded(delivered), [row(0.5, 0.25)]) == NUMBER_MAX


def test_number_of_huge_values_fits_its_type() -> None:
    assert number(EMBED_FP32, embedded(row(3e38, 0.0)), [row(-3e38, 0.0)]) == NUMBER_MAX


def test_number_counts_this_attempts_rows_only() -> None:
    evidence = embedded(row(9.0, 9.0), row(0.5, 0.25), skip=1)
    assert number(EMBED_FP32, evidence, [row(0.5, 0.25)]) == 0


@pytest.mark.parametrize("computed", [[], [row(0.5, 0.25)] * 2, [b""], [row(math.nan, 0.25)]])
def test_number_of_a_broken_engine_is_none(computed: list[bytes]) -> None:
    with pytest.raises(EngineFailed):
        number(EMBED_FP32, embedded(row(0.5, 0.25)), computed)


@pytest.mark.parametrize(("gross", "beyond"), [(0, False), (8, False), (15, False), (16, True), (100, True)])
def test_number_text_is_the_share_of_gross_tokens(gross: int, beyond: bool) -> None:
    found = number(TEXT_FP32, written(), gaps(gross))
    assert found == gross * 10_000
    assert (found > bound(TEXT_FP32)) is beyond


def test_number_text_token_that_could_not_be_drawn_is_gross() -> None:
    assert number(TEXT_FP32, written(), gaps(0, small=math.inf)) == 1_000_000


def test_number_text_earlier_attempts_tokens_are_not_counted() -> None:
    assert number(TEXT_FP32, written(skip=30), gaps(30)) == 0
    assert number(TEXT_FP32, written(skip=30), gaps(35, first=30)) == 500_000


def test_number_text_rounds_down_for_the_provider() -> None:
    evidence = written(skip=33)  # 67 tokens of its own
    assert number(TEXT_FP32, evidence, gaps(1, first=50)) == 1_000_000 // 67


def test_number_text_too_short_to_reject_alone_is_never_gross() -> None:
    assert number(TEXT_FP32, written(skip=len(TOKENS) - TEXT_FP32.min_units + 1), gaps(100)) == 0
    assert number(TEXT_FP32, written(skip=len(TOKENS) - TEXT_FP32.min_units), gaps(100)) == 1_000_000


@pytest.mark.parametrize("computed", [[], gaps(0, count=99), [*gaps(0), *gaps(0)], gaps(0, small=math.nan)])
def test_number_text_without_a_gap_for_each_token_is_none(computed: list[bytes]) -> None:
    with pytest.raises(EngineFailed):
        number(TEXT_FP32, written(), computed)


def test_number_of_a_check_job_cannot_be_disputed() -> None:
    profile = VerificationProfile(Task.CHECK, "float32")
    evidence = written()
    lease = replace(evidence.lease, task=Task.CHECK)
    with pytest.raises(ProtocolError, match="CHECK"):
        bound(profile)
    with pytest.raises(ProtocolError, match="CHECK"):
        number(profile, replace(evidence, lease=lease), gaps(0))

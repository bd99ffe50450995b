"""A seed names a run: the same histories come again, and the summary has the line that does it."""

from __future__ import annotations

import os

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from simulation import profiles

DRAWN: list[int] = []


class Drawing(RuleBasedStateMachine):
    @rule(number=st.integers(0, 10**9))
    def draws(self, number: int) -> None:
        DRAWN.append(number)


def histories() -> list[int]:
    DRAWN.clear()
    profiles.run(Drawing, 10, shrink=False)
    return list(DRAWN)


def test_run_names_its_seed_and_the_seed_runs_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "RUNS", [])
    monkeypatch.delenv(profiles.SEED, raising=False)
    first, another = histories(), histories()
    assert first != another
    (line, _) = profiles.RUNS
    assert os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0] in line
    monkeypatch.setenv(profiles.SEED, line.partition(f"{profiles.SEED}=")[2].partition(" ")[0])
    assert histories() == first

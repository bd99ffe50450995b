"""The pace that a provider tells of a model: weighted by work, steady under noise, silent while nothing is known."""

from __future__ import annotations

import random

import pytest

from gpumarket.node.pace import STEP, UNITS_MIN, Pace, Stopwatch


def test_pace_says_nothing_before_it_knows_enough() -> None:
    pace = Pace()
    assert pace.per_kilosecond == 0
    pace.add(UNITS_MIN - 1, 1.0)
    assert pace.per_kilosecond == 0
    pace.add(UNITS_MIN, 1.0)
    assert pace.per_kilosecond > 0


@pytest.mark.parametrize(("units", "seconds"), [(0, 5.0), (-3, 5.0), (10, 0.0), (10, -1.0)])
def test_pace_ignores_jobs_that_measured_nothing(units: int, seconds: float) -> None:
    pace = Pace()
    pace.add(100, 2.0)
    pace.add(units, seconds)
    assert pace.per_kilosecond == 50_000


def test_pace_weighs_long_jobs_more_than_short_ones() -> None:
    pace = Pace()
    pace.add(10_000, 100.0)
    pace.add(1, 10.0)  # one token after a slow prefill
    assert pace.per_kilosecond == 100_000


def test_pace_under_noise_is_told_once() -> None:
    draw = random.Random(7)
    pace = Pace()
    told = set()
    for _ in range(500):
        pace.add(1_000, 10.0 * draw.uniform(0.85, 1.15))
        told.add(pace.per_kilosecond)
    assert len(told) == 1, "each change would be an offer to every peer"


def test_pace_follows_an_engine_that_became_slower() -> None:
    pace = Pace()
    pace.add(1_000, 1.0)
    for _ in range(60):
        pace.add(1_000, 4.0)
    assert abs(pace.per_kilosecond / 1_000 - 250) <= STEP * 250 * 2


def test_stopwatch_counts_what_lies_between_start_and_stop() -> None:
    watch = Stopwatch()
    watch.start(10.0)
    watch.stop(12.0)
    watch.start(20.0)
    watch.stop(21.0)
    watch.stop(20.5)  # a clock that went back adds nothing
    assert watch.seconds == 3.0

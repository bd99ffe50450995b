"""The deterrence formulas against the figures they were derived with."""

from __future__ import annotations

import math

import pytest

from gpumarket.settlement.economics import caught_within, cheating_gain, exposure, panel_capture, required_stake


def test_required_stake_is_where_cheating_stops_to_pay() -> None:
    stake = required_stake(0.05, 0.95, fee=1.0, gain=0.6)
    assert stake == pytest.approx(11.6, abs=0.05)  # measured design point: g = 0.6 R, p = 5 %, d = 95 %
    assert cheating_gain(0.05, 0.95, stake, 1.0, 0.6) == pytest.approx(0)
    assert cheating_gain(0.05, 0.95, 10 * stake, 1.0, 0.6) < 0 < cheating_gain(0.05, 0.95, stake / 2, 1.0, 0.6)


def test_required_stake_without_detection_is_infinite() -> None:
    assert required_stake(0.05, 0.0, 1.0, 0.6) == math.inf
    assert required_stake(0.0, 1.0, 1.0, 0.0) == 0.0
    assert required_stake(1.0, 1.0, fee=2.0, gain=1.0) == 0.0


def test_quorum_weakens_the_punishment() -> None:
    assert cheating_gain(0.1, 1, 100, 1, 1, quorum=0.5) > cheating_gain(0.1, 1, 100, 1, 1)


@pytest.mark.parametrize("arguments", [(-0.1, 1.0), (1.1, 1.0), (0.5, 2.0)])
def test_chance_outside_0_to_1_is_refused(arguments: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"0\.\.1"):
        cheating_gain(*arguments, 1, 1, 1)


def test_a_steady_cheat_is_caught() -> None:
    assert caught_within(100, 0.05, 0.95) == pytest.approx(0.992, abs=0.001)
    assert caught_within(0, 0.05, 0.95) == 0


@pytest.mark.parametrize(("share", "needed", "chance"), [(0.2, 3, 0.058), (0.3, 3, 0.163), (0.2, 4, 0.0067), (0.3, 4, 0.031)])
def test_panel_capture_by_a_share_of_the_stake(share: float, needed: int, chance: float) -> None:
    assert panel_capture(share, needed=needed) == pytest.approx(chance, abs=0.0006)


def test_exposure_is_capacity_times_earnings_times_delay() -> None:
    assert exposure(4, 5, 60) == 1200

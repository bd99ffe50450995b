"""What the contracts cost to use: exact, so a figure that rises is a change somebody made."""

from __future__ import annotations

import json
import os

import pytest
from contracts_fixtures import Chain, contracts_chain
from contracts_gas import SNAPSHOT, measure, written
from reliability import record

__all__ = ["contracts_chain"]

LIMITS = {"redeem": 61_500, "redeem_first": 61_500, "redeem_batch100_each": 19_300, "push100_each": 16_100, "open_first": 165_000}
RISE_MAX = 1.02
FALL_MAX = 0.90
"""A fall this deep is good news that the snapshot should hold: `GPUMARKET_GAS_SNAPSHOT=write pytest tests/unit/test_contracts_gas.py`."""


@pytest.fixture(scope="module")
def found(contracts_chain: Chain) -> dict[str, int]:
    measured = measure(contracts_chain)
    print(written(measured))
    if os.environ.get("GPUMARKET_GAS_SNAPSHOT") == "write":
        SNAPSHOT.write_text(written(measured))
    return measured


@pytest.fixture(scope="module")
def snapshot(found: dict[str, int]) -> dict[str, int]:
    held: dict[str, int] = json.loads(SNAPSHOT.read_text())
    return held


@pytest.mark.parametrize("name", LIMITS)
def test_gas_stays_within_the_published_limit(found: dict[str, int], name: str) -> None:
    assert found[name] <= LIMITS[name]


def test_gas_of_a_job_among_ten_thousand_stays_within_its_limit(found: dict[str, int]) -> None:
    assert found["redeem"] / 10_000 <= 6.2


def test_gas_rises_nowhere_by_more_than_two_percent_of_the_snapshot(found: dict[str, int], snapshot: dict[str, int]) -> None:
    assert found.keys() == snapshot.keys()
    risen = {name: (snapshot[name], gas) for name, gas in found.items() if gas > RISE_MAX * snapshot[name]}
    assert not risen, f"gas rose (before, now): {risen}"


def test_gas_is_the_same_among_hundreds_of_channels(found: dict[str, int]) -> None:
    """No loop runs over what others opened: nobody can make anybody's exit dear (calldata differs by a few zero bytes)."""
    slopes = [abs(found[f"{name}_late"] - found[name]) for name in ("redeem", "open")]
    record("F46", 200, f"{max(slopes)} gas more or less after 200 channels of others", "100")
    assert max(slopes) <= 100


def test_gas_snapshot_is_not_stale(found: dict[str, int], snapshot: dict[str, int]) -> None:
    fallen = {name: (snapshot[name], gas) for name, gas in found.items() if gas < FALL_MAX * snapshot[name]}
    assert not fallen, f"gas fell (before, now); write the snapshot anew: {fallen}"

"""What cheating earns, by the table that `gpumarket economics` prints: never flattering, and the same as a simulation of it."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from gpumarket.contracts.dispute_terms import DisputeTerms
from gpumarket.core.terms import Task
from gpumarket.settlement.deterrence import CHEATS, NOT_PROMISED, Cheat, Network, Seller, row, stake_lost, wilson_floor

TOKEN = 10**18
TERMS = DisputeTerms()
NETWORK = Network(
    0.05,
    0.1,
    has_disputes=True,
    lock_minimum=TERMS.lock_minimum,
    slash_multiple=TERMS.slash_multiple,
    panel_fee=TERMS.panel_fee,
    burn_ppm=TERMS.burn_ppm,
)
SELLER = Seller(10_000 * TOKEN, TOKEN // 50, TOKEN // 10, Task.GENERATE, slashable=True, jobs_at_risk=28)
BY_NAME = {cheat.name: cheat for cheat in CHEATS}
INT4, INT8 = BY_NAME["int4 weights sold as bf16"], BY_NAME["int8 weights sold as bf16"]


@pytest.mark.parametrize("cheat", [c for c in CHEATS if c.gross], ids=lambda c: c.name)
def test_gross_cheat_loses_where_the_deployed_constants_and_the_design_stake_hold(cheat: Cheat) -> None:
    found = row(cheat, replace(SELLER, task=cheat.task), NETWORK, 256, 256)
    assert not found.pays
    assert found.backing > found.needed


def test_fine_cheat_is_never_slashed_and_the_table_says_that_it_pays() -> None:
    found = row(INT8, SELLER, NETWORK, 256, 256)
    assert found.backing == 0
    assert found.pays
    assert found.needed == math.inf
    assert any("never slashed" in line for line in NOT_PROMISED)


@pytest.mark.parametrize(
    "network",
    [replace(NETWORK, has_disputes=False), replace(NETWORK, probability=0.0), replace(NETWORK, hostile=1.0)],
    ids=["no contract", "nobody checks", "all seats hostile"],
)
def test_gross_cheat_pays_where_nothing_can_punish_it(network: Network) -> None:
    assert row(INT4, SELLER, network, 256, 256).pays


def test_stake_behind_a_job_is_its_part_of_the_stake_at_most() -> None:
    price = 30 * 10**12
    assert stake_lost(INT4, SELLER, NETWORK, price) == TERMS.lock_minimum
    assert stake_lost(INT4, replace(SELLER, jobs_at_risk=1_000), NETWORK, price) == 10 * TOKEN
    assert stake_lost(INT4, replace(SELLER, stake=TERMS.lock_minimum - 1), NETWORK, price) == 0
    assert stake_lost(INT4, SELLER, NETWORK, TOKEN) == TERMS.slash_multiple * TOKEN


def test_stake_of_a_model_with_few_verifiers_is_lost_for_restitution_only() -> None:
    price = 2 * TOKEN
    assert stake_lost(INT4, replace(SELLER, slashable=False), NETWORK, price) == 2 * (price + 5 * TERMS.panel_fee)


@pytest.mark.parametrize("slashable", [True, False])
@pytest.mark.parametrize("at_risk", [1, 28, 10**6, 10**9, 10**14])
@pytest.mark.parametrize("cheat", CHEATS, ids=lambda c: c.name)
def test_cheat_pays_exactly_where_less_stake_than_needed_is_behind_the_job(cheat: Cheat, at_risk: int, slashable: bool) -> None:
    seller = replace(SELLER, task=cheat.task, jobs_at_risk=at_risk, slashable=slashable)
    found = row(cheat, seller, NETWORK, 256, 256)
    assert found.pays == (found.backing < found.needed)
    assert (found.needed == math.inf) == (not cheat.gross), "what no stake deters is what is never slashed"


def test_expected_profit_is_what_a_simulation_of_it_gives() -> None:
    seller, network = replace(SELLER, jobs_at_risk=100_000), replace(NETWORK, probability=0.3, hostile=0.2)
    found = row(INT4, seller, network, 256, 256)
    dice, total, games = random.Random(7), 0.0, 200_000
    for _ in range(games):
        seen = dice.random() < network.probability * INT4.detection
        slashed = seen and sum(dice.random() >= network.hostile for _ in range(5)) >= 4
        total += found.gain - (found.price if seen else 0) - (found.backing if slashed else 0)
    assert total / games == pytest.approx(found.expected, rel=0.05)


def test_needed_stake_is_where_the_cheat_breaks_even() -> None:
    seller = replace(SELLER, jobs_at_risk=1, stake=0)
    found = row(INT4, seller, NETWORK, 256, 256)
    caught = NETWORK.probability * INT4.detection
    assert found.gain - caught * (found.price + NETWORK.quorum * found.needed) == pytest.approx(0, abs=1e-9 * found.gain)


@pytest.mark.parametrize(("hits", "tries", "floor"), [(40, 40, 0.937), (15, 40, 0.261), (0, 40, 0.0), (64, 64, 0.959), (0, 0, 0.0)])
def test_detection_is_the_lower_end_of_its_confidence(hits: int, tries: int, floor: float) -> None:
    assert wilson_floor(hits, tries) == pytest.approx(floor, abs=0.001)


def test_table_never_claims_certainty() -> None:
    assert all(0 < cheat.detection < 1 and 0 < cheat.saves <= 1 for cheat in CHEATS)

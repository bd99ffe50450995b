"""Honest work before a panel while network and chain fail: whole disputes by the product's members and challenger, one world each.

Evidence is lost, late and repeated; commits and reveals are reorganised away; members are cut off, crash, and find no block. The prompt is
the worst of a hundred, or a real decoder's worst. Up to two members say what hurts most.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
from reliability import record
from simulation import numbers
from simulation.dispute_chain import CONFIRMATIONS
from simulation.tribunal import HARMED, Tribunal
from simulation.wire import stormy
from simulation.world import simulated_lines

SEED = 20_260_102
FAULTS_MAX = 4
FORMS = [pytest.param(40, id="40"), pytest.param(10_000, id="10000", marks=[pytest.mark.slow, pytest.mark.timeout(4 * 3_600)])]


def accuse(world: Tribunal, rng: random.Random) -> None:
    """Rows, a text whose gaps are drawn for the worst prompt of many, or one that was measured."""
    kind = rng.random()
    if kind < 0.25:
        world.dispute(cheats=False, inputs=[[i + 1] * rng.randint(1, 4) for i in range(rng.randint(1, 6))])
    elif kind < 0.5:
        gaps = rng.choice(numbers.real_ties())
        world.text(lambda _: gaps, len(gaps))
    else:
        rate = numbers.tie_rate(rng, worst_of=numbers.TRIED)
        world.text(lambda tokens: numbers.honest_gaps(rng, tokens, rate), rng.choice((64, 129, 256)))


def strike(world: Tribunal, rng: random.Random) -> str:
    """One fault; its name."""
    member = rng.choice(world.members)
    faults: dict[str, Callable[[], object]] = {
        "weather": lambda: setattr(world.net, "weather", stormy(rng, 1.0)),
        "member without a chain": lambda: world.blocks.cut.add(member.key.address),
        "member without a network": lambda: world.net.cut.add(member.name),
        "member crashed": lambda: world.crash(member),
        "member crashed at a commit": partial(world.crash_at, member, 1, after=rng.random() < 0.5),
        "reorganisation": partial(world.blocks.reorganise, rng.randint(1, CONFIRMATIONS + 2)),
        "no blocks": partial(world.blocks.stall, rng.choice((20.0, 100.0, 300.0))),
        "full blocks": lambda: setattr(world.blocks, "full", 0.5),
    }
    name = rng.choice(list(faults))
    faults[name]()
    return name


def tried(seed: int, seen: Counter[str]) -> str:
    """One job, accused and judged under faults; the outcome."""
    rng = random.Random(seed)
    world = Tribunal(seed, hostile=rng.randint(0, 2))
    try:
        world.run(1)
        if rng.random() < 0.7:
            world.net.weather = stormy(rng, 1.0)
        accuse(world, rng)
        for _ in range(rng.randint(0, FAULTS_MAX)):
            world.run(rng.choice((3.0, 10.0, 30.0, 100.0)))
            name = strike(world, rng)
            world.deep_reorgs += name == "reorganisation"
            seen[name] += 1
        world.run(rng.choice((10.0, 60.0, 200.0)))
        world.heal()
        world.run_to_the_end()
        world.run_home()
        world.holds_now()
        world.settled()
        (record_,) = world.blocks.contract.disputes.values()
        assert record_.payout is not None
        assert record_.payout.outcome not in HARMED and not record_.payout.taken, record_.payout
        seen.update({"evidence or answer lost": world.net.lost, "repeated": world.net.repeated, "late": world.net.late})
        seen["commit or reveal reorganised away"] += world.blocks.returned
        return record_.payout.outcome.name
    finally:
        world.close()


@pytest.mark.parametrize("jobs", FORMS)
def test_honest_provider_is_never_slashed_while_network_and_chain_fail(jobs: int) -> None:
    seen: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    with simulated_lines():
        for index in range(jobs):
            try:
                outcomes[tried(SEED + index, seen)] += 1
            except AssertionError as error:
                error.add_note(f"job {index}: tried({SEED + index}, Counter())")
                raise
    assert all(seen[what] for what in ("evidence or answer lost", "repeated", "late", "commit or reveal reorganised away"))
    record("F47", jobs, f"slashed 0 of whole disputes under {sum(seen.values())} faults {dict(seen)} ({dict(outcomes)})", "slashed 0")

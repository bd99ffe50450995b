"""Whether the machines would notice: a bug is seeded into the product, and must be caught: a quick one within the usual number of examples,
one that takes a rare history within a tenth of the long form's.
"""

from __future__ import annotations

import pytest
from hypothesis.stateful import RuleBasedStateMachine
from reliability import record
from simulation.machine import MarketMachine
from simulation.mutants import MUTANTS, Mutant, seeded
from simulation.profiles import EXAMPLES, EXAMPLES_ALL, run
from simulation.test_call_machine import CallMachine
from simulation.test_channel_machine import PayeeMachine
from simulation.test_dispute_machine import DisputeMachine
from simulation.test_lifecycle_machine import LifecycleMachine
from simulation.world import simulated_lines

from gpumarket.core.errors import GpumarketError

MACHINES: dict[str, list[type[RuleBasedStateMachine]]] = {
    "market": [MarketMachine],
    "pure": [PayeeMachine, LifecycleMachine],
    "disputes": [DisputeMachine],
    "calls": [CallMachine],
}
ALL = [pytest.param(m, id=m.name.replace(" ", "-"), marks=[] if m.quick else [pytest.mark.slow]) for m in MUTANTS]


@pytest.mark.parametrize("mutant", ALL)
@pytest.mark.timeout(1_200)
def test_mutant_seeded_into_the_product_is_caught(mutant: Mutant) -> None:
    caught = [machine.__name__ for machine in MACHINES[mutant.of] if _catches(machine, mutant)]
    assert caught, f"survived: {mutant.name}"
    record("seeded bugs", 1, f"caught by {caught[0]}: {mutant.name}", "each is caught")


def test_every_seeded_bug_still_finds_its_place_in_the_product() -> None:
    for mutant in MUTANTS:
        with seeded(mutant):
            pass


def _catches(machine: type[RuleBasedStateMachine], mutant: Mutant) -> bool:
    with simulated_lines(), seeded(mutant):
        try:
            run(machine, EXAMPLES if mutant.quick else EXAMPLES_ALL // 10, shrink=False)
        except (AssertionError, ExceptionGroup, GpumarketError):  # the product's own refusal of what a rule knows to be right, too
            return True
    return False

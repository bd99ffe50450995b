"""The money of the whole market under random histories: I1 to I8 after every step, everything settled at the end.

Client, scheduler, providers and redeemers are the product's own; network, chain, disks and time are simulated (`world`). Crashes fall
anywhere, also just before and just after a commit. One example is one seed and one list of rules; Hypothesis prints the smallest
that fails, and the failure says how to run it again.
"""

from __future__ import annotations

import pytest
from reliability import record
from simulation.invariants import LOOKS
from simulation.machine import INJECTED, MarketMachine
from simulation.profiles import EXAMPLES, EXAMPLES_ALL, run
from simulation.world import simulated_lines

FORMS = [
    pytest.param(EXAMPLES, marks=pytest.mark.timeout(900)),
    pytest.param(EXAMPLES_ALL, marks=[pytest.mark.slow, pytest.mark.timeout(4 * 3_600)]),
]


@pytest.mark.parametrize("examples", FORMS)
def test_market_random_histories_lose_no_money(examples: int) -> None:
    INJECTED.clear()
    LOOKS.clear()
    with simulated_lines():
        run(MarketMachine, examples)
    lost, again, late = (INJECTED[what] for what in ("lost", "repeated", "late"))
    for promise in ("I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8"):
        assert LOOKS[promise], f"{promise} was never looked at"
        record(promise, LOOKS[promise], f"looks in {INJECTED['histories']:,} random histories: broken 0", "broken 0")
    record("F03", INJECTED["crashes"], "jobs that did not end 0, acknowledged and lost 0", "I6 violations 0")
    record("F37", lost + again + late, "credited twice 0, vouchers that fell 0", "credited twice 0")
    record("F32", INJECTED["reorganisations"], "wrong money decisions 0", "bad decisions 0")

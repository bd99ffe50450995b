"""The Solidity tests: fuzz, hostile tokens and handler invariants, run by the pinned forge, offline."""

from __future__ import annotations

import json
import subprocess

import pytest
from contracts_tools import CONTRACTS, tools

INVARIANTS = (
    "PaymentChannelsInvariants.invariant_solvency",
    "PaymentChannelsInvariants.invariant_redemption_is_monotonic",
    "PaymentChannelsInvariants.invariant_no_forgery",
    "StakeRegistryInvariants.invariant_solvency",
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_forge_passes_every_solidity_test() -> None:
    done = subprocess.run(["forge", "test", "--json"], cwd=CONTRACTS, env=tools(), capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    suites = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    results = {
        f"{where.split(':')[-1]}.{name.split('(')[0]}": found["status"]
        for where, suite in suites.items()
        for name, found in suite["test_results"].items()
    }
    assert set(results.values()) == {"Success"}
    assert len(results) >= 19
    assert set(INVARIANTS) <= results.keys()

"""The Solidity tests: fuzz, hostile tokens and handler invariants, run by the pinned forge, offline, in the tiers of foundry.toml."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from contracts_tools import CONTRACTS, tools
from reliability import record

INVARIANTS = (
    "PaymentChannelsInvariants.invariant_solvency",
    "PaymentChannelsInvariants.invariant_redemption_is_monotonic",
    "PaymentChannelsInvariants.invariant_no_forgery",
    "PaymentChannelsInvariants.invariant_liveness_of_exit",
    "StakeRegistryInvariants.invariant_solvency",
    "StakeRegistryInvariants.invariant_nobody_else_moves_a_nodes_stake",
    "StakeRegistryInvariants.invariant_liveness_of_exit",
)
DISPUTES = (
    "DisputesInvariants.invariant_solvency_locks_slashes_and_no_forgery",
    "DisputesInvariants.invariant_liveness_of_exit",
    "DisputesInvariants.test_handler_reaches_every_outcome",
)
"""A move of a dispute costs twenty times a channel's: fewer runs in the thorough tier."""
MOVES = {"register", "enrol", "unenrol", "challenge", "draw"}
FLAT = {
    "SeatsGasTest.test_gas_of_every_move_is_the_same_among_a_thousand_seats": "5, 100 and 1,000 seats",
    "SeatsGasTest.test_gas_of_every_move_is_the_same_among_hundreds_of_holes": "5, 47 and 497 holes",
}
WORST = "SeatsGasTest.test_gas_of_a_draw_that_finds_no_panel_is_bounded"
PROFILE = tomllib.loads((CONTRACTS / "foundry.toml").read_text())


@pytest.mark.timeout(900)
def test_forge_passes_every_solidity_test(tmp_path: Path) -> None:
    results = forge(tmp_path, "default", 880)
    assert {*INVARIANTS, *DISPUTES} <= results.keys()
    assert len(results) >= 61
    for name, sizes in FLAT.items():
        found = _told(results[name])
        assert found.keys() == MOVES
        apart = max(max(gas) - min(gas) for gas in found.values())
        record("F46", sum(map(len, found.values())), f"{apart} gas apart, {', '.join(found)}: {sizes}", "0")
        assert apart == 0
    (gas,) = _told(results[WORST])["draw without a panel"]
    record("F46", 1, f"{gas:,} gas: a draw all of whose 128 looks but a few meet holes", "584,000")
    assert gas <= 584_000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_forge_passes_every_solidity_test_of_the_thorough_tier(tmp_path: Path) -> None:
    results = forge(tmp_path, "thorough", 3580)
    runs = {name: sum(kind.get("runs", 0) for kind in found["kind"].values() if isinstance(kind, dict)) for name, found in results.items()}
    print({name: count for name, count in runs.items() if count})
    calls = {name: found["kind"]["Invariant"]["calls"] for name, found in results.items() if "Invariant" in found["kind"]}
    record("I1", sum(calls[name] for name in calls if "solvency" in name), "0 tokens short or over, contracts", "0")
    record("F43", sum("reentrant" in name for name in results), "0 gained by a token that calls back", "0")
    record("F44", sum("HostileToken" in name for name in results), "0 harmed but whom the token names", "0")
    record(
        "F45", runs["PaymentChannelsTest.testFuzz_donation_is_nobodys_and_changes_no_claim"], "0 units lost or gained by a donation", "0"
    )
    assert all(runs[name] == PROFILE["profile"]["thorough"]["invariant"]["runs"] for name in INVARIANTS)


def test_forge_tiers_grow_and_share_one_seed() -> None:
    tiers = [PROFILE, PROFILE["profile"]["thorough"], PROFILE["profile"]["deep"]]
    for kind in ("fuzz", "invariant"):
        runs = [tier[kind]["runs"] for tier in tiers]
        assert runs == sorted(set(runs))
    assert int(PROFILE["fuzz"]["seed"], 16)
    assert not any("seed" in tier[kind] for tier in tiers[1:] for kind in tier.keys() & {"fuzz", "invariant"})


def forge(folder: Path, profile: str, seconds: int) -> dict[str, dict[str, Any]]:
    """Every test's result by Contract.name; fails unless all of them pass. Builds in a folder of its own: several may run at once."""
    env = {**tools(), "FOUNDRY_PROFILE": profile, "FOUNDRY_OUT": str(folder / "out"), "FOUNDRY_CACHE_PATH": str(folder / "cache")}
    done = subprocess.run(["forge", "test", "--json", "-vv"], cwd=CONTRACTS, env=env, capture_output=True, text=True, timeout=seconds)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    results = {
        f"{where.split(':')[-1]}.{name.split('(')[0]}": found
        for where, suite in json.loads(lines[-1]).items()
        for name, found in suite["test_results"].items()
    }
    failed = {name: found.get("reason") for name, found in results.items() if found["status"] != "Success"}
    assert not failed, failed
    assert done.returncode == 0, done.stderr[-2000:]
    return results


def _told(result: dict[str, Any]) -> dict[str, list[int]]:
    """The figures that a Solidity test emitted as log_named_uint, by name."""
    found: dict[str, list[int]] = {}
    for line in result["decoded_logs"]:
        name, _, value = line.rpartition(": ")
        found.setdefault(name, []).append(int(value))
    return found

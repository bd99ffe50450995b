"""Proofs by symbolic execution, and static analysis in which each accepted finding is argued: halmos and slither, offline.

`make prove` and `make slither` run this file; so does `make test-all`.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from contracts_proofs import copy_of_contracts, halmos, replace, slither
from contracts_tools import CONTRACTS

from gpumarket.contracts.artifacts import artifact

ACCEPTED = CONTRACTS / "proofs" / "slither_accepted.toml"
PROVEN = 0
COUNTEREXAMPLE = 1
CHANNELS, REGISTRY = "PaymentChannels", "StakeRegistry"
BROKEN = [
    (CHANNELS, "check_redeem_pays", "if (actual != signer) revert NotSigner(id, actual);", ""),
    (CHANNELS, "check_redeemMany", "if (actual != signer) return (payee, 0, NotSigner.selector);", ""),
    (CHANNELS, "check_redeem_twice", "if (cumulative <= claimed) revert NothingToRedeem(id, cumulative, claimed);", ""),
    (CHANNELS, "check_close", "block.timestamp >= closesAt;", "block.timestamp + 1 >= closesAt;"),
    (REGISTRY, "check_slash", "to) external onlyDisputes nonReentrant", "to) external nonReentrant"),
    (REGISTRY, "check_withdraw", "Math.min(unbonding, lockable(operator))", "unbonding"),
    (REGISTRY, "check_lock", "if (amount > available) revert", "if (amount > available + 1) revert"),
]
"""(contract, proof, right, wrong): a proof that holds for the wrong code as well proves nothing."""


def test_proofs_write_the_storage_that_the_compiler_lays_out() -> None:
    layout = artifact("StakeRegistry").storage_layout
    slots = {variable["label"]: int(variable["slot"]) for variable in layout["variables"]}
    members = {m["label"]: (int(m["slot"]), m["offset"]) for m in layout["structs"]["StakeRegistry.Node"]}
    source = (CONTRACTS / "proofs" / "StakeRegistry.proof.sol").read_text()
    assert f"NODES_SLOT = {slots['_nodes']};" in source
    expected = {"owner": (0, 0), "roles": (0, 20), "stakedSince": (0, 21), "availableAt": (0, 26)}
    expected |= {"stake": (1, 0), "unbonding": (1, 12), "locked": (2, 0)}
    assert {name: members[name] for name in expected} == expected


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("contract", ["PaymentChannels", "StakeRegistry"])
def test_proofs_of_the_contracts_hold(tmp_path: Path, contract: str) -> None:
    source = (CONTRACTS / "proofs" / f"{contract}.proof.sol").read_text()
    found = halmos(copy_of_contracts(tmp_path), f"{contract}Proof")
    print(found)
    assert found == dict.fromkeys(re.findall(r"function (check_\w+)", source), PROVEN)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("contract", "proof", "right", "wrong"), BROKEN, ids=[row[1] for row in BROKEN])
def test_proof_of_broken_code_finds_the_counterexample(tmp_path: Path, contract: str, proof: str, right: str, wrong: str) -> None:
    root = copy_of_contracts(tmp_path)
    replace(root, f"src/{contract}.sol", right, wrong)
    (found,) = halmos(root, f"{contract}Proof", f"{proof}_").values()
    assert found == COUNTEREXAMPLE


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_slither_finds_nothing_but_what_is_argued(tmp_path: Path) -> None:
    entries = tomllib.loads(ACCEPTED.read_text())["accepted"]
    accepted = {(entry["detector"], where) for entry in entries for where in entry["where"]}
    found = {(one.detector, one.where): one.text for one in slither(copy_of_contracts(tmp_path))}
    new = {key: text for key, text in found.items() if key not in accepted}
    assert not new, "\n".join(f"{key}: {text}" for key, text in new.items())
    assert not accepted - found.keys(), f"accepted, but no longer found: {accepted - found.keys()}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_slither_sees_a_payout_that_anyone_can_redirect(tmp_path: Path) -> None:
    root = copy_of_contracts(tmp_path)
    right = "token.safeTransfer(to, amount);\n    }\n\n    // ------------------------------------------------------------------ closing"
    replace(root, "src/PaymentChannels.sol", right, right.replace("token.safeTransfer", "token.transfer"))
    assert "unchecked-transfer" in {one.detector for one in slither(root)}


def test_slither_acceptances_each_say_why() -> None:
    for entry in tomllib.loads(ACCEPTED.read_text())["accepted"]:
        assert entry.keys() == {"detector", "where", "why"}
        assert entry["where"]
        assert len(entry["why"].split()) >= 8

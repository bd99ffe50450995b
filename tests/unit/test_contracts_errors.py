"""Every error of our contracts is met by a test that names it; here those that a constructor or a strange token raises."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from contracts_fixtures import FAR, UNBONDING_SECONDS, Chain, contracts_chain
from web3.exceptions import ContractCustomError, ContractLogicError, Web3RPCError

from gpumarket.contracts.artifacts import artifact
from gpumarket.contracts.dispute_terms import DisputeTerms

__all__ = ["contracts_chain"]

ROOT = Path(__file__).resolve().parents[2]
TERMS = DisputeTerms.for_test_network(UNBONDING_SECONDS)
ONE_TO_EVERYTHING = "0x600160005260206000f3"
"""Code that answers 1 to any call: a token whose transfers succeed and move nothing."""


def test_errors_of_our_sources_are_each_named_in_a_test() -> None:
    declared = {
        name for file in (ROOT / "contracts" / "src").rglob("*.sol") for name in re.findall(r"^ +error (\w+)\(", file.read_text(), re.M)
    }
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    assert len(declared) > 50
    assert [name for name in sorted(declared) if not re.search(rf"\b{name}\b", tests)] == []


def test_errors_of_our_sources_are_each_in_an_artifact() -> None:
    """What is not in an ABI cannot be decoded by anybody."""
    declared = {
        name for file in (ROOT / "contracts" / "src").rglob("*.sol") for name in re.findall(r"^ +error (\w+)\(", file.read_text(), re.M)
    }
    artifacts = ROOT / "contracts" / "gpumarket" / "contracts" / "artifacts"
    known = {
        entry.get("name") for file in artifacts.glob("*.json") for entry in json.loads(file.read_text())["abi"] if entry["type"] == "error"
    }
    assert declared <= known


def refused_by_disputes(chain: Chain, registry: str, words: tuple[int, ...]) -> tuple[str, tuple[Any, ...]]:
    """(error, arguments) with which the constructor of Disputes reverts."""
    made = artifact("Disputes")
    factory = chain.w3.eth.contract(abi=made.abi, bytecode=made.bytecode)
    with pytest.raises((ContractCustomError, ContractLogicError, Web3RPCError)) as caught:
        factory.constructor(registry, words).estimate_gas({"from": chain.accounts[0].address})
    return chain.decode_error(caught.value)


@pytest.mark.parametrize(
    ("changed", "which"),
    [
        ({"burn_ppm": 499_999}, "burnPpm"),
        ({"bond_ppm": 1_000_001}, "bondPpm"),
        ({"panel_fee": 0}, "panelFee"),
        ({"no_show_fee": TERMS.panel_fee - 1}, "noShowFee"),
        ({"seat_stake": TERMS.no_show_fee - 1}, "seatStake"),
        ({"bond_minimum": 5 * TERMS.panel_fee - 1}, "bondMinimum"),
        ({"slash_multiple": TERMS.victim_multiple - 1}, "slashMultiple"),
        ({"slash_verifiers_min": 4}, "slashVerifiersMin"),
        ({"draw_delay_blocks": 129}, "drawDelayBlocks"),
        ({"commit_seconds": 0}, "commitSeconds"),
    ],
)
def test_terms_out_of_bounds_are_refused_as_invalid_terms(contracts_chain: Chain, changed: dict[str, int], which: str) -> None:
    error, arguments = refused_by_disputes(contracts_chain, contracts_chain.registry.address, replace(TERMS, **changed).words())
    assert error == "InvalidTerms"
    assert arguments[0].rstrip(b"\0").decode() == which


def test_disputes_over_a_registry_that_names_another_contract_is_refused_as_wrong_registry(contracts_chain: Chain) -> None:
    registry = contracts_chain.registry.address
    assert refused_by_disputes(contracts_chain, registry, TERMS.words()) == ("WrongRegistry", (registry.lower(),))


def test_token_that_moves_nothing_is_refused_as_unexpected_deposit(contracts_chain: Chain) -> None:
    chain, payer = contracts_chain, contracts_chain.accounts[1]
    chain.rich(payer)
    snapshot = chain.anvil.rpc("evm_snapshot")
    chain.anvil.rpc("anvil_setCode", chain.token.address, ONE_TO_EVERYTHING)
    try:
        call = chain.channels.functions.open(chain.accounts[2].address, payer.address, 1_000, FAR)
        assert chain.refused(call, payer) == ("UnexpectedDeposit", (1_000, 0))
    finally:
        chain.anvil.rpc("evm_revert", snapshot)

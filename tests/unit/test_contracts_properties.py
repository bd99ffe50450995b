"""PROPERTIES.md keeps up: its tests exist, public functions and constructor arguments appear, its values are the deployed ones."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from contracts_tools import CONTRACTS

from gpumarket.contracts.artifacts import CONTRACT_NAMES, artifact
from gpumarket.contracts.dispute_terms import DisputeTerms

ROOT = CONTRACTS.parent
PAGE = (CONTRACTS / "PROPERTIES.md").read_text()
SECTIONS = {title.split(" (")[0]: text for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)}
GATE = SECTIONS["What comes in"]
NAMED = sorted(set(re.findall(r"`((?:\w+\.)?(?:test|testFuzz|invariant|check)_\w+)`", PAGE)))


def solidity_tests() -> set[str]:
    """Contract.name of each Solidity test and proof."""
    found = set()
    for folder in ("test", "proofs"):
        for file in (CONTRACTS / folder).glob("*.sol"):
            contract = ""
            for line in file.read_text().splitlines():
                if declared := re.match(r"(?:abstract )?contract (\w+)", line):
                    contract = declared[1]
                if function := re.match(r"\s*function ((?:test|testFuzz|invariant|check)_\w+)", line):
                    found.add(f"{contract}.{function[1]}")
    return found


def python_tests() -> set[str]:
    return {
        name
        for file in Path(ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.M)
    }


def functions(name: str) -> set[str]:
    return {entry["name"] for entry in artifact(name).abi if entry["type"] == "function"}


def test_properties_name_only_tests_that_exist() -> None:
    known = solidity_tests() | python_tests()
    assert len(NAMED) >= 80
    assert not [name for name in NAMED if name not in known]


def test_properties_leave_no_invariant_or_proof_out() -> None:
    strong = {name for name in solidity_tests() if re.match(r"\w+\.(invariant|check)_", name)}
    assert strong <= set(NAMED)


def test_properties_rows_of_promises_each_name_a_test() -> None:
    tables = re.findall(r"^\| promise \| held by \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE, re.M)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) >= 30
    assert not [row for row in rows if not re.search(r"`[\w.]*(?:test|testFuzz|invariant|check)_", row)]


@pytest.mark.parametrize("name", CONTRACT_NAMES)
def test_properties_list_every_public_function_and_no_other(name: str) -> None:
    gate = (
        functions("PaymentChannels")
        & functions("StakeRegistry")
        & {"pauseEntry", "guardian", "entryPaused", "positionMax", "totalMax", "token"}
    )
    inherits = name in ("PaymentChannels", "StakeRegistry")
    assert not [function for function in gate if f"`{function}`" not in GATE]
    own = functions(name) - (gate if inherits else set())
    assert not [function for function in own if f"`{function}`" not in SECTIONS[name]]
    listed = {word for row in re.findall(r"^\| (`.+?) \| .+ \|.*\|$", SECTIONS[name], re.M) for word in re.findall(r"`(\w+)`", row)}
    assert not listed - functions(name) - arguments(name)


def arguments(name: str) -> set[str]:
    inputs = [item for entry in artifact(name).abi if entry["type"] == "constructor" for item in entry["inputs"]]
    return {item["name"] for item in inputs} | {part["name"] for item in inputs for part in item.get("components", ())}


@pytest.mark.parametrize("name", ["PaymentChannels", "StakeRegistry"])
def test_properties_give_a_reason_for_every_constructor_argument(name: str) -> None:
    assert not [one for one in arguments(name) - {"token_"} if f"`{one}`" not in SECTIONS[name] + GATE]


def test_properties_give_every_term_of_disputes_with_its_default_and_reason() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", SECTIONS["Disputes"].split("| argument | default | reason |")[1], re.M)
    assert {name: value for name, value, _ in rows} == {_camel(f.name): _shown(f.name, int(f.default)) for f in fields(DisputeTerms)}  # type: ignore[arg-type]
    assert {name for name, _, _ in rows} == arguments("Disputes") - {"registry_", "terms_"}
    assert all(len(reason.split()) >= 6 for _, _, reason in rows)


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


def _shown(name: str, value: int) -> str:
    if name.endswith("_ppm"):
        return f"{value:,} ppm"
    if name.endswith("_seconds"):
        return f"{value:,} s"
    return f"{value // 10**18:,} tokens" if value >= 10**15 else f"{value:,}"

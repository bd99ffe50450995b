"""halmos and slither on a copy of contracts/, for tests: their environment is made by `make contracts/.cache/proofs/.installed`.

A copy, because both build with forge: several may run at once, a test may break the copy on purpose, and no build output is shared.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts_tools import CONTRACTS, tools

PROOFS = CONTRACTS / ".cache" / "proofs" / "bin"
SECONDS_MAX = 1_200
_COPIED = ("src", "test", "proofs", "foundry.toml", "solc.js", "package.json")
_HALMOS = ("--forge-build-out", "out/proofs", "--solver", "yices", "--no-status", "--json-output", "halmos.json")
_SLITHER = ("--filter-paths", "node_modules/", "--foundry-out-directory", "out", "--json", "slither.json")


@dataclass(frozen=True)
class Finding:
    """What slither says of one place."""

    detector: str
    where: str
    """Contract.function, Contract.variable, or Contract."""
    text: str


def copy_of_contracts(folder: Path) -> Path:
    """A copy of contracts/ in which forge, halmos and slither run."""
    root = folder / "contracts"
    root.mkdir(parents=True)
    for name in _COPIED:
        source = CONTRACTS / name
        if source.is_dir():
            shutil.copytree(source, root / name)
        else:
            shutil.copy(source, root / name)
    tools()
    (root / "node_modules").symlink_to(CONTRACTS / "node_modules")
    return root


def replace(root: Path, file: str, old: str, new: str) -> None:
    """Change one place of a copy's source; fails when it is not there exactly once."""
    text = (root / file).read_text()
    assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
    (root / file).write_text(text.replace(old, new))


def halmos(root: Path, contract: str, function: str = "check_") -> dict[str, int]:
    """Exit code of each proof by name: 0 proven, 1 counterexample, others (timeout, stuck, ...) unproven."""
    _run(root, "halmos", *_HALMOS, "--contract", contract, "--function", function, FOUNDRY_PROFILE="proofs")
    results = json.loads((root / "halmos.json").read_text())["test_results"]
    return {one["name"].split("(")[0]: one["exitcode"] for suite in results.values() for one in suite}


def slither(root: Path) -> list[Finding]:
    """Everything that slither finds in our own sources."""
    said = _run(root, "slither", ".", *_SLITHER)
    assert (root / "slither.json").exists(), said
    document = json.loads((root / "slither.json").read_text())
    assert document["success"], said
    return [_finding(item) for item in document["results"].get("detectors", ())]


def _finding(item: dict[str, Any]) -> Finding:
    element = item["elements"][0]
    parent = element.get("type_specific_fields", {}).get("parent", {})
    while parent and parent["type"] not in ("contract", "file"):
        element, parent = parent, parent.get("type_specific_fields", {}).get("parent", {})
    owner = f"{parent['name']}." if parent and parent["type"] == "contract" else ""
    return Finding(item["check"], owner + element["name"], item["description"])


def _run(root: Path, program: str, *arguments: str, **environment: str) -> str:
    assert (PROOFS / program).exists(), f"{program} is not installed: run make contracts/.cache/proofs/.installed"
    env = tools()
    env = {**env, "PATH": os.pathsep.join((str(PROOFS), env["PATH"])), **environment}
    done = subprocess.run([str(PROOFS / program), *arguments], cwd=root, env=env, capture_output=True, text=True, timeout=SECONDS_MAX)
    return (done.stdout + done.stderr)[-6000:]

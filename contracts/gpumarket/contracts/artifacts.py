"""What the Solidity of contracts/src compiles to: ABI, bytecode, and how to recognise the code on a chain.

Invariant: the JSON files beside this module are exactly what `node compile.cjs` writes from the committed sources; a test recompiles and
compares. This module never compiles: users need neither Node nor solc.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from gpumarket.core.errors import ConfigError

CONTRACT_NAMES: Final = ("Disputes", "MarketToken", "PaymentChannels", "StakeRegistry")


@dataclass(frozen=True, slots=True)
class Artifact:
    """One compiled contract."""

    name: str
    abi: list[dict[str, Any]]
    bytecode: bytes
    """Creation code, before the constructor's arguments."""
    deployed_bytecode: bytes
    """Runtime code with zeros where the constructor writes immutables."""
    immutables: tuple[tuple[int, int], ...]
    """(start, length) in bytes of each place in the runtime code that the constructor fills in."""
    storage_layout: Mapping[str, Any]
    """Variables by slot, and the members of each struct."""
    compiler: str
    source_hash: str
    """SHA-256 over the names and contents of the contract's source and all that it imports, OpenZeppelin's included."""

    def matches(self, runtime: bytes) -> bool:
        """Whether code read from a chain is this contract's, whatever its immutables hold."""
        return len(runtime) == len(self.deployed_bytecode) and self._masked(runtime) == self._masked(self.deployed_bytecode)

    def _masked(self, code: bytes) -> bytes:
        masked = bytearray(code)
        for start, length in self.immutables:
            masked[start : start + length] = bytes(length)
        return bytes(masked)


@cache
def artifact(name: str) -> Artifact:
    """The artifact of one of CONTRACT_NAMES. Raises ConfigError for another name or a damaged installation."""
    if name not in CONTRACT_NAMES:
        raise ConfigError(f"there is no contract named {name!r}", hint=f"known contracts: {', '.join(CONTRACT_NAMES)}")
    try:
        text = (importlib.resources.files("gpumarket.contracts") / "artifacts" / f"{name}.json").read_text("utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"the compiled contract {name} is missing from this installation", hint="reinstall gpumarket") from error
    return _parsed(json.loads(text))


def _parsed(document: Mapping[str, Any]) -> Artifact:
    return Artifact(
        name=document["name"],
        abi=document["abi"],
        bytecode=bytes.fromhex(document["bytecode"].removeprefix("0x")),
        deployed_bytecode=bytes.fromhex(document["deployedBytecode"].removeprefix("0x")),
        immutables=tuple((place["start"], place["length"]) for place in document["immutableReferences"]),
        storage_layout=document["storageLayout"],
        compiler=document["compiler"],
        source_hash=document["sourceHash"],
    )

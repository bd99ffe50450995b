"""Reverts by name: the selector and arguments of a custom error, from the ABIs of our contracts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from gpumarket.contracts.artifacts import CONTRACT_NAMES, artifact

_REASON = bytes.fromhex("08c379a0")  # Error(string)
_PANIC = bytes.fromhex("4e487b71")  # Panic(uint256)


def revert_text(data: object) -> str:
    """`NotPayer(id=0x…, caller=0x…)` of a revert's return data (bytes, or hex as nodes give it); the raw hex when nobody knows it."""
    raw = _as_bytes(data)
    if len(raw) < 4:
        return "no reason given"
    from eth_abi.abi import decode

    selector, body = raw[:4], raw[4:]
    if selector == _REASON:
        return str(decode(["string"], body)[0])
    if selector == _PANIC:
        return f"panic 0x{decode(['uint256'], body)[0]:02x}"
    known = _errors().get(selector)
    if known is None:
        return f"unknown error 0x{raw.hex()}"
    name, fields = known
    values = decode([kind for _, kind in fields], body)
    return f"{name}({', '.join(f'{field}={_shown(value)}' for (field, _), value in zip(fields, values, strict=True))})"


@cache
def _errors() -> dict[bytes, tuple[str, Sequence[tuple[str, str]]]]:
    from eth_utils.abi import function_signature_to_4byte_selector

    found: dict[bytes, tuple[str, Sequence[tuple[str, str]]]] = {}
    for contract in CONTRACT_NAMES:
        for entry in artifact(contract).abi:
            if entry["type"] == "error":
                fields = [(item["name"], item["type"]) for item in entry["inputs"]]
                signature = f"{entry['name']}({','.join(kind for _, kind in fields)})"
                found[function_signature_to_4byte_selector(signature)] = (entry["name"], fields)
    return found


def _as_bytes(data: object) -> bytes:
    if isinstance(data, bytes):
        return data
    if isinstance(data, str) and data.startswith("0x"):
        return bytes.fromhex(data[2:])
    return b""


def _shown(value: Any) -> str:
    return f"0x{value.hex()}" if isinstance(value, bytes) else str(value)

"""Writes docs/contracts: the contracts' ABIs, and the schema of every signed statement, for programs that are not ours.

    python tools/publish_contracts.py

What is published follows from the artifacts and from gpumarket.core.terms alone; a test compares. Nothing here is read by gpumarket itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpumarket.contracts.artifacts import CONTRACT_NAMES, artifact
from gpumarket.core import terms as all_terms
from gpumarket.core.signing import channels_domain, market_domain
from gpumarket.core.terms import Close, Voucher
from gpumarket.core.typed_data import Term
from gpumarket.core.units import Address, Hash, Money

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "contracts"
DOMAIN_FIELDS = [
    {"name": "name", "type": "string"},
    {"name": "version", "type": "string"},
    {"name": "chainId", "type": "uint256"},
    {"name": "verifyingContract", "type": "address"},
]
EXAMPLE_CHAIN, EXAMPLE_CONTRACT = 31337, Address(b"\x22" * 20)
EXAMPLE = Voucher(Hash(b"\x33" * 32), Money(1_500_000_000_000_000_000))


def documents() -> dict[str, str]:
    """Text of each published file by its path below docs/contracts."""
    abis = {f"abi/{name}.json": _text(artifact(name).abi) for name in CONTRACT_NAMES}
    return {**abis, "typed-data.json": _text(_schema()), "voucher.example.json": _text(_example())}


def main() -> None:
    for path, text in documents().items():
        target = FOLDER / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def _schema() -> dict[str, Any]:
    nowhere = Address(bytes(20))
    domains = {"market": (market_domain(1, nowhere), "StakeRegistry"), "channels": (channels_domain(1, nowhere), "PaymentChannels")}
    terms = sorted((found for found in vars(all_terms).values() if _is_term(found)), key=lambda term: term.__name__)
    return {
        "domains": {name: {"name": d.name, "version": d.version, "verifyingContract": at} for name, (d, at) in domains.items()},
        "domainOf": {term.__name__: "channels" if term in (Voucher, Close) else "market" for term in terms},
        "types": {"EIP712Domain": DOMAIN_FIELDS, **{term.__name__: term.typed_fields() for term in terms}},
        "typeHashes": {term.__name__: "0x" + term.TYPE_HASH.hex() for term in terms},
    }


def _is_term(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, Term) and found is not Term


def _example() -> dict[str, Any]:
    """A voucher as eth_signTypedData_v4 and `cast wallet sign --data` take it."""
    domain = channels_domain(EXAMPLE_CHAIN, EXAMPLE_CONTRACT)
    return {
        "types": {"EIP712Domain": DOMAIN_FIELDS, "Voucher": Voucher.typed_fields()},
        "primaryType": "Voucher",
        "domain": {
            "name": domain.name,
            "version": domain.version,
            "chainId": EXAMPLE_CHAIN,
            "verifyingContract": "0x" + EXAMPLE_CONTRACT.hex(),
        },
        "message": {"channel": "0x" + EXAMPLE.channel.hex(), "cumulative": str(EXAMPLE.cumulative)},
    }


def _text(document: Any) -> str:
    return json.dumps(document, indent=1) + "\n"


if __name__ == "__main__":
    main()

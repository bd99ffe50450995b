"""The receipt file: JSON, every statement spelled out field by field beside its signature, so that any EIP-712 tool can check it too.

Amounts are integers of base units, bytes are 0x hex. A file is a stranger's: bounded in size and depth, and whatever is not expected in it
is refused. Reading judges nothing; `proof.verify` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from gpumarket.core import hostile_json
from gpumarket.core.errors import BadReceipt
from gpumarket.core.terms import Ack, JobSpec, Lease, Receipt, Term
from gpumarket.core.units import Address, Hash, Money

T = TypeVar("T", bound=Term)
FORMAT, VERSION = "gpumarket-receipt", 1
FILE_BYTES_MAX = 64 << 20
ATTEMPTS_MAX = 64


@dataclass(frozen=True, slots=True)
class SignedAttempt:
    """One attempt. `amount` is what the client pays for it, fee included, as the file states it."""

    lease: Lease
    lease_signature: bytes
    ack: Ack | None
    ack_signature: bytes
    receipt: Receipt | None
    receipt_signature: bytes
    amount: Money


@dataclass(frozen=True, slots=True)
class Content:
    """What the hashes stand for: present only where the client put it in. `output` are the items of the output chain."""

    salt: Hash
    request: bytes
    output: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A receipt file's content. Chain and contracts are what the signatures are bound to."""

    chain_id: int
    registry: Address
    spec: JobSpec
    constraints: bytes
    order_signature: bytes
    attempts: tuple[SignedAttempt, ...]
    content: Content | None = None


def to_json(document: Document) -> str:
    """The file's text."""
    content = document.content
    return json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "chain_id": document.chain_id,
            "registry": _hex(document.registry),
            "order": {
                "spec": _fields(document.spec),
                "constraints": _hex(document.constraints),
                "signature": _hex(document.order_signature),
            },
            "attempts": [_attempt_json(attempt) for attempt in document.attempts],
            "content": None
            if content is None
            else {"salt": _hex(content.salt), "request": _hex(content.request), "output": [_hex(item) for item in content.output]},
        },
        indent=2,
    )


def from_json(raw: bytes) -> Document:
    """The document in a file. Raises BadReceipt naming what is not as it must be."""
    if len(raw) > FILE_BYTES_MAX:
        raise BadReceipt(f"the file has {len(raw)} bytes; a receipt has at most {FILE_BYTES_MAX}")
    try:
        whole = _keys(hostile_json.loads(raw), "format", "version", "chain_id", "registry", "order", "attempts", "content")
        if (whole["format"], whole["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {whole['format']!r}, version {whole['version']!r}, not {FORMAT!r}, {VERSION}")
        order = _keys(whole["order"], "spec", "constraints", "signature")
        if not isinstance(whole["attempts"], list) or not 1 <= len(whole["attempts"]) <= ATTEMPTS_MAX:
            raise ValueError(f"attempts are a list of 1 to {ATTEMPTS_MAX}")
        return Document(
            chain_id=_uint(whole["chain_id"]),
            registry=Address(_bytes(whole["registry"], 20)),
            spec=_term(JobSpec, order["spec"]),
            constraints=_bytes(order["constraints"]),
            order_signature=_bytes(order["signature"], 65),
            attempts=tuple(_attempt(entry) for entry in whole["attempts"]),
            content=None if whole["content"] is None else _content(whole["content"]),
        )
    except ValueError as error:
        raise BadReceipt(f"this is no receipt file: {error}", hint="gpumarket receipt save JOB FILE writes one") from error


def _attempt_json(attempt: SignedAttempt) -> dict[str, Any]:
    return {
        "lease": _signed_json(attempt.lease, attempt.lease_signature),
        "ack": _signed_json(attempt.ack, attempt.ack_signature),
        "receipt": _signed_json(attempt.receipt, attempt.receipt_signature),
        "amount": attempt.amount,
    }


def _attempt(entry: Any) -> SignedAttempt:
    values = _keys(entry, "lease", "ack", "receipt", "amount")
    lease, lease_signature = _signed(Lease, values["lease"])
    if lease is None:
        raise ValueError("an attempt without a lease")
    ack, ack_signature = _signed(Ack, values["ack"])
    receipt, receipt_signature = _signed(Receipt, values["receipt"])
    return SignedAttempt(lease, lease_signature, ack, ack_signature, receipt, receipt_signature, Money(_uint(values["amount"])))


def _content(entry: Any) -> Content:
    values = _keys(entry, "salt", "request", "output")
    if not isinstance(values["output"], list):
        raise ValueError("output is a list of items")
    return Content(Hash(_bytes(values["salt"], 32)), _bytes(values["request"]), tuple(_bytes(item) for item in values["output"]))


def _signed_json(term: Term | None, signature: bytes) -> dict[str, Any] | None:
    return None if term is None else {**_fields(term), "signature": _hex(signature)}


def _signed(cls: type[T], entry: Any) -> tuple[T | None, bytes]:
    if entry is None:
        return None, b""
    if not isinstance(entry, Mapping) or "signature" not in entry:
        raise ValueError(f"a {cls.__name__} without a signature")
    return _term(cls, {k: v for k, v in entry.items() if k != "signature"}), _bytes(entry["signature"], 65)


def _fields(term: Term) -> dict[str, Any]:
    return {name: _hex(value) if isinstance(value, bytes) else value for (name, _), value in zip(term.WORDS, term.plain(), strict=True)}


def _term(cls: type[T], entry: Any) -> T:
    values = _keys(entry, *(name for name, _ in cls.WORDS))
    read: dict[str, Any] = {}
    for name, word in cls.WORDS:
        value = values[name]
        if word.solidity in ("address", "bytes32"):
            value = _bytes(value, 20 if word.solidity == "address" else 32)
        elif word.solidity != "bool":
            value = _uint(value)
        read[name] = value
    for name, kind in cls.ENUMS:
        read[name] = kind(read[name])
    return cls(**read)


def _keys(entry: Any, *names: str) -> Mapping[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"an object with {', '.join(names)} is missing")
    if odd := set(entry) ^ set(names):
        raise ValueError(f"{', '.join(sorted(odd)[:3])} {'are' if len(odd) > 1 else 'is'} missing or not known here")
    return entry


def _uint(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _bytes(value: Any, size: int | None = None) -> bytes:
    if not isinstance(value, str) or not value.startswith("0x"):
        raise ValueError(f"{str(value)[:80]!r} is not 0x hex")
    raw = bytes.fromhex(value[2:])
    if size is not None and len(raw) != size:
        raise ValueError(f"{value[:80]!r} has {len(raw)} bytes, not {size}")
    return raw


def _hex(raw: bytes) -> str:
    return "0x" + raw.hex()

"""The signing guard as a file to take along: per channel the highest amount ever released for signature (in the spirit of EIP-3076).

With it go a client's spending of the last day, so that the day's cap does not begin anew, and a scheduler's channels to whose close it has
consented, so that no order is taken on them again.

It is signed by the key that it guards, so a file of another key, chain or contract, or a changed one, is refused: a forged file could make
its reader sign for amounts that nobody ever owed. Never: an amount lowered by an import.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpumarket.core import hostile_json
from gpumarket.core.errors import BadSignature, WalletError
from gpumarket.core.signing import Signer, recover
from gpumarket.core.terms import keccak256
from gpumarket.core.units import MONEY_MAX, Address, Hash, Money, hex0x, parse_address, parse_hash

FORMAT, VERSION = "gpumarket-guard", 1
FILE_BYTES_MAX = 16 << 20
CLIENT, SCHEDULER = "client", "scheduler"
_PREFIX = b"gpumarket guard export\n"
"""What is signed begins with it: no typed data (0x1901) and no personal message (0x19) ever does."""


@dataclass(frozen=True, slots=True)
class GuardedChannel:
    """One channel: who is paid, the highest amount signed, and what ended jobs cost by the exporter's own acks."""

    channel: Hash
    payee: Address
    cumulative: Money
    billed: Money


@dataclass(frozen=True, slots=True)
class ConsentedClose:
    """A channel that pays the key, which has signed its close at `used`; with the newest voucher on it."""

    channel: Hash
    payer: Address
    signer: Address
    used: Money
    voucher: Money
    signature: bytes


@dataclass(frozen=True, slots=True)
class Guarded:
    """Everything in a file. `spent`: unix second (beginning of its minute) → amount; `limit`: the day's cap, None for none."""

    channels: Sequence[GuardedChannel]
    closes: Sequence[ConsentedClose] = ()
    spent: Mapping[int, Money] = field(default_factory=dict)
    limit: Money | None = None


@dataclass(frozen=True, slots=True)
class Scope:
    """What a guard is of: one key in one role on one contract of one chain."""

    chain_id: int
    contract: Address
    signer: Address
    role: str = CLIENT


def export(scope: Scope, guarded: Guarded, now: int, signer: Signer) -> str:
    """The file's text, signed. `now` (unix seconds) is for people."""
    body = {
        "format": FORMAT,
        "version": VERSION,
        "role": scope.role,
        "chain_id": scope.chain_id,
        "contract": hex0x(scope.contract),
        "signer": hex0x(scope.signer),
        "exported_at": now,
        "channels": [
            {"channel": hex0x(c.channel), "payee": hex0x(c.payee), "cumulative": c.cumulative, "billed": c.billed}
            for c in sorted(guarded.channels, key=lambda c: c.channel)
        ],
        "closes": [
            {
                "channel": hex0x(c.channel),
                "payer": hex0x(c.payer),
                "signer": hex0x(c.signer),
                "used": c.used,
                "voucher": c.voucher,
                "signature": hex0x(c.signature),
            }
            for c in sorted(guarded.closes, key=lambda c: c.channel)
        ],
        "spent": [[at, amount] for at, amount in sorted(guarded.spent.items())],
        "limit": guarded.limit,
    }
    return json.dumps({**body, "signature": hex0x(signer.sign_digest(_digest(body)))}, indent=2) + "\n"


def read(raw: bytes, scope: Scope) -> Guarded:
    """What an export of this very key, role, contract and chain holds. Raises WalletError or BadSignature."""
    try:
        body, signature = _signed_body(raw)
        found = Scope(int(body["chain_id"]), parse_address(body["contract"]), parse_address(body["signer"]), str(body["role"]))
        limit = body["limit"]
        guarded = Guarded(
            [_channel(entry) for entry in body["channels"]],
            [_close(entry) for entry in body["closes"]],
            {_whole(at): _money(amount) for at, amount in body["spent"]},
            None if limit is None else _money(limit),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WalletError(f"this is no guard export: {error}", hint="gpumarket guard export FILE writes one") from error
    for name, theirs, ours in (
        ("chain", found.chain_id, scope.chain_id),
        ("contract", hex0x(found.contract), hex0x(scope.contract)),
        ("key", hex0x(found.signer), hex0x(scope.signer)),
        ("role", found.role, scope.role),
    ):
        if theirs != ours:
            raise WalletError(f"this guard is of {name} {theirs}; here it is {ours}", hint="import it where its key is used")
    if recover(_digest(body), signature) != scope.signer:
        raise BadSignature("this guard export was changed, or not made by the key that it names")
    return guarded


def _signed_body(raw: bytes) -> tuple[Mapping[str, Any], bytes]:
    if len(raw) > FILE_BYTES_MAX:
        raise ValueError(f"it has more than {FILE_BYTES_MAX} bytes")
    document = dict(hostile_json.loads(raw))
    signature = bytes.fromhex(document.pop("signature").removeprefix("0x"))
    if (document["format"], document["version"]) != (FORMAT, VERSION):
        raise ValueError(f"format {document['format']!r}, version {document['version']!r}, not {FORMAT!r}, {VERSION}")
    return document, signature


def _channel(entry: Mapping[str, Any]) -> GuardedChannel:
    return GuardedChannel(parse_hash(entry["channel"]), parse_address(entry["payee"]), _money(entry["cumulative"]), _money(entry["billed"]))


def _close(entry: Mapping[str, Any]) -> ConsentedClose:
    used, voucher = _money(entry["used"]), _money(entry["voucher"])
    if used > voucher:
        raise ValueError(f"{used} used of a voucher of {voucher}")
    parties = (parse_address(entry["payer"]), parse_address(entry["signer"]))
    return ConsentedClose(parse_hash(entry["channel"]), *parties, used, voucher, bytes.fromhex(entry["signature"].removeprefix("0x")))


def _money(amount: Any) -> Money:
    if _whole(amount) > MONEY_MAX:
        raise ValueError(f"{amount} is not an amount")
    return Money(amount)


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is not a number from 0")
    return number


def _digest(body: Mapping[str, Any]) -> Hash:
    return keccak256(_PREFIX + json.dumps(body, sort_keys=True, separators=(",", ":")).encode())

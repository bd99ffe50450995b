"""Writes typed_data.json: what every signed term must hash and sign to, by eth-account alone (none of our code is asked).

    python tests/vectors/make_typed_data.py

The type strings are written out by hand: they are the contract with other implementations, and a change to one is a change of the protocol.
The key is the first of the public test mnemonic ("test test ... junk"); it holds play money only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eth_account import Account
from eth_account.messages import encode_typed_data
from eth_utils.crypto import keccak

SECRET = "0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80"
CHAIN_ID = 31337
REGISTRY = "0x" + "11" * 20
CHANNELS = "0x" + "22" * 20
MARKET = {"name": "gpumarket", "version": "1", "chainId": CHAIN_ID, "verifyingContract": REGISTRY}
PAYMENTS = {"name": "gpumarket PaymentChannels", "version": "1", "chainId": CHAIN_ID, "verifyingContract": CHANNELS}
MONEY_MAX = 2**96 - 1

TYPES = {
    "Offer": "address provider,bytes32 contentHash,uint64 sequence,uint64 expiresAt",
    "JobSpec": "address client,address scheduler,bytes32 jobId,uint8 task,bytes32 model,bytes32 requestHash,uint32 promptUnits,"
    "uint32 maxOutputUnits,uint96 maxAmount,bytes32 constraintsHash,bytes32 profile,uint64 deadline",
    "Lease": "bytes32 job,bytes32 spec,uint32 attempt,address client,address scheduler,address provider,bytes32 model,uint8 task,"
    "uint96 promptPricePerMtok,uint96 outputPricePerMtok,uint96 maximum,uint32 feePpm,bytes32 clientChannel,bytes32 providerChannel,"
    "bytes32 profile,uint32 windowUnits,uint32 prefixUnits,bytes32 prefixHash,uint64 issuedAt,uint64 deadline",
    "Ack": "bytes32 lease,uint32 units,bytes32 outputHash,bool complete,bool willCheck",
    "Receipt": "bytes32 lease,bytes32 nonce,bytes32 requestHash,bytes32 outputHash,uint32 prefixUnits,bytes32 prefixHash,"
    "uint32 promptUnits,uint32 outputUnits,uint8 outcome,uint64 finishedAt",
    "Voucher": "bytes32 channel,uint96 cumulative",
    "Close": "bytes32 channel,uint96 cumulative",
    "Call": "bytes32 method,address caller,address audience,bytes32 bodyHash,uint64 issuedAt,bytes32 nonce",
    "Delegation": "bytes32 lease,address challenger",
    "Profile": "uint8 task,bytes32 dtypeHash,bytes32 runtimeHash,bytes32 providerGpuClassHash,bytes32 checkerGpuClassHash,"
    "uint64 maxAbsDiffNano,uint64 acceptMeanGapMicro,uint64 rejectMeanGapMicro,uint32 grossGapMilli,uint32 grossSharePpm,uint32 minUnits",
}
TASKS = (1, 3, 5)
OUTCOMES = (1, 2, 3, 4, 5)


def value(name: str, field: str, kind: str, edge: bool) -> Any:
    """A value of a field: from its name (so that swapped fields show), or at the top of its range."""
    seed = keccak(text=f"{name}.{field}")
    if kind == "bytes32":
        return "0x" + (b"\xff" * 32 if edge else seed).hex()
    if kind == "address":
        return "0x" + (b"\xff" * 20 if edge else seed[:20]).hex()
    if kind == "bool":
        return True
    if kind == "uint8":
        choices = TASKS if field == "task" else OUTCOMES
        return choices[-1] if edge else choices[seed[0] % len(choices)]
    bits = int(kind[4:])
    if edge:
        return 2**bits - 1
    return int.from_bytes(seed[:4], "big") % 1_000_000 + (0 if field.startswith("accept") else 1)


def vector(name: str, edge: bool) -> dict[str, Any]:
    fields = [dict(zip(("type", "name"), part.split(" "), strict=True)) for part in TYPES[name].split(",")]
    domain = PAYMENTS if name in ("Voucher", "Close") else MARKET
    message = {f["name"]: value(name, f["name"], f["type"], edge) for f in fields}
    signable = encode_typed_data(domain, {name: fields}, message)
    signed = Account.sign_message(signable, SECRET)
    type_string = f"{name}({TYPES[name]})"
    return {
        "term": name,
        "case": "edge" if edge else "plain",
        "type": type_string,
        "typeHash": "0x" + keccak(text=type_string).hex(),
        "domain": domain,
        "domainSeparator": "0x" + signable.header.hex(),
        "message": {k: str(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in message.items()},
        "structHash": "0x" + signable.body.hex(),
        "digest": "0x" + keccak(b"\x19" + signable.version + signable.header + signable.body).hex(),
        "signature": "0x" + bytes(signed.signature).hex(),
    }


def document() -> dict[str, Any]:
    """The whole file. Integers of messages are decimal text: JSON numbers end at 2^53."""
    vectors = [vector(name, edge) for name in TYPES for edge in (False, True)]
    return {"secret": SECRET, "signer": Account.from_key(SECRET).address, "vectors": vectors}


def main() -> None:
    path = Path(__file__).with_name("typed_data.json")
    path.write_text(json.dumps(document(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

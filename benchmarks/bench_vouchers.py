"""Vouchers a second of one core, and the same through eth-account in the same run.

Counted in CPU seconds of this process, so that other work on the machine does not count against either side.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from eth_account import Account
from eth_account.messages import encode_typed_data

from gpumarket.core.signing import LocalKey, channels_domain
from gpumarket.core.units import Address, Hash
from gpumarket.settlement.vouchers import sign_voucher, verify_voucher

ROUNDS = 5
BATCH = 4_000
PEER_BATCH = 150
KEY = LocalKey(b"\5" * 32)
DOMAIN = channels_domain(31337, Address(b"\x22" * 20))
CHANNEL = Hash(b"\x33" * 32)
FIELDS = {"Voucher": [{"name": "channel", "type": "bytes32"}, {"name": "cumulative", "type": "uint96"}]}
DATA = {"name": DOMAIN.name, "version": DOMAIN.version, "chainId": DOMAIN.chain_id, "verifyingContract": "0x" + "22" * 20}


def run() -> list[dict[str, Any]]:
    """name, value, unit, compared_with: best of ROUNDS, each voucher another amount."""
    signatures = [sign_voucher(KEY, DOMAIN, CHANNEL, i) for i in range(BATCH)]
    theirs = [_peer_sign(i) for i in range(PEER_BATCH)]
    assert [bytes(s.signature) for s in theirs] == signatures[:PEER_BATCH]
    sign = _rate(BATCH, lambda i: sign_voucher(KEY, DOMAIN, CHANNEL, i))
    recover = _rate(BATCH, lambda i: verify_voucher(DOMAIN, CHANNEL, i, signatures[i], KEY.address))
    peer_sign = _rate(PEER_BATCH, _peer_sign)
    peer_recover = _rate(PEER_BATCH, lambda i: Account.recover_message(_typed(i), signature=signatures[i]))
    return [
        _result("voucher_sign_per_s", sign, f"eth-account sign_typed_data, same run: {peer_sign:,.0f}/s"),
        _result("voucher_recover_per_s", recover, f"eth-account recover_message, same run: {peer_recover:,.0f}/s"),
    ]


def _rate(count: int, work: Callable[[int], Any]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        for i in range(count):
            work(i)
        best = min(best, time.process_time() - start)
    return count / best


def _typed(cumulative: int) -> Any:
    return encode_typed_data(DATA, FIELDS, {"channel": CHANNEL, "cumulative": cumulative})


def _peer_sign(cumulative: int) -> Any:
    return Account.sign_message(_typed(cumulative), KEY.secret)


def _result(name: str, value: float, compared_with: str) -> dict[str, Any]:
    return {"name": name, "value": round(value), "unit": "1/s of one core", "compared_with": compared_with}


if __name__ == "__main__":
    for line in run():
        print(line)

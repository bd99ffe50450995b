"""Vouchers on the fast route: two keccaks over prepared bytes and one libsecp256k1 call, byte-equal to eth-account.

Never signs on its own account: whoever calls `sign_voucher` has advanced the channel's guard (`gpumarket.settlement.guard`) in a committed
transaction first, because a payer's key must never sign two statements for one (channel, cumulative) or a lower one (I3).
"""

from __future__ import annotations

from gpumarket.core.errors import BadSignature
from gpumarket.core.signing import Domain, Signer, recover
from gpumarket.core.terms import Close, Voucher, keccak256
from gpumarket.core.units import MONEY_MAX, Address, Hash

_VOUCHER, _CLOSE = bytes(Voucher.TYPE_HASH), bytes(Close.TYPE_HASH)


def voucher_digest(domain: Domain, channel: Hash, cumulative: int) -> Hash:
    """What a payer signs to owe `cumulative` base units in all on `channel` (EIP-712). Raises ValueError outside bytes32 and uint96."""
    return _digest(domain, _VOUCHER, channel, cumulative)


def close_digest(domain: Domain, channel: Hash, cumulative: int) -> Hash:
    """What a payee signs to let the payer close at `cumulative` base units in all. Raises ValueError outside bytes32 and uint96."""
    return _digest(domain, _CLOSE, channel, cumulative)


def sign_voucher(signer: Signer, domain: Domain, channel: Hash, cumulative: int) -> bytes:
    """65-byte signature r | s | v of a voucher. The guard was advanced to `cumulative` and committed before (I2, I3)."""
    return signer.sign_digest(_digest(domain, _VOUCHER, channel, cumulative))


def sign_close(signer: Signer, domain: Domain, channel: Hash, cumulative: int) -> bytes:
    """65-byte signature of the payee's consent to close at `cumulative`."""
    return signer.sign_digest(_digest(domain, _CLOSE, channel, cumulative))


def verify_voucher(domain: Domain, channel: Hash, cumulative: int, signature: bytes, signer: Address) -> None:
    """Raises BadSignature unless `signer` signed this voucher in this domain."""
    _verify(_digest(domain, _VOUCHER, channel, cumulative), signature, signer, "the voucher")


def verify_close(domain: Domain, channel: Hash, cumulative: int, signature: bytes, payee: Address) -> None:
    """Raises BadSignature unless `payee` consented to this close in this domain."""
    _verify(_digest(domain, _CLOSE, channel, cumulative), signature, payee, "the close")


def _digest(domain: Domain, type_hash: bytes, channel: bytes, cumulative: int) -> Hash:
    if len(channel) != 32 or not 0 <= cumulative <= MONEY_MAX:
        raise ValueError(f"not a voucher's channel and amount: {channel.hex()}, {cumulative}")
    struct = keccak256(type_hash + channel + cumulative.to_bytes(32, "big"))
    return keccak256(domain.prefix + struct)


def _verify(digest: Hash, signature: bytes, signer: Address, what: str) -> None:
    found = recover(digest, signature)
    if found != signer:
        raise BadSignature(f"{what} is signed by 0x{found.hex()}, not by 0x{signer.hex()}")

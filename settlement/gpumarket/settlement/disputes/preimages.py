"""The hashes that bind a dispute, as Disputes.sol computes them: keccak256(abi.encode(...)) of static types, a 32-byte word each. Pure.

A dispute is named by its lease's struct hash: one challenge per attempt, for ever.
"""

from __future__ import annotations

from gpumarket.core.terms import keccak256
from gpumarket.core.units import Address, Hash


def nonce_commitment(dispute: Hash, challenger: Address, nonce: Hash) -> Hash:
    """What a challenger commits to before the block is known whose hash draws the panel."""
    return keccak256(dispute + _address(challenger) + nonce)


def panel_seed(nonce: Hash, block_hash: bytes) -> Hash:
    """Seed of the draw: neither the challenger, who fixed the nonce before, nor the block's maker, who does not know it, can choose it."""
    return keccak256(nonce + block_hash)


def commitment(dispute: Hash, member: Address, number: int, salt: Hash) -> Hash:
    """What a member commits to; bound to the member, so that a copy is worth nothing. `number` is a uint64."""
    return keccak256(dispute + _address(member) + number.to_bytes(8, "big").rjust(32, b"\0") + salt)


def _address(value: Address) -> bytes:
    return value.rjust(32, b"\0")

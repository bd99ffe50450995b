"""The older vouchers of a channel that may still be the right ones to redeem, packed for the ledger. Pure.

Only whole vouchers redeem, and the newest covers what is reserved as well as what was earned. With the ones below it, a payee takes at most
what it earned while the channel lives, and little more than it at the end (docs/decisions/0005-which-voucher-redeems.md).
Invariant: strictly rising, all above what was redeemed and below the newest voucher, at most one of them not above what was earned.
"""

from __future__ import annotations

from collections.abc import Iterable

STEPS_MAX = 16
"""Vouchers kept per channel below the newest one."""
_AMOUNT, _SIGNATURE = 12, 65
_STEP = _AMOUNT + _SIGNATURE
LADDER_BYTES_MAX = 2 * STEPS_MAX * _STEP
"""A ladder may grow to this before it is thinned: thinning at every voucher was an eighth of an order's time."""

Step = tuple[int, bytes]
"""(cumulative amount, 65-byte signature)."""


def steps(ladder: bytes) -> list[Step]:
    """The vouchers, lowest first."""
    parts = [ladder[at : at + _STEP] for at in range(0, len(ladder), _STEP)]
    return [(int.from_bytes(part[:_AMOUNT], "big"), part[_AMOUNT:]) for part in parts]


def climbed(ladder: bytes, cumulative: int, signature: bytes) -> bytes:
    """With the voucher that has just ceased to be the newest. One that cannot be redeemed alone (no signature of 65 bytes) is left out."""
    if cumulative <= 0 or len(signature) != _SIGNATURE:
        return ladder
    return ladder + cumulative.to_bytes(_AMOUNT, "big") + signature


def trimmed(ladder: bytes, *, used: int, redeemed: int, newest: int) -> bytes:
    """Without what can never be the right one any more: all up to `redeemed`, and of those up to `used` all but the highest."""
    if not ladder:
        return ladder
    kept = [step for step in steps(ladder) if redeemed < step[0] < newest]
    earned = [step for step in kept if step[0] <= used]
    above = [step for step in kept if step[0] > used]
    if newest <= used:
        earned = []
    return _packed(earned[-1:] + _thinned(above, used, newest))


def _thinned(above: list[Step], used: int, newest: int) -> list[Step]:
    """At most STEPS_MAX - 1, leaving out where that makes the smallest hole."""
    kept, amounts = list(above), [used, *(amount for amount, _ in above), newest]
    holes = [after - before for before, after in zip(amounts, amounts[2:], strict=False)]
    while len(kept) > STEPS_MAX - 1:
        at = holes.index(min(holes))
        del kept[at], amounts[at + 1], holes[at]
        for left in (at - 1, at):
            if 0 <= left < len(holes):
                holes[left] = amounts[left + 2] - amounts[left]
    return kept


def _packed(found: Iterable[Step]) -> bytes:
    return b"".join(amount.to_bytes(_AMOUNT, "big") + signature for amount, signature in found)

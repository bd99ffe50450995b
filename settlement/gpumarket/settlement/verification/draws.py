"""The client's draws after delivery: whether to check, what, and by whom. All from randomness that is handed in, none guessable before."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from gpumarket.core.ports import Random
from gpumarket.core.units import Address

_RESOLUTION = 1 << 53


class Candidate(NamedTuple):
    """A holder of the model that takes CHECK jobs; stake in base units, owner from the registry."""

    address: Address
    owner: Address
    stake: int


def draw_check(probability: float, random: Random) -> bool:
    """True with this probability (0 never, 1 always). Raises ValueError outside 0..1."""
    if not 0 <= probability <= 1:
        raise ValueError(f"a check probability lies in 0..1, not {probability}")
    return _below(_RESOLUTION, random) < probability * _RESOLUTION


def draw_subset(count: int, share: float, random: Random) -> tuple[int, ...]:
    """Ascending indices of ceil(count x share) of `count` items, at least one. Raises ValueError for nothing to draw from."""
    if count < 1 or not 0 < share <= 1:
        raise ValueError(f"cannot draw a share of {share} of {count} items")
    size = max(1, min(count, math.ceil(count * share)))
    left = list(range(count))
    for position in range(size):  # the first `size` steps of a Fisher-Yates shuffle
        other = position + _below(count - position, random)
        left[position], left[other] = left[other], left[position]
    return tuple(sorted(left[:size]))


def draw_checker(
    candidates: Sequence[Candidate] | Sequence[tuple[Address, Address, int]], excluded_owners: Collection[Address], random: Random
) -> Address | None:
    """One candidate, with a chance in proportion to its stake; none of an excluded owner, none without stake. None when nobody is left."""
    able = [c for c in candidates if c[1] not in excluded_owners and c[2] > 0]
    if not able:
        return None
    point = _below(sum(c[2] for c in able), random)
    for address, _, stake in able:
        if point < stake:
            return address
        point -= stake
    raise AssertionError("a point below the sum lies in one of its parts")


def _below(bound: int, random: Random) -> int:
    """Uniform integer in 0 .. bound - 1, by rejection."""
    size = (bound.bit_length() + 7) // 8
    top = (1 << 8 * size) // bound * bound
    while True:
        value = int.from_bytes(random.token(size), "big")
        if value < top:
            return value % bound

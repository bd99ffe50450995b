"""The draw of a panel, as Disputes.sol makes it. Pure.

The n-th candidate is entry H(seed, n) mod size of the model's list of verifiers; the first five that are fit and independent sit. Every
seat has the same stake locked, so a draw by seats is a draw by stake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpumarket.core.terms import keccak256
from gpumarket.core.units import Address, Hash

PANEL_SIZE = 5
DRAW_TRIES_MAX = 128


def draw_panel(
    seed: Hash, pool: Sequence[Address | None], fit: Callable[[Address], bool], owner_of: Callable[[Address], Address]
) -> tuple[Address, ...]:
    """The members in order; fewer than five when the tries did not find them, and then there is no panel.

    `pool` is the list as it was when the challenge came (None: a hole); `fit` says whether an operator is seasoned, no party, and has a
    seat that covers one more panel's fee. No two members share an operator or owner key.
    """
    panel: list[Address] = []
    taken: set[Address] = set()
    for number in range(DRAW_TRIES_MAX if pool else 0):
        point = int.from_bytes(keccak256(seed + number.to_bytes(32, "big")), "big")
        operator = pool[point % len(pool)]
        if operator is None or operator in taken or owner_of(operator) in taken or not fit(operator):
            continue
        panel.append(operator)
        taken |= {operator, owner_of(operator)}
        if len(panel) == PANEL_SIZE:
            break
    return tuple(panel)

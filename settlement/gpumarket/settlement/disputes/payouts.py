"""Who gets what at the end of a dispute: the arithmetic of Disputes.sol, share by share, in base units. Pure.

Everything that leaves a stake or a bond is credited to somebody or burned; half of every slash is burned, and the victim gets at most a
fixed multiple of the amount, so slashing oneself launders nothing. Divisions round down; what they leave over is burned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gpumarket.core.terms import Lease, Receipt
from gpumarket.core.terms import Outcome as End
from gpumarket.core.units import Address, Money
from gpumarket.settlement.disputes.draw import PANEL_SIZE
from gpumarket.settlement.disputes.state import Outcome
from gpumarket.settlement.pricing import attempt_amount

MILLION = 1_000_000
TO_SLASH, TO_RESTORE = 4, 3
"""Members beyond the bound that slash, and that restore the victim; as many within it as restore dismiss."""


@dataclass(frozen=True, slots=True)
class Shares:
    """The contract's terms that money depends on (Disputes.terms)."""

    panel_fee: int
    no_show_fee: int
    bond_minimum: int
    lock_minimum: int
    bond_ppm: int
    amount_bond_ppm: int
    burn_ppm: int
    challenger_ppm: int
    slash_multiple: int
    victim_multiple: int


@dataclass(frozen=True, slots=True)
class Stakes:
    """What is at stake in one dispute. `locked` is the provider's; `amount` what the attempt could earn."""

    provider: Address
    challenger: Address
    client: Address
    amount: int
    locked: int
    bond: int
    slashable: bool


@dataclass(slots=True)
class Payout:
    """`credited` to each account; `taken` from the provider's lock, the rest of which is unlocked; `fees` from each no-show's seat."""

    outcome: Outcome
    credited: Counter[Address] = field(default_factory=Counter)
    taken: int = 0
    burned: int = 0
    fees: dict[Address, int] = field(default_factory=dict)


def lock_and_bond(shares: Shares, amount: int, lockable: int) -> tuple[int, int]:
    """(locked, bond) of a challenge over `amount`. Raises ValueError where the provider's free stake is not worth a panel."""
    if lockable < shares.lock_minimum:
        raise ValueError("less stake is free than a dispute needs")
    locked = min(lockable, max(shares.lock_minimum, shares.slash_multiple * amount))
    part = locked * shares.bond_ppm + min(amount, locked) * shares.amount_bond_ppm
    return locked, max(shares.bond_minimum, -(-part // MILLION))


def disputed_amount(lease: Lease, receipt: Receipt) -> Money:
    """What the attempt could have earned by its own receipt: what a challenge is about."""
    complete = receipt.outcome is End.COMPLETED
    return attempt_amount(lease, prompt_units=receipt.prompt_units, units=receipt.output_units, complete=complete)


def settle(shares: Shares, stakes: Stakes, bound: int, revealed: Mapping[Address, int], no_shows: Sequence[Address]) -> Payout:
    """The end of a dispute whose panel was heard: `revealed` numbers by member, and who did not reveal."""
    beyond = [member for member, number in revealed.items() if number > bound]
    within = [member for member, number in revealed.items() if number <= bound]
    if len(beyond) >= TO_SLASH and stakes.slashable:
        payout = _slashed(shares, stakes, beyond)
    elif len(beyond) >= TO_RESTORE:
        payout = _restitution(shares, stakes, beyond)
    elif len(within) >= TO_RESTORE:
        payout = Payout(Outcome.DISMISSED)
        _split(payout, stakes.bond, within)
    else:
        payout = Payout(Outcome.INCONCLUSIVE, Counter({stakes.challenger: stakes.bond}))
    winners = {Outcome.SLASHED: beyond, Outcome.RESTITUTION: beyond, Outcome.DISMISSED: within}.get(payout.outcome, list(revealed))
    payout.fees = {member: shares.no_show_fee for member in no_shows}
    _split(payout, sum(payout.fees.values()), winners)
    return payout


def withheld(shares: Shares, stakes: Stakes, members: Sequence[Address]) -> Payout:
    """The challenger kept the evidence to itself: the panel's fees and the rest of the bond."""
    assert len(members) == PANEL_SIZE
    payout = Payout(Outcome.WITHHELD, Counter(dict.fromkeys(members, shares.panel_fee)))
    payout.burned = stakes.bond - shares.panel_fee * len(members)
    return payout


def _slashed(shares: Shares, stakes: Stakes, panel: Sequence[Address]) -> Payout:
    payout = Payout(Outcome.SLASHED, taken=stakes.locked, burned=_burn(shares, stakes.locked))
    left = payout.taken - payout.burned
    fees = min(left, len(panel) * shares.panel_fee)
    victim = min(shares.victim_multiple * stakes.amount, left - fees)
    reward = (left - fees - victim) * shares.challenger_ppm // MILLION
    payout.credited[stakes.client] += victim
    payout.credited[stakes.challenger] += reward + stakes.bond
    _split(payout, left - victim - reward, panel)
    return payout


def _restitution(shares: Shares, stakes: Stakes, panel: Sequence[Address]) -> Payout:
    need = stakes.amount + len(panel) * shares.panel_fee
    taken = min(stakes.locked, -(-need * MILLION // (MILLION - shares.burn_ppm)))
    payout = Payout(Outcome.RESTITUTION, taken=taken, burned=_burn(shares, taken))
    left = taken - payout.burned
    victim = min(stakes.amount, left - min(left, len(panel) * shares.panel_fee))
    payout.credited[stakes.client] += victim
    payout.credited[stakes.challenger] += stakes.bond
    _split(payout, left - victim, panel)
    return payout


def _burn(shares: Shares, taken: int) -> int:
    return -(-taken * shares.burn_ppm // MILLION)


def _split(payout: Payout, amount: int, among: Sequence[Address]) -> None:
    """Equally; the dust, or everything where nobody is left, is burned."""
    each = amount // len(among) if among else 0
    for member in among:
        payout.credited[member] += each
    payout.burned += amount - each * len(among)

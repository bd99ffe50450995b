"""What disputes pay, from the constants of a deployment: oneself slashed loses, honest challengers gain, liars do not.

The contract's payouts are compared with `settlement.disputes.settle` vote by vote; the arguments then go over that function with the
deployed terms, exactly, for many amounts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import comb

import pytest
from contracts_disputes import BEYOND, WITHIN, Court
from contracts_fixtures import ONE, Chain, contracts_chain
from reliability import record

from gpumarket.core.units import Address, parse_address
from gpumarket.settlement.disputes.payouts import Payout, Shares, Stakes, lock_and_bond, settle

__all__ = ["contracts_chain"]

PROVIDER, CLIENT, CHALLENGER = (Address(bytes([i] * 20)) for i in (1, 2, 3))
PANEL = [Address(bytes([0x10 + i] * 20)) for i in range(5)]
AMOUNTS = (0, 1, ONE // 1_000, ONE // 3, ONE, 7 * ONE, 200 * ONE, 10_000 * ONE)
LOCKABLE = (100 * ONE, 101 * ONE + 1, 1_000 * ONE, 10**6 * ONE)


@pytest.fixture(scope="module")
def court(contracts_chain: Chain) -> Court:
    return Court.open(contracts_chain, verifiers=5)


@pytest.fixture(scope="module")
def shares(court: Court) -> Shares:
    """The money terms that the contract on the chain was deployed with."""
    t = court.terms
    return Shares(
        panel_fee=t.panel_fee,
        no_show_fee=t.no_show_fee,
        bond_minimum=t.bond_minimum,
        lock_minimum=t.lock_minimum,
        bond_ppm=t.bond_ppm,
        amount_bond_ppm=t.amount_bond_ppm,
        burn_ppm=t.burn_ppm,
        challenger_ppm=t.challenger_ppm,
        slash_multiple=t.slash_multiple,
        victim_multiple=t.victim_multiple,
    )


def stakes(shares: Shares, amount: int, lockable: int, *, slashable: bool = True) -> Stakes:
    locked, bond = lock_and_bond(shares, amount, lockable)
    return Stakes(PROVIDER, CHALLENGER, CLIENT, amount, locked, bond, slashable)


def cases(shares: Shares) -> Iterator[Stakes]:
    for amount, lockable, slashable in itertools.product(AMOUNTS, LOCKABLE, (True, False)):
        yield stakes(shares, amount, lockable, slashable=slashable)


def voted(shares: Shares, at: Stakes, numbers: Sequence[int | None]) -> Payout:
    spoken = {member: number for member, number in zip(PANEL, numbers, strict=True) if number is not None}
    return settle(shares, at, WITHIN, spoken, [member for member in PANEL if member not in spoken])


@pytest.mark.parametrize(
    "numbers",
    [
        [BEYOND] * 5,
        [BEYOND, WITHIN, BEYOND, BEYOND, BEYOND],
        [BEYOND, BEYOND, WITHIN, BEYOND, WITHIN],
        [None, BEYOND, BEYOND, None, BEYOND],
        [WITHIN, BEYOND, WITHIN, WITHIN, BEYOND],
        [None, None, BEYOND, WITHIN, BEYOND],
    ],
    ids=lambda numbers: "".join("-" if n is None else "B" if n == BEYOND else "w" for n in numbers),
)
def test_contract_pays_what_the_formula_says(court: Court, shares: Shares, numbers: list[int | None]) -> None:
    provider, amount = court.node(1_000 * ONE), ONE + 12_345
    before = {a.address: court.credited(a) for a in (court.client, *court.verifiers)}
    burned, seats = court.contract.functions.toBurn().call(), {a.address: court.stake(a)[1] for a in court.verifiers}
    case, panel = court.opened(provider, amount=amount)
    found = court.dispute(case)
    court.decide(case, panel, numbers)
    client = parse_address(court.client.address)
    at = Stakes(parse_address(provider.address), client, client, found["amount"], found["locked"], found["bond"], found["slashable"])
    by_member = {parse_address(m.address): n for m, n in zip(panel, numbers, strict=True)}
    silent = [m for m, n in by_member.items() if n is None]
    payout = settle(shares, at, found["bound"], {m: n for m, n in by_member.items() if n is not None}, silent)
    paid = Counter({parse_address(a.address): court.credited(a) - before[a.address] for a in (court.client, *court.verifiers)})
    assert +paid == +payout.credited
    assert court.outcome(case) == payout.outcome.name
    assert court.stake(provider) == (1_000 * ONE - payout.taken, 0)
    assert court.contract.functions.toBurn().call() - burned == payout.burned
    for member in panel:
        assert seats[member.address] - court.stake(member)[1] == payout.fees.get(parse_address(member.address), 0)
        if court.stake(member)[1] < court.terms.seat_stake:
            court.send(court.chain.registry.functions.stake(member.address, 10 * ONE), court.chain.rich(member))
            court.send(court.contract.functions.topUpSeat(), member)
    assert court.surplus() == 0


def test_slashing_oneself_always_loses_half_whoever_else_one_is(shares: Shares) -> None:
    """The owner of provider, client, challenger and all five members: what comes back is at most half of what was taken."""
    worst, tried = Fraction(0), 0
    for at, beyond in itertools.product(cases(shares), range(3, 6)):
        payout = voted(shares, at, [BEYOND] * beyond + [WITHIN] * (5 - beyond))
        back = sum(payout.credited.values()) - at.bond
        assert payout.taken > 0
        assert back * 2 <= payout.taken
        worst, tried = max(worst, Fraction(back, payout.taken)), tried + 1
    record("slashing oneself always loses money", tried, f"at best {float(worst):.0%} comes back", "at most 50 %")


def test_honest_challenger_of_a_cheat_gains_with_up_to_two_hostile_members(shares: Shares) -> None:
    for at, hostile in itertools.product(cases(shares), range(3)):
        payout = voted(shares, at, [WITHIN] * hostile + [BEYOND] * (5 - hostile))
        together = payout.credited[CLIENT] + payout.credited[CHALLENGER] - at.bond
        assert payout.taken > 0
        assert payout.credited[CHALLENGER] >= at.bond
        if at.slashable and hostile < 2:
            assert together >= (at.locked // 2 - 5 * shares.panel_fee) // 2
            assert payout.credited[CLIENT] <= shares.victim_multiple * at.amount
        elif at.amount:
            assert together > 0
        if payout.taken < at.locked:
            assert payout.credited[CLIENT] == at.amount  # restitution in full, and not a unit more


def test_lone_hostile_member_gains_nothing_whatever_it_does(shares: Shares) -> None:
    """Against four honest members of either mind: lying earns nothing, silence costs, honesty pays at least the fee."""
    hostile = PANEL[4]
    tried = 0
    for at, (truth, lie) in itertools.product(cases(shares), ((BEYOND, WITHIN), (WITHIN, BEYOND))):
        honest, lying, silent = (voted(shares, at, [truth] * 4 + [number]) for number in (truth, lie, None))
        assert honest.credited[hostile] >= shares.panel_fee
        assert lying.credited[hostile] == 0
        assert silent.credited[hostile] - silent.fees[hostile] == -shares.no_show_fee
        assert lying.outcome == silent.outcome == honest.outcome
        tried += 1
    record("a lone hostile panel member gains nothing", 2 * tried, "0 paid for lying, the fee lost for silence", "0")


def test_honest_provider_loses_nothing_to_two_hostile_members(shares: Shares) -> None:
    for at in cases(shares):
        for hostile in itertools.combinations(range(5), 2):
            payout = voted(shares, at, [BEYOND if i in hostile else WITHIN for i in range(5)])
            assert (payout.taken, payout.credited[CHALLENGER], payout.credited[CLIENT]) == (0, 0, 0)


@pytest.mark.parametrize("share", [Fraction(1, 10), Fraction(1, 5), Fraction(1, 3)])
def test_false_challenge_with_a_share_of_all_seats_loses_on_average(shares: Shares, share: Fraction) -> None:
    """A challenger that holds `share` of the seats, votes them all, and keeps everything that is not burned.

    It may also look at the panel and not draw: that loses the whole bond, so going on is never worse.
    """
    best = Fraction(-(10**9))
    for at in cases(shares):
        expected = Fraction(0)
        for seats in range(6):
            chance = comb(5, seats) * share**seats * (1 - share) ** (5 - seats)
            payout = voted(shares, at, [BEYOND] * seats + [WITHIN] * (5 - seats))
            own = payout.credited[CLIENT] + payout.credited[CHALLENGER] + sum(payout.credited[m] for m in PANEL[:seats]) - at.bond
            assert own >= -at.bond
            expected += chance * own
        assert expected < 0
        best = max(best, expected / at.bond)
    record(f"false challenge with {share} of all seats", len(list(cases(shares))), f"{float(best):.1%} of the bond on average", "below 0")


def test_locking_ones_own_stake_away_from_others_costs_the_bond(shares: Shares) -> None:
    """A provider that challenges itself so that others find nothing to lock pays 5 % of what it hides, each time."""
    for at in cases(shares):
        payout = voted(shares, at, [WITHIN] * 5)
        assert payout.credited[CHALLENGER] == 0
        assert at.bond * 1_000_000 >= at.locked * shares.bond_ppm

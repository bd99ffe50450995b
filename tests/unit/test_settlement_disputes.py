"""Disputes as pure functions: nobody's step is wrong or missing, and no base unit appears, vanishes, or goes to whom it should not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reliability import record

from gpumarket.contracts.dispute_terms import DisputeTerms
from gpumarket.core.errors import ChainError
from gpumarket.core.terms import keccak256
from gpumarket.core.units import Address, Hash
from gpumarket.settlement.disputes import (
    NUMBER_MAX,
    PANEL_SIZE,
    Dispute,
    Member,
    Mine,
    Outcome,
    Payout,
    Rules,
    Seat,
    Shares,
    Stakes,
    State,
    Step,
    accused_step,
    challenger_step,
    commitment,
    dispute_after,
    draw_panel,
    lock_and_bond,
    may_finish,
    member_step,
    nonce_commitment,
    settle,
    withheld,
)

PANEL = tuple(Address(bytes([i]) * 20) for i in range(1, 6))
PROVIDER, CHALLENGER, CLIENT = (Address(bytes([i]) * 20) for i in range(20, 23))
ID = Hash(keccak256(b"lease"))
RULES = Rules(report_seconds=100, reveal_seconds=100, challenge_seconds=1_000)
DEFAULTS = DisputeTerms()
SHARES = Shares(
    DEFAULTS.panel_fee,
    DEFAULTS.no_show_fee,
    DEFAULTS.bond_minimum,
    DEFAULTS.lock_minimum,
    DEFAULTS.bond_ppm,
    DEFAULTS.amount_bond_ppm,
    DEFAULTS.burn_ppm,
    DEFAULTS.challenger_ppm,
    DEFAULTS.slash_multiple,
    DEFAULTS.victim_multiple,
)
TOKEN = 10**18
CHALLENGED: dict[str, Any] = {
    "id": ID,
    "provider": "0x" + PROVIDER.hex(),
    "challenger": "0x" + CHALLENGER.hex(),
    "model": keccak256(b"model"),
    "task": 3,
    "bound": 10_000,
    "amount": 7,
    "locked": 100,
    "bond": 20,
    "drawBlock": 12,
    "drawUntil": 1_000,
    "slashable": True,
    "evidenceHash": keccak256(b"evidence"),
}


def after(*events: tuple[str, dict[str, Any]]) -> Dispute:
    dispute = None
    for name, args in events:
        dispute = dispute_after(dispute, name, args)
    assert dispute is not None
    return dispute


def drawn(*more: tuple[str, dict[str, Any]]) -> Dispute:
    members = ["0x" + m.hex() for m in PANEL]
    panel = {"id": ID, "members": members, "reportUntil": 1_100, "postUntil": 1_200, "commitUntil": 1_300}
    return after(("Challenged", CHALLENGED), ("PanelDrawn", panel), *more)


def by(member: int, name: str, **args: Any) -> tuple[str, dict[str, Any]]:
    return name, {"id": ID, "member": "0x" + PANEL[member].hex(), **args}


def committed(*members: int) -> list[tuple[str, dict[str, Any]]]:
    return [by(m, "Committed", commitment=bytes(32)) for m in members]


def revealed(*members: int) -> list[tuple[str, dict[str, Any]]]:
    return [by(m, "Revealed", number=m) for m in members]


REPORTED, POSTED = by(0, "EvidenceMissing"), ("EvidencePosted", {"id": ID, "evidence": b"sealed"})
OPENED = ("RevealOpened", {"id": ID, "revealUntil": 1_250})
FINISHED = ("Finished", {"id": ID, "outcome": 1, "beyond": 5, "within": 0, "taken": 100, "burned": 50})


# --- the machine ---------------------------------------------------------------------------------------------------------------


def test_dispute_follows_the_contracts_events() -> None:
    dispute = drawn(REPORTED, POSTED, *committed(0, 1, 2, 3, 4), OPENED, *revealed(0, 1, 2, 3, 4))
    assert [m.number for m in dispute.members] == [0, 1, 2, 3, 4]
    assert {m.seat for m in dispute.members} == {Seat.REVEALED}
    assert (dispute.posted, dispute.reveal_until) == ((b"sealed",), 1_250)
    ended = dispute_after(dispute, *FINISHED)
    assert ended is not None
    assert (ended.state, ended.outcome, ended.beyond, ended.taken, ended.burned) == (State.FINISHED, Outcome.SLASHED, 5, 100, 50)
    assert ended.posted == (), "sealed evidence is let go of"


def test_dispute_commit_takes_a_report_back() -> None:
    assert drawn(REPORTED).missing == (PANEL[0],)
    assert drawn(REPORTED, *committed(0)).missing == ()


def test_dispute_events_about_no_dispute_change_nothing_and_missed_ones_are_refused() -> None:
    assert dispute_after(None, "Enrolled", {"operator": "0x" + PANEL[0].hex()}) is None
    assert dispute_after(drawn(), "Credited", {"id": ID, "account": "0x" + PANEL[0].hex(), "amount": 1}) is None
    with pytest.raises(ChainError, match="never opened"):
        dispute_after(None, *FINISHED)


# --- steps ---------------------------------------------------------------------------------------------------------------------

NOTHING, NUMBER, JUDGING = Mine(False), Mine(True), Mine(False, judging=True)


@pytest.mark.parametrize(
    ("dispute", "mine", "now", "step"),
    [
        (drawn(), NOTHING, 1_010, Step.WAIT),  # the evidence may be on its way
        (drawn(), NOTHING, 1_050, Step.REPORT),
        (drawn(), JUDGING, 1_050, Step.WAIT),
        (drawn(), NOTHING, 1_100, Step.WAIT),  # too late to report
        (drawn(), NUMBER, 1_010, Step.COMMIT),
        (drawn(REPORTED), NOTHING, 1_060, Step.WAIT),
        (drawn(REPORTED), NUMBER, 1_060, Step.COMMIT),
        (drawn(REPORTED, POSTED), NOTHING, 1_060, Step.READ),
        (drawn(REPORTED, POSTED), Mine(False, posted_read=1), 1_060, Step.WAIT),  # more may be posted
        (drawn(REPORTED, POSTED), Mine(False, posted_read=1), 1_200, Step.SHOWN_NOTHING),
        (drawn(REPORTED), NUMBER, 1_200, Step.FINISH),  # withheld: a commit would be refused
        (drawn(by(1, "EvidenceMissing"), POSTED), NOTHING, 1_020, Step.READ),  # posted to another, but who knows
        (drawn(*committed(0)), NUMBER, 1_299, Step.WAIT),
        (drawn(*committed(0)), NUMBER, 1_300, Step.REVEAL),
        (drawn(*committed(0)), NOTHING, 1_300, Step.WAIT),  # a journal that was lost: nothing fits the commitment
        (drawn(*committed(0, 1, 2, 3, 4), OPENED), NUMBER, 1_160, Step.REVEAL),
        (drawn(*committed(0, 1), *revealed(0)), NUMBER, 1_310, Step.WAIT),
        (drawn(*committed(0, 1), *revealed(0, 1)), NUMBER, 1_310, Step.FINISH),
        (drawn(*committed(0, 1), *revealed(0)), NUMBER, 1_400, Step.FINISH),
        (drawn(), NUMBER, 1_300, Step.WAIT),  # too late to commit
        (drawn(), NUMBER, 1_400, Step.FINISH),
        (drawn(FINISHED), NUMBER, 1_400, Step.DONE),
    ],
)
def test_member_step_follows_from_chain_journal_and_time(dispute: Dispute, mine: Mine, now: int, step: Step) -> None:
    assert member_step(dispute, PANEL[0], mine, now, RULES) is step


def test_member_step_of_somebody_else_is_nothing() -> None:
    assert member_step(drawn(), PROVIDER, NUMBER, 1_400, RULES) is Step.DONE


EVERYBODY, NOBODY = frozenset(PANEL), frozenset[Address]()


@pytest.mark.parametrize(
    ("dispute", "delivered", "posted", "now", "block", "step"),
    [
        (after(("Challenged", CHALLENGED)), NOBODY, NOBODY, 900, 12, Step.WAIT),
        (after(("Challenged", CHALLENGED)), NOBODY, NOBODY, 900, 13, Step.DRAW),
        (after(("Challenged", CHALLENGED)), NOBODY, NOBODY, 1_000, 13, Step.FINISH),
        (drawn(), NOBODY, NOBODY, 1_010, 14, Step.DELIVER),
        (drawn(), EVERYBODY, NOBODY, 1_010, 14, Step.WAIT),
        (drawn(*committed(0, 1, 2, 3, 4)), NOBODY, NOBODY, 1_010, 14, Step.WAIT),
        (drawn(REPORTED), NOBODY, NOBODY, 1_110, 14, Step.POST),
        (drawn(REPORTED), EVERYBODY, NOBODY, 1_110, 14, Step.POST),  # whoever reports is believed
        (drawn(REPORTED, POSTED), EVERYBODY, frozenset(PANEL[:1]), 1_110, 14, Step.WAIT),
        (drawn(REPORTED, POSTED), NOBODY, frozenset(PANEL[:1]), 1_210, 14, Step.DELIVER),
        (drawn(REPORTED), NOBODY, NOBODY, 1_210, 14, Step.FINISH),
        (drawn(), NOBODY, NOBODY, 1_300, 14, Step.WAIT),
        (drawn(FINISHED), NOBODY, NOBODY, 1_300, 14, Step.DONE),
    ],
)
def test_challenger_step_follows_from_chain_and_time(
    dispute: Dispute, delivered: frozenset[Address], posted: frozenset[Address], now: int, block: int, step: Step
) -> None:
    assert challenger_step(dispute, delivered, posted, now, block, RULES) is step


def test_accused_step_ends_what_nobody_else_ends_and_nothing_before_its_time() -> None:
    undrawn = after(("Challenged", CHALLENGED))
    assert [accused_step(undrawn, now, RULES) for now in (999, 1_000)] == [Step.WAIT, Step.FINISH]
    assert accused_step(drawn(), 1_000, RULES) is Step.WAIT
    assert accused_step(drawn(), 10_000, RULES) is Step.FINISH
    assert accused_step(replace(undrawn, state=State.FINISHED), 10_000, RULES) is Step.DONE


@given(
    st.lists(st.sampled_from(list(Seat)), min_size=5, max_size=5),
    st.booleans(),
    st.sampled_from([0, 1_250]),
    st.integers(900, 1_500),
)
def test_dispute_of_any_shape_can_be_finished_in_the_end_and_never_by_everybody_waiting(
    seats: list[Seat], posted: bool, opened: int, now: int
) -> None:
    members = tuple(Member(operator, seat) for operator, seat in zip(PANEL, seats, strict=True))
    dispute = replace(drawn(), members=members, posted=(b"x",) if posted else (), reveal_until=opened)
    end = (opened or dispute.commit_until) + RULES.reveal_seconds
    assert may_finish(dispute, max(end, now), RULES)
    if may_finish(dispute, now, RULES):
        assert member_step(dispute, PANEL[0], NUMBER, now, RULES) is Step.FINISH
        assert challenger_step(dispute, EVERYBODY, EVERYBODY, now, 99, RULES) is Step.FINISH


def test_commitment_is_bound_to_dispute_member_number_and_salt() -> None:
    salt = Hash(keccak256(b"salt"))
    base = commitment(ID, PANEL[0], 5, salt)
    others = [
        commitment(Hash(keccak256(b"other")), PANEL[0], 5, salt),
        commitment(ID, PANEL[1], 5, salt),
        commitment(ID, PANEL[0], 6, salt),
        commitment(ID, PANEL[0], 5, Hash(keccak256(b"pepper"))),
    ]
    assert len({base, *others}) == 5
    assert nonce_commitment(ID, CHALLENGER, salt) != nonce_commitment(ID, CLIENT, salt)


# --- the draw ------------------------------------------------------------------------------------------------------------------


def seats_of(count: int) -> list[Address]:
    return [Address(keccak256(b"verifier %d" % n)[:20]) for n in range(count)]


@given(st.integers(0, 2**64), st.integers(5, 40), st.integers(0, 6), st.data())
def test_draw_takes_five_that_are_fit_and_of_different_owners(seed: int, count: int, unfit_count: int, data: Any) -> None:
    pool: list[Address | None] = [*seats_of(count)]
    unfit = set(seats_of(count)[:unfit_count])
    owners = {operator: Address(bytes([data.draw(st.integers(100, 120))]) * 20) for operator in seats_of(count)}
    panel = draw_panel(Hash(keccak256(seed.to_bytes(32, "big"))), pool, lambda a: a not in unfit, owners.__getitem__)
    assert len(panel) <= PANEL_SIZE
    assert not unfit & set(panel)
    assert len({owners[m] for m in panel}) == len(set(panel)) == len(panel)


def test_draw_with_too_few_or_holes_only_finds_no_panel() -> None:
    assert draw_panel(ID, [], lambda _: True, lambda a: a) == ()
    assert draw_panel(ID, [None] * 8, lambda _: True, lambda a: a) == ()
    assert len(draw_panel(ID, [*seats_of(4)], lambda _: True, lambda a: a)) == 4


def test_draw_by_seats_is_a_draw_by_stake() -> None:
    """A holder of 20 % of the seats has four of five in 0.7 % of panels (binomial; 0.5 % without replacement among 100)."""
    pool = seats_of(100)
    captured = 0
    for number in range(2_000):
        panel = draw_panel(Hash(keccak256(b"%d" % number)), pool, lambda _: True, lambda a: a)
        captured += sum(member in pool[:20] for member in panel) >= 4
    assert captured <= 30
    record("F53 panel captured by 20 % of the seats", 2_000, f"{captured} of 2,000 draws", "<= 1.5 %")


# --- payouts -------------------------------------------------------------------------------------------------------------------


def stakes(amount: int, lockable: int, *, slashable: bool = True) -> Stakes:
    locked, bond = lock_and_bond(SHARES, amount, lockable)
    return Stakes(PROVIDER, CHALLENGER, CLIENT, amount, locked, bond, slashable)


AMOUNTS = st.integers(1, 10**20)
LOCKABLE = st.integers(SHARES.lock_minimum, 10**24)
NUMBERS = st.lists(st.sampled_from([0, 10, 11, NUMBER_MAX]), min_size=0, max_size=5)


@given(AMOUNTS, LOCKABLE, NUMBERS, st.booleans())
def test_payout_conserves_every_base_unit_and_takes_no_more_than_was_locked(
    amount: int, lockable: int, numbers: list[int], slashable: bool
) -> None:
    at_stake = stakes(amount, lockable, slashable=slashable)
    heard = dict(zip(PANEL, numbers, strict=False))
    payout = settle(SHARES, at_stake, 10, heard, PANEL[len(numbers) :])
    assert sum(payout.credited.values()) + payout.burned == payout.taken + at_stake.bond + sum(payout.fees.values())
    assert 0 <= payout.taken <= at_stake.locked
    assert payout.burned * 2 >= payout.taken
    assert min(payout.credited.values(), default=0) >= 0
    assert all(who in (CLIENT, CHALLENGER, *heard) for who, value in payout.credited.items() if value)


@given(AMOUNTS, LOCKABLE, st.integers(0, 1), st.booleans())
def test_payout_up_to_one_hostile_member_slashes_and_two_restore(amount: int, lockable: int, hostile: int, silent: bool) -> None:
    heard = {member: 0 if index < hostile else 11 for index, member in enumerate(PANEL)}
    assert settle(SHARES, stakes(amount, lockable), 10, heard, []).outcome is Outcome.SLASHED
    two = {**heard, PANEL[0]: 0, PANEL[1]: 0}
    payout = settle(SHARES, stakes(amount, lockable), 10, two, [])
    assert payout.outcome is Outcome.RESTITUTION
    assert payout.credited[PANEL[0]] == payout.credited[PANEL[1]] == 0
    quiet = {k: v for k, v in heard.items() if k != PANEL[0]}
    outcome = settle(SHARES, stakes(amount, lockable), 10, quiet if silent else heard, [PANEL[0]] if silent else []).outcome
    assert outcome is Outcome.SLASHED


@given(AMOUNTS, LOCKABLE, st.lists(st.sampled_from([0, NUMBER_MAX]), min_size=2, max_size=2))
def test_payout_honest_provider_loses_nothing_to_two_hostile_members(amount: int, lockable: int, lies: list[int]) -> None:
    heard = dict(zip(PANEL, [*lies, 0, 5, 10], strict=True))
    payout = settle(SHARES, stakes(amount, lockable), 10, heard, [])
    assert (payout.outcome, payout.taken) == (Outcome.DISMISSED, 0)


@given(AMOUNTS, LOCKABLE, st.integers(0, 5), st.booleans())
def test_payout_slashing_oneself_always_loses_money(amount: int, lockable: int, own_seats: int, slashable: bool) -> None:
    """Provider, client and challenger are one, and so are `own_seats` of the panel: what comes back is less than what went in."""
    at_stake = stakes(amount, lockable, slashable=slashable)
    payout = settle(SHARES, at_stake, 10, dict.fromkeys(PANEL, 11), [])
    back = payout.credited[CLIENT] + payout.credited[CHALLENGER] + sum(payout.credited[m] for m in PANEL[:own_seats])
    assert back < payout.taken + at_stake.bond
    assert back - at_stake.bond <= payout.taken // 2


@given(AMOUNTS, LOCKABLE)
def test_payout_honest_challenger_gains_and_victim_gets_a_bounded_multiple(amount: int, lockable: int) -> None:
    at_stake = stakes(amount, lockable)
    payout = settle(SHARES, at_stake, 10, dict.fromkeys(PANEL, 11), [])
    assert payout.credited[CHALLENGER] >= at_stake.bond
    assert payout.credited[CLIENT] <= SHARES.victim_multiple * amount
    assert payout.credited[CLIENT] + payout.credited[CHALLENGER] > at_stake.bond


def test_payout_model_with_few_verifiers_has_restitution_only() -> None:
    payout = settle(SHARES, stakes(TOKEN, 10**21, slashable=False), 10, dict.fromkeys(PANEL, 11), [])
    assert payout.outcome is Outcome.RESTITUTION
    assert payout.credited[CLIENT] == TOKEN


@pytest.mark.parametrize("numbers", [[], [11], [0, 11], [0, 0, 11, 11]])
def test_payout_without_a_majority_gives_the_bond_back_and_the_silent_pay(numbers: list[int]) -> None:
    at_stake = stakes(TOKEN, 10**21)
    payout = settle(SHARES, at_stake, 10, dict(zip(PANEL, numbers, strict=False)), PANEL[len(numbers) :])
    assert (payout.outcome, payout.taken, payout.credited[CHALLENGER]) == (Outcome.INCONCLUSIVE, 0, at_stake.bond)
    fees = (5 - len(numbers)) * SHARES.no_show_fee
    assert sum(payout.credited[m] for m in PANEL) + payout.burned == fees
    assert numbers or payout.burned == fees


def test_payout_withheld_evidence_pays_the_panel_from_the_bond() -> None:
    at_stake = stakes(TOKEN, 10**21)
    payout = withheld(SHARES, at_stake, PANEL)
    assert payout == Payout(Outcome.WITHHELD, payout.credited, taken=0, burned=at_stake.bond - 5 * SHARES.panel_fee, fees={})
    assert all(payout.credited[m] == SHARES.panel_fee for m in PANEL)


def test_lock_needs_enough_stake() -> None:
    with pytest.raises(ValueError, match="less stake"):
        lock_and_bond(SHARES, 1, SHARES.lock_minimum - 1)
    assert lock_and_bond(SHARES, 1, 10**24) == (SHARES.lock_minimum, SHARES.bond_minimum)
    assert lock_and_bond(SHARES, 10 * TOKEN, 10**24) == (1_500 * TOKEN, 77 * TOKEN + TOKEN // 2)

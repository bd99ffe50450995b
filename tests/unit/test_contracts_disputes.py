"""Disputes on a chain: who may challenge what, each member's moves, every way to end, and what each costs whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from contracts_disputes import BEYOND, EMBEDDING, FINISHED, MODEL, NONCE, PROFILE, WITHIN, Case, Court
from contracts_fixtures import ONE, Chain, contracts_chain
from eth_account import Account
from eth_account.signers.local import LocalAccount

from gpumarket.core.terms import Outcome, Task, VerificationProfile
from gpumarket.core.units import Hash, parse_address

__all__ = ["contracts_chain"]

STAKE = 1_000 * ONE
OTHER = Hash(b"\x99" * 32)
HISTORY = "0x0000F90827F1C53a10cb7A02335B175320002935"
FRESH = Hash(b"\x97" * 32)


@pytest.fixture(scope="module")
def court(contracts_chain: Chain) -> Court:
    return Court.open(contracts_chain, verifiers=7)


@pytest.fixture(autouse=True)
def ended(court: Court) -> Iterator[None]:
    """Whatever a test leaves open ends by time alone, at anyone's call."""
    yield
    for case in court.challenged:
        found = court.dispute(case)
        if found["state"] != FINISHED:
            court.pass_until(found["drawUntil"] if found["state"] == 1 else found["revealUntil"])
            court.finish(case)
    court.challenged.clear()
    for member in court.verifiers:
        if court.contract.functions.seat(member.address).call()[0] < court.terms.seat_stake:
            court.send(court.chain.registry.functions.stake(member.address, 10 * ONE), court.chain.rich(member))
            court.send(court.contract.functions.topUpSeat(), member)
    assert court.surplus() == 0


@pytest.fixture
def provider(court: Court) -> LocalAccount:
    return court.node(STAKE)


# ---------------------------------------------------------------- a dispute from end to end


def test_dispute_of_a_gross_cheat_slashes_it_and_pays_everybody_as_published(court: Court, provider: LocalAccount) -> None:
    terms, before = court.terms, court.chain.balance(court.client.address)
    burned = court.contract.functions.toBurn().call()
    case, panel = court.opened(provider, amount=2 * ONE)
    locked = terms.slash_multiple * 2 * ONE
    bond = max(terms.bond_minimum, (locked * terms.bond_ppm + 2 * ONE * terms.amount_bond_ppm) // 10**6)
    assert court.stake(provider) == (STAKE, locked)
    assert before - court.chain.balance(court.client.address) == bond
    shares = [court.credited(member) for member in panel]
    client_before = court.credited(court.client)
    receipt = court.decide(case, panel, [BEYOND, BEYOND, BEYOND, BEYOND, WITHIN])
    assert court.outcome(case) == "SLASHED"
    (event,) = court.chain.events(court.contract, "Finished", receipt)
    assert (event["beyond"], event["within"], event["taken"]) == (4, 1, locked)
    victim, fees = terms.victim_multiple * 2 * ONE, 4 * terms.panel_fee
    left = locked // 2 - fees - victim
    challenger = left * terms.challenger_ppm // 10**6
    each = (fees + left - challenger) // 4
    assert court.credited(court.client) - client_before == victim + challenger + bond
    assert [court.credited(m) - s for m, s in zip(panel, shares, strict=True)] == [each] * 4 + [0]
    assert court.contract.functions.toBurn().call() - burned == locked - victim - challenger - 4 * each
    assert court.stake(provider) == (STAKE - locked, 0)
    assert court.surplus() == 0


def test_dispute_with_two_hostile_members_restores_the_victim_and_burns_as_much(court: Court, provider: LocalAccount) -> None:
    case, panel = court.opened(provider)
    before, bond = court.credited(court.client), court.dispute(case)["bond"]
    court.decide(case, panel, [WITHIN, BEYOND, 0, BEYOND, 2**64 - 1])
    assert court.outcome(case) == "RESTITUTION"
    taken = 2 * (ONE + 3 * court.terms.panel_fee)
    assert court.stake(provider) == (STAKE - taken, 0)
    assert court.credited(court.client) - before == ONE + bond
    assert court.surplus() == 0


def test_dispute_against_honest_work_costs_the_bond_and_nothing_else(court: Court, provider: LocalAccount) -> None:
    case, panel = court.opened(provider)
    before, shares = court.credited(court.client), [court.credited(m) for m in panel]
    bond = court.dispute(case)["bond"]
    court.decide(case, panel, [WITHIN, 0, 0, BEYOND, BEYOND])
    assert court.outcome(case) == "DISMISSED"
    assert court.stake(provider) == (STAKE, 0)
    assert court.credited(court.client) == before
    assert [court.credited(m) - s for m, s in zip(panel, shares, strict=True)] == [bond // 3] * 3 + [0, 0]
    assert court.surplus() == 0


def test_dispute_of_embeddings_is_bounded_by_their_profile(court: Court, provider: LocalAccount) -> None:
    limit = EMBEDDING.max_abs_diff_nano
    case, panel = court.opened(provider, profile=EMBEDDING)
    assert (court.dispute(case)["bound"], court.dispute(case)["amount"]) == (limit, ONE)
    court.decide(case, panel, [limit, limit, limit, limit + 1, limit + 1])
    assert court.outcome(case) == "DISMISSED"


def test_dispute_of_a_partial_text_counts_what_it_could_have_earned(court: Court, provider: LocalAccount) -> None:
    for outcome, units, maximum, amount in (
        (Outcome.COMPLETED, 70, ONE, 80 * ONE // 100),  # seventy output units and ten of the prompt
        (Outcome.CANCELLED, 70, ONE, 70 * ONE // 100),
        (Outcome.COMPLETED, 200, ONE, ONE),
        (Outcome.COMPLETED, 100, ONE // 3, ONE // 3),
    ):
        case = court.case(provider, lease={"maximum": maximum}, receipt={"outcome": outcome, "output_units": units})
        court.challenge(case)
        assert court.dispute(case)["amount"] == amount


def test_finish_where_members_are_silent_charges_their_seats(court: Court, provider: LocalAccount) -> None:
    case, panel = court.opened(provider)
    before = [court.credited(m) for m in panel]
    seats = [court.contract.functions.seat(m.address).call()[0] for m in panel]
    court.decide(case, panel, [BEYOND, BEYOND, BEYOND, None, None])
    fee, paid = court.terms.no_show_fee, court.terms.panel_fee
    assert court.outcome(case) == "RESTITUTION"
    assert [court.credited(m) - b for m, b in zip(panel, before, strict=True)] == [paid + 2 * fee // 3] * 3 + [0, 0]
    after = [court.contract.functions.seat(m.address).call()[0] for m in panel]
    assert [s - a for s, a in zip(seats, after, strict=True)] == [0, 0, 0, fee, fee]
    assert court.surplus() == 0


def test_finish_without_a_majority_returns_the_bond_and_frees_the_provider(court: Court, provider: LocalAccount) -> None:
    case, panel = court.opened(provider)
    before, bond = court.credited(court.client), court.dispute(case)["bond"]
    court.decide(case, panel, [BEYOND, BEYOND, WITHIN, None, None])
    assert court.outcome(case) == "INCONCLUSIVE"
    assert court.credited(court.client) - before == bond
    assert court.stake(provider) == (STAKE, 0)
    silent, panel = court.opened(provider)
    court.decide(silent, panel, [None] * 5)
    assert court.outcome(silent) == "INCONCLUSIVE"
    assert court.surplus() == 0


def _rich(court: Court, member: LocalAccount) -> LocalAccount:
    """A member whose stake covers a full seat again."""
    court.send(court.chain.registry.functions.stake(member.address, 10 * ONE), court.chain.rich(member))
    return member


# ---------------------------------------------------------------- what is refused at the challenge


def test_challenge_by_a_stranger_or_with_a_stolen_delegation_is_refused(court: Court, provider: LocalAccount) -> None:
    case = court.case(provider)
    stranger, delegate = court.chain.accounts[2], court.chain.accounts[3]
    assert court.refused(court.contract.functions.challenge(case.words()), stranger)[0] == "NotHolder"
    delegated = court.committed(case, delegate)
    assert court.refused(court.contract.functions.challenge(delegated.words()), stranger)[0] == "WrongSigner"


def test_challenge_by_a_delegate_of_the_client_is_taken_and_the_victim_stays_the_client(court: Court, provider: LocalAccount) -> None:
    delegate = court.chain.accounts[3]
    court.send(court.chain.token.functions.approve(court.contract.address, 2**256 - 1), delegate)
    case = court.case(provider, challenger=delegate)
    court.challenge(case, delegate)
    before = court.credited(court.client)
    panel = court.draw(case)
    court.decide(case, panel, [BEYOND] * 5)
    assert court.credited(court.client) - before == court.terms.victim_multiple * ONE
    assert court.credited(delegate) > court.dispute(case)["bond"]


def test_challenge_of_an_attempt_that_was_challenged_before_is_refused_for_ever(court: Court, provider: LocalAccount) -> None:
    case = court.case(provider)
    court.challenge(case)
    again = court.contract.functions.challenge(case.words())
    assert court.refused(again, court.client)[0] == "AlreadyDisputed"
    court.pass_until(court.dispute(case)["drawUntil"])
    court.finish(case)
    assert court.refused(again, court.client)[0] == "AlreadyDisputed"


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("lease.spec", {"lease": {"spec": OTHER}}),
        ("spec.client", {"spec": {"client": parse_address("0x" + "11" * 20)}}),
        ("spec.scheduler", {"spec": {"scheduler": parse_address("0x" + "11" * 20)}}),
        ("spec.task", {"spec": {"task": Task.EMBED}}),
        ("spec.model", {"spec": {"model": OTHER}}),
        ("spec.profile", {"spec": {"profile": OTHER}}),
        ("lease.profile", {"lease": {"profile": OTHER}, "spec": {"profile": OTHER}}),
        ("lease.deadline", {"lease": {"deadline": 1_000}}),  # long before it was issued
        ("profile.task", {"lease": {"task": Task.EMBED}, "spec": {"task": Task.EMBED}}),
        ("receipt.lease", {"receipt": {"lease": OTHER}}),
        ("receipt.requestHash", {"receipt": {"request_hash": OTHER}}),
        ("receipt.prefixUnits", {"receipt": {"prefix_units": 1}}),
        ("receipt.prefixHash", {"receipt": {"prefix_hash": OTHER}}),
    ],
)
def test_challenge_with_statements_that_do_not_belong_together_is_refused(
    court: Court, provider: LocalAccount, what: str, changes: dict[str, Any]
) -> None:
    name, (found,) = court.refused(court.contract.functions.challenge(court.case(provider, **changes).words()), court.client)
    assert (name, found.rstrip(b"\0").decode()) == ("StatementMismatch", what)


def test_challenge_with_a_statement_of_another_signer_is_refused(court: Court, provider: LocalAccount) -> None:
    case, stranger = court.case(provider), court.chain.accounts[2]
    forged = [
        replace(case, lease_signature=court.signed(stranger, case.lease)),
        replace(case, receipt_signature=court.signed(stranger, case.receipt)),
        replace(case, lease_signature=case.receipt_signature),
    ]
    for wrong in forged:
        assert court.refused(court.contract.functions.challenge(wrong.words()), court.client)[0] == "WrongSigner"
    for broken in (b"", b"\0" * 65, case.lease_signature[:64]):
        name = court.refused(court.contract.functions.challenge(replace(case, lease_signature=broken).words()), court.client)[0]
        assert name.startswith("ECDSA")


def test_challenge_of_a_result_that_its_profile_cannot_reject_is_refused(court: Court, provider: LocalAccount) -> None:
    short = court.case(provider, receipt={"output_units": PROFILE.min_units - 1})
    empty = court.case(provider, profile=EMBEDDING, receipt={"output_units": 0})
    for case in (short, empty):
        assert court.refused(court.contract.functions.challenge(case.words()), court.client)[0] == "ResultTooShort"
    check = court.case(provider, profile=VerificationProfile(Task.CHECK, "float32"))
    assert court.refused(court.contract.functions.challenge(check.words()), court.client) == ("TaskNotDisputable", (5,))


def test_challenge_outside_its_time_is_refused(court: Court, provider: LocalAccount) -> None:
    now = court.chain.now()
    for issued in (now - court.terms.challenge_seconds - 1, now + 1_000):
        case = court.case(provider, lease={"issued_at": issued})
        assert court.refused(court.contract.functions.challenge(case.words()), court.client)[0] == "OutsideChallengeTime"


def test_challenge_without_verifiers_stake_or_bond_is_refused(court: Court, provider: LocalAccount) -> None:
    unknown = court.case(provider, lease={"model": OTHER}, spec={"model": OTHER})
    assert court.refused(court.contract.functions.challenge(unknown.words()), court.client)[0] == "TooFewVerifiers"
    for member in court.verifiers[:5]:
        court.send(court.contract.functions.enrol(FRESH, OTHER), member)  # seasoned for later leases, not for this one
    early = court.case(provider, lease={"model": FRESH}, spec={"model": FRESH})
    assert court.contract.functions.seasonedCount(FRESH, court.chain.now()).call() == 0
    assert court.refused(court.contract.functions.challenge(early.words()), court.client)[0] == "TooFewVerifiers"
    for member in court.verifiers[:5]:
        court.send(court.contract.functions.unenrol(FRESH), member)
    poor = court.node(court.terms.lock_minimum - 1)
    assert court.refused(court.contract.functions.challenge(court.case(poor).words()), court.client)[0] == "StakeTooSmall"
    assert court.refused(court.contract.functions.quote(poor.address, 1), court.client)[0] == "StakeTooSmall"
    court.send(court.chain.token.functions.approve(court.contract.address, 1), court.client)
    name = court.refused(court.contract.functions.challenge(court.case(provider).words()), court.client)[0]
    assert name == "ERC20InsufficientAllowance"
    court.send(court.chain.token.functions.approve(court.contract.address, 2**256 - 1), court.client)


def test_quote_is_what_a_challenge_takes(court: Court, provider: LocalAccount) -> None:
    for amount in (0, ONE, 5 * ONE, 100 * ONE):
        fresh = court.node(STAKE)
        locked, bond = court.contract.functions.quote(fresh.address, amount).call()
        case = court.case(fresh, amount=amount)
        court.challenge(case)
        assert (court.dispute(case)["locked"], court.dispute(case)["bond"]) == (locked, bond)
    assert locked == STAKE


def test_challenges_of_one_provider_lock_what_is_left_and_never_more(court: Court, provider: LocalAccount) -> None:
    first, second = (court.case(provider, amount=5 * ONE) for _ in range(2))
    court.challenge(first)
    court.challenge(second)
    assert [court.dispute(c)["locked"] for c in (first, second)] == [750 * ONE, 250 * ONE]
    assert court.refused(court.contract.functions.challenge(court.case(provider).words()), court.client)[0] == "StakeTooSmall"
    court.decide(second, court.draw(second), [BEYOND] * 5)
    assert court.stake(provider) == (750 * ONE, 750 * ONE)
    court.decide(first, court.draw(first), [WITHIN] * 5)
    assert court.stake(provider) == (750 * ONE, 0)


# ---------------------------------------------------------------- the draw


def test_draw_too_early_with_another_nonce_or_too_late_is_refused(court: Court, provider: LocalAccount) -> None:
    case, stranger = court.case(provider), court.chain.accounts[5]
    court.challenge(case)
    draw = court.contract.functions.draw
    assert court.refused(draw(case.id, NONCE), stranger)[0] == "TooEarly"
    court.chain.anvil.rpc("anvil_mine", hex(3))
    assert court.refused(draw(case.id, b"\1" * 32), stranger)[0] == "WrongNonce"
    assert court.refused(court.contract.functions.finish(case.id), stranger)[0] == "TooEarly"
    court.pass_until(court.dispute(case)["drawUntil"])
    assert court.refused(draw(case.id, NONCE), stranger)[0] == "TooLate"
    before, burned = court.credited(court.client), court.contract.functions.toBurn().call()
    court.finish(case)
    assert court.outcome(case) == "NOT_DRAWN"
    assert court.credited(court.client) == before
    assert court.contract.functions.toBurn().call() - burned == court.dispute(case)["bond"]
    assert court.stake(provider) == (STAKE, 0)
    for call in (draw(case.id, NONCE), court.contract.functions.finish(case.id)):
        assert court.refused(call, stranger)[0] == "WrongState"


def test_draw_of_an_old_block_uses_the_chains_history(court: Court, provider: LocalAccount) -> None:
    """256 blocks later BLOCKHASH knows it no more; EIP-2935 does, and on a chain without it the dispute still ends by time."""
    case = court.case(provider)
    court.challenge(case)
    court.chain.anvil.rpc("anvil_mine", hex(300), "0x0")
    panel = court.draw(case)
    assert len(set(a.address for a in panel)) == 5
    court.decide(case, panel, [WITHIN] * 5)
    later = court.case(provider)
    court.challenge(later)
    code = court.chain.anvil.rpc("eth_getCode", HISTORY, "latest")
    court.chain.anvil.rpc("anvil_setCode", HISTORY, "0x")
    court.chain.anvil.rpc("anvil_mine", hex(300), "0x0")
    draw = court.contract.functions.draw(later.id, NONCE)
    assert court.refused(draw, court.client)[0] == "BlockHashGone"
    court.chain.anvil.rpc("anvil_setCode", HISTORY, code)
    court.pass_until(court.dispute(later)["drawUntil"])
    court.finish(later)
    assert court.outcome(later) == "NOT_DRAWN"


def test_draw_never_seats_a_party_its_owner_or_fresh_stake(court: Court) -> None:
    """Provider, scheduler, client and challenger hold seats of their own and through owners: none of these is ever drawn."""
    cold = court.chain.stranger()
    barred = [court.verifier(owner=cold) for _ in range(2)]
    provider = barred[0]
    court.send(court.chain.registry.functions.stake(provider.address, STAKE), court.chain.rich(provider))
    court.season()
    fresh = [court.verifier() for _ in range(2)]
    court.verifiers += [*barred, *fresh]
    for _ in range(6):
        case, panel = court.opened(provider)
        addresses = {member.address for member in panel}
        assert len(addresses) == 5
        assert not addresses & {a.address for a in (*barred, *fresh)}
        court.decide(case, panel, [WITHIN] * 5)
    for member in (*barred, *fresh):
        court.send(court.contract.functions.unenrol(MODEL), member)
        court.verifiers.remove(member)


def test_draw_follows_its_published_formula(court: Court, provider: LocalAccount) -> None:
    """Anyone can recompute the panel from nonce, block hash and list."""
    case = court.case(provider)
    court.challenge(case)
    found = court.dispute(case)
    names = [court.contract.functions.verifierAt(MODEL, i).call() for i in range(found["poolSize"])]
    panel = court.draw(case)
    block = court.chain.w3.eth.get_block(found["drawBlock"])["hash"]
    encode, keccak = court.chain.w3.codec.encode, court.chain.w3.keccak
    seed = keccak(encode(["bytes32", "bytes32"], [NONCE, bytes(block)]))
    drawn: list[str] = []
    index = 0
    while len(drawn) < 5:
        name = names[int.from_bytes(keccak(encode(["bytes32", "uint256"], [seed, index])), "big") % len(names)]
        index += 1
        if name not in drawn:
            drawn.append(name)
    assert drawn == [member.address for member in panel]
    court.decide(case, panel, [WITHIN] * 5)


# ---------------------------------------------------------------- evidence


def test_evidence_reported_missing_and_never_posted_costs_the_bond(court: Court, provider: LocalAccount) -> None:
    case, panel = court.opened(provider)
    burned, shares = court.contract.functions.toBurn().call(), [court.credited(m) for m in panel]
    court.send(court.contract.functions.reportMissing(case.id), panel[2])
    assert court.refused(court.contract.functions.reportMissing(case.id), panel[2])[0] == "AlreadyDone"
    court.commit(case, panel[0], BEYOND)
    assert court.refused(court.contract.functions.finish(case.id), court.client)[0] == "TooEarly"
    court.pass_until(court.dispute(case)["postUntil"])
    assert court.refused(court.contract.functions.postEvidence(case.id, b"late"), court.client)[0] == "TooLate"
    commit = court.contract.functions.commit(case.id, court.commitment(case, panel[1], 0))
    assert court.refused(commit, panel[1])[0] == "EvidenceOverdue"
    court.finish(case)
    bond, fee = court.dispute(case)["bond"], court.terms.panel_fee
    assert court.outcome(case) == "WITHHELD"
    assert [court.credited(m) - s for m, s in zip(panel, shares, strict=True)] == [fee] * 5
    assert court.contract.functions.toBurn().call() - burned == bond - 5 * fee
    assert court.stake(provider) == (STAKE, 0)
    assert court.surplus() == 0


def test_evidence_that_is_posted_keeps_the_dispute_alive(court: Court, provider: LocalAccount) -> None:
    case, panel = court.opened(provider)
    post = court.contract.functions.postEvidence
    assert court.refused(post(case.id, b"sealed"), court.client)[0] == "NothingMissing"
    court.send(court.contract.functions.reportMissing(case.id), panel[0])
    assert court.refused(post(case.id, b"sealed"), panel[0])[0] == "NotChallenger"
    assert court.refused(post(case.id, b""), court.client)[0] == "NoEvidence"
    receipt = court.send(post(case.id, b"sealed"), court.client)
    (event,) = court.chain.events(court.contract, "EvidencePosted", receipt)
    assert event == {"id": case.id, "evidence": b"sealed"}
    court.pass_until(court.dispute(case)["postUntil"])
    court.decide(case, panel, [BEYOND] * 5)
    assert court.outcome(case) == "SLASHED"


def test_evidence_that_a_reporter_got_after_all_is_missing_no_more(court: Court, provider: LocalAccount) -> None:
    case, panel = court.opened(provider)
    court.send(court.contract.functions.reportMissing(case.id), panel[0])
    court.commit(case, panel[0], WITHIN)
    assert court.dispute(case)["missing"] == 0
    assert court.refused(court.contract.functions.reportMissing(case.id), panel[0])[0] == "AlreadyDone"
    court.pass_until(court.dispute(case)["reportUntil"])
    assert court.refused(court.contract.functions.reportMissing(case.id), panel[1])[0] == "TooLate"
    for member in panel[1:]:
        court.commit(case, member, WITHIN)
    for member in panel:
        court.reveal(case, member, WITHIN)
    court.finish(case)
    assert court.outcome(case) == "DISMISSED"


# ---------------------------------------------------------------- commit and reveal


def test_commit_by_a_stranger_twice_empty_or_late_is_refused(court: Court, provider: LocalAccount) -> None:
    case, panel = court.opened(provider)
    commit = court.contract.functions.commit
    value = court.commitment(case, panel[0], 1)
    assert court.refused(commit(case.id, value), court.client)[0] == "NotMember"
    assert court.refused(commit(case.id, bytes(32)), panel[0])[0] == "InvalidCommitment"
    assert court.refused(commit(b"\1" * 32, value), panel[0])[0] == "WrongState"
    court.commit(case, panel[0], 1)
    assert court.refused(commit(case.id, value), panel[0])[0] == "AlreadyDone"
    court.pass_until(court.dispute(case)["commitUntil"])
    assert court.refused(commit(case.id, value), panel[1])[0] == "TooLate"
    court.pass_until(court.dispute(case)["revealUntil"])
    court.finish(case)


def test_reveal_of_anything_but_ones_own_commitment_is_refused(court: Court, provider: LocalAccount) -> None:
    case, panel = court.opened(provider)
    reveal = court.contract.functions.reveal
    copied = court.commitment(case, panel[0], BEYOND)
    for member in panel:  # the last four copy the first's commitment: they cannot open it
        court.send(court.contract.functions.commit(case.id, copied), member)
    salt = b"\x5a" * 32
    assert court.refused(reveal(case.id, BEYOND, salt), panel[1])[0] == "WrongReveal"
    assert court.refused(reveal(case.id, WITHIN, salt), panel[0])[0] == "WrongReveal"
    assert court.refused(reveal(case.id, BEYOND, bytes(32)), panel[0])[0] == "WrongReveal"
    assert court.refused(reveal(case.id, BEYOND, salt), court.client)[0] == "NotMember"
    court.reveal(case, panel[0], BEYOND)
    assert court.refused(reveal(case.id, BEYOND, salt), panel[0])[0] == "AlreadyDone"
    assert court.refused(court.contract.functions.finish(case.id), court.client)[0] == "TooEarly"
    court.pass_until(court.dispute(case)["revealUntil"])
    assert court.refused(reveal(case.id, BEYOND, salt), panel[1])[0] == "TooLate"
    court.finish(case)


def test_reveal_before_the_others_have_committed_is_refused(court: Court, provider: LocalAccount) -> None:
    case, panel = court.opened(provider)
    court.commit(case, panel[0], BEYOND)
    reveal = court.contract.functions.reveal(case.id, BEYOND, b"\x5a" * 32)
    assert court.refused(reveal, panel[0])[0] == "TooEarly"
    for member in panel[1:]:
        court.commit(case, member, BEYOND)
    court.reveal(case, panel[0], BEYOND)
    for member in panel[1:]:
        court.reveal(case, member, BEYOND)
    court.finish(case)


# ---------------------------------------------------------------- seats


def test_enrol_by_a_node_that_may_not_is_refused(court: Court) -> None:
    enrol = court.contract.functions.enrol
    assert court.refused(enrol(MODEL, OTHER), court.chain.accounts[2])[0] == "NotVerifier"
    unwilling = court.node(STAKE, roles=3)
    assert court.refused(enrol(MODEL, OTHER), unwilling)[0] == "NotVerifier"
    assert court.refused(enrol(MODEL, bytes(32)), court.verifiers[0])[0] == "AlreadyEnrolled"
    poor = court.node(court.terms.seat_stake - 1)
    assert court.refused(enrol(MODEL, OTHER), poor)[0] == "InsufficientStake"
    assert court.refused(enrol(MODEL, bytes(32)), poor)[0] == "InvalidEvidenceKey"


def test_seat_is_locked_once_for_all_models_and_released_with_the_last(court: Court) -> None:
    functions, stake = court.contract.functions, court.terms.seat_stake
    verifier = court.verifier(model=OTHER)
    assert court.stake(verifier) == (stake, stake)
    court.send(functions.enrol(Hash(b"\x98" * 32), OTHER), verifier)
    assert functions.seat(verifier.address).call() == (stake, 2, 0, OTHER)
    assert court.stake(verifier) == (stake, stake)
    court.send(functions.setEvidenceKey(b"\x31" * 32), verifier)
    assert functions.seat(verifier.address).call()[3] == b"\x31" * 32
    for call, error in (
        (functions.unenrol(MODEL), "NotEnrolled"),
        (functions.releaseSeat(verifier.address), "SeatInUse"),
        (functions.topUpSeat(), "SeatUnchanged"),
        (functions.evict(OTHER, verifier.address), "SeatCovered"),
        (functions.compact(OTHER, 0), "NothingToCompact"),
        (functions.setEvidenceKey(bytes(32)), "InvalidEvidenceKey"),
    ):
        assert court.refused(call, verifier)[0] == error
    court.send(functions.unenrol(OTHER), verifier)
    assert court.stake(verifier) == (stake, stake)
    court.send(functions.unenrol(Hash(b"\x98" * 32)), verifier)
    assert court.stake(verifier) == (stake, 0)
    assert functions.joinedEpoch(OTHER, verifier.address).call() == 0
    for call, error in (
        (functions.releaseSeat(verifier.address), "SeatUnchanged"),
        (functions.topUpSeat(), "NotVerifier"),
        (functions.setEvidenceKey(OTHER), "NotVerifier"),
    ):
        assert court.refused(call, verifier)[0] == error


def test_unenrol_while_a_draw_is_pending_moves_nobody(court: Court, provider: LocalAccount) -> None:
    functions = court.contract.functions
    leaver = court.verifiers[1]
    size = functions.verifierCount(MODEL).call()
    case = court.case(provider)
    court.challenge(case)
    before = [functions.verifierAt(MODEL, i).call() for i in range(size)]
    court.send(functions.unenrol(MODEL), leaver)
    hole = before.index(leaver.address)
    after = [functions.verifierAt(MODEL, i).call() for i in range(size)]
    assert after == [*before[:hole], "0x" + "00" * 20, *before[hole + 1 :]]
    assert court.refused(functions.compact(MODEL, hole), leaver)[0] == "NothingToCompact"
    panel = court.draw(case)
    assert leaver.address not in {m.address for m in panel}
    court.send(functions.compact(MODEL, hole), court.chain.accounts[5])
    assert functions.verifierCount(MODEL).call() == size - 1
    assert court.refused(functions.compact(MODEL, hole), leaver)[0] == "NothingToCompact"
    court.send(functions.enrol(MODEL, OTHER), leaver)
    court.decide(case, panel, [WITHIN] * 5)
    court.season()


def test_unenrol_of_a_drawn_member_keeps_its_seat_until_the_dispute_ends(court: Court, provider: LocalAccount) -> None:
    functions = court.contract.functions
    case, panel = court.opened(provider)
    leaver = panel[0]
    court.send(functions.unenrol(MODEL), leaver)
    assert court.stake(leaver)[1] == court.terms.seat_stake
    assert court.refused(functions.releaseSeat(leaver.address), leaver)[0] == "SeatInUse"
    court.send(functions.setEvidenceKey(b"\x32" * 32), leaver)  # it still serves
    court.decide(case, panel, [None, WITHIN, WITHIN, WITHIN, WITHIN])
    court.send(functions.releaseSeat(leaver.address), court.chain.accounts[5])
    assert court.stake(leaver)[1] == 0
    court.send(functions.enrol(MODEL, OTHER), _rich(court, leaver))
    court.season()


# ---------------------------------------------------------------- money out


def test_withdraw_pays_once_to_whom_one_says_and_burn_sends_to_nobody(court: Court) -> None:
    functions, chain = court.contract.functions, court.chain
    member = next(v for v in court.verifiers if court.credited(v))
    amount, cold = court.credited(member), Account.create().address
    for nowhere in ("0x" + "00" * 20, court.contract.address):
        assert court.refused(functions.withdraw(nowhere), member)[0] == "InvalidRecipient"
    court.send(functions.withdraw(cold), member)
    assert (chain.balance(cold), court.credited(member)) == (amount, 0)
    assert court.refused(functions.withdraw(cold), member)[0] == "NothingCredited"
    nobody = functions.BURN_ADDRESS().call()
    waiting, before = functions.toBurn().call(), chain.balance(nobody)
    assert waiting > 0
    court.send(functions.burn(), chain.accounts[5])
    assert chain.balance(nobody) - before == waiting
    assert court.refused(functions.burn(), chain.accounts[5])[0] == "NothingToBurn"


def test_unknown_disputes_are_refused_everywhere(court: Court) -> None:
    functions, nothing = court.contract.functions, b"\x42" * 32
    calls = (
        functions.draw(nothing, NONCE),
        functions.reportMissing(nothing),
        functions.postEvidence(nothing, b"x"),
        functions.commit(nothing, NONCE),
        functions.reveal(nothing, 1, NONCE),
        functions.finish(nothing),
    )
    for call in calls:
        assert court.refused(call, court.client) == ("WrongState", (nothing, 0))


def test_case_hashes_are_pythons(court: Court, provider: LocalAccount) -> None:
    """The id that the contract gives a dispute is the lease's struct hash in Python."""
    case: Case = court.case(provider)
    assert court.contract.functions.challenge(case.words()).call({"from": court.client.address}) == case.id

"""Disputes.sol in Python: the same rules in the same order, over stakes, seats and bonds. Used by `dispute_chain`.

Draw, commitment and payouts are the product's own mirror of the contract (`settlement.disputes`), so that its arithmetic is what the
machines' invariants weigh. Left out, because contract tests hold it: who signed what, joining and leaving, the token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from simulation.contract_model import Event, Revert

from gpumarket.contracts.dispute_terms import DisputeTerms
from gpumarket.core.terms import Lease, Receipt, VerificationProfile
from gpumarket.core.units import ZERO_HASH, Address, Hash
from gpumarket.settlement.disputes import (
    PANEL_SIZE,
    Payout,
    Seat,
    Shares,
    Stakes,
    State,
    bound,
    commitment,
    disputed_amount,
    draw_panel,
    lock_and_bond,
    nonce_commitment,
    panel_seed,
    settle,
    withheld,
)
from gpumarket.settlement.disputes import Outcome as End


@dataclass(frozen=True, slots=True)
class Block:
    """What a call sees of the block that it is in. `hash_of` gives the hash of an earlier one."""

    number: int
    time: int
    hash_of: Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Member:
    operator: Address
    seat: Seat = Seat.DRAWN
    commitment: Hash = ZERO_HASH
    number: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """DisputeTypes.sol's Dispute."""

    challenger: Address
    provider: Address
    client: Address
    amount: int
    bound: int
    locked: int
    bond: int
    slashable: bool
    nonce_commit: Hash
    draw_block: int
    draw_until: int
    opened_at: int
    state: State = State.CHALLENGED
    members: tuple[Member, ...] = ()
    posted: bool = False
    report_until: int = 0
    post_until: int = 0
    commit_until: int = 0
    reveal_until: int = 0
    payout: Payout | None = None
    ended_at: int = 0

    def seats(self, *seats: Seat) -> list[Address]:
        return [m.operator for m in self.members if m.seat in seats]

    @property
    def stakes(self) -> Stakes:
        return Stakes(self.provider, self.challenger, self.client, self.amount, self.locked, self.bond, self.slashable)


@dataclass
class Disputes:
    """The contract and the stake that it holds. `staked` counts what is locked too; values are replaced, never changed in place."""

    terms: DisputeTerms
    verifiers: tuple[Address, ...]
    staked: Counter[Address]
    tokens: Counter[Address]
    locked: Counter[Address] = field(default_factory=Counter)
    seats: Counter[Address] = field(default_factory=Counter)
    panels: Counter[Address] = field(default_factory=Counter)
    keys: dict[Address, bytes] = field(default_factory=dict)
    credited: Counter[Address] = field(default_factory=Counter)
    burned: int = 0
    held: int = 0
    """Tokens that the contract has."""
    disputes: dict[Hash, Record] = field(default_factory=dict)

    @property
    def shares(self) -> Shares:
        t = self.terms
        return Shares(
            t.panel_fee,
            t.no_show_fee,
            t.bond_minimum,
            t.lock_minimum,
            t.bond_ppm,
            t.amount_bond_ppm,
            t.burn_ppm,
            t.challenger_ppm,
            t.slash_multiple,
            t.victim_multiple,
        )

    def copy(self) -> Disputes:
        return replace(
            self,
            staked=Counter(self.staked),
            tokens=Counter(self.tokens),
            locked=Counter(self.locked),
            seats=Counter(self.seats),
            panels=Counter(self.panels),
            keys=dict(self.keys),
            credited=Counter(self.credited),
            disputes=dict(self.disputes),
        )

    def run(self, sender: Address, name: str, args: tuple[Any, ...], block: Block) -> list[Event]:
        """Execute one call. Raises Revert, and then nothing has changed: each call asks before it writes."""
        events: list[Event] = getattr(self, "_" + name)(sender, block, *args)
        return events

    def lockable(self, operator: Address) -> int:
        return self.staked[operator] - self.locked[operator]

    # --- the calls, in the contract's order --------------------------------------------------------------------------------

    def _challenge(
        self, sender: Address, block: Block, lease: Lease, receipt: Receipt, profile: VerificationProfile, nonce: Hash, evidence: Hash
    ) -> list[Event]:
        key = lease.struct_hash
        _need(key not in self.disputes, "already disputed")
        _need(lease.issued_at <= block.time < lease.issued_at + self.terms.challenge_seconds, "outside the challenge time")
        _need(sender == lease.client, "not the holder")
        amount = int(disputed_amount(lease, receipt))
        _need(self.lockable(lease.provider) >= self.terms.lock_minimum, "too little stake")
        locked, bond = lock_and_bond(self.shares, amount, self.lockable(lease.provider))
        _need(self.tokens[sender] >= bond, "no bond")
        draw_block, draw_until = block.number + self.terms.draw_delay_blocks, block.time + self.terms.draw_seconds
        slashable = len(self.verifiers) >= self.terms.slash_verifiers_min
        self.disputes[key] = Record(
            challenger=sender,
            provider=lease.provider,
            client=lease.client,
            amount=amount,
            bound=bound(profile),
            locked=locked,
            bond=bond,
            slashable=slashable,
            nonce_commit=nonce,
            draw_block=draw_block,
            draw_until=draw_until,
            opened_at=block.time,
        )
        self.tokens[sender] -= bond
        self.held += bond
        self.locked[lease.provider] += locked
        said = {"id": key, "provider": _hex(lease.provider), "challenger": _hex(sender), "model": lease.model, "task": lease.task.value}
        said |= {"bound": bound(profile), "amount": amount, "locked": locked, "bond": bond, "slashable": slashable}
        return [("Challenged", said | {"drawBlock": draw_block, "drawUntil": draw_until, "evidenceHash": evidence})]

    def _draw(self, sender: Address, block: Block, key: Hash, nonce: Hash) -> list[Event]:
        d = self._in(key, State.CHALLENGED)
        _need(block.number > d.draw_block, "too early")
        _need(block.time < d.draw_until, "too late")
        _need(nonce_commitment(key, d.challenger, nonce) == d.nonce_commit, "wrong nonce")
        seed = panel_seed(nonce, block.hash_of(d.draw_block))
        barred = {d.challenger, d.provider, d.client}
        panel = draw_panel(seed, self.verifiers, lambda who: who not in barred and self._covers(who), lambda who: who)
        if len(panel) < PANEL_SIZE:
            return self._end(key, block, Payout(End.NO_PANEL, Counter({d.challenger: d.bond})))
        self.panels.update(panel)
        report = block.time + self.terms.report_seconds
        post = report + self.terms.post_seconds
        commit = post + self.terms.commit_seconds
        self.disputes[key] = replace(
            d,
            state=State.DRAWN,
            members=tuple(map(Member, panel)),
            report_until=report,
            post_until=post,
            commit_until=commit,
            reveal_until=commit + self.terms.reveal_seconds,
        )
        said = {"id": key, "members": list(map(_hex, panel)), "reportUntil": report, "postUntil": post, "commitUntil": commit}
        return [("PanelDrawn", said)]

    def _set_evidence_key(self, sender: Address, block: Block, key: bytes) -> list[Event]:
        self.keys[sender] = key
        return []

    def _report_missing(self, sender: Address, block: Block, key: Hash) -> list[Event]:
        d, member = self._seated(key, sender)
        _need(block.time < d.report_until, "too late")
        _need(member.seat is Seat.DRAWN, "already done")
        self._seat(key, sender, seat=Seat.MISSING)
        return [("EvidenceMissing", {"id": key, "member": _hex(sender)})]

    def _post_evidence(self, sender: Address, block: Block, key: Hash, evidence: bytes) -> list[Event]:
        d = self._in(key, State.DRAWN)
        _need(sender == d.challenger, "not the challenger")
        _need(bool(d.seats(Seat.MISSING)), "nothing missing")
        _need(bool(evidence), "no evidence")
        _need(block.time < d.post_until, "too late")
        self.disputes[key] = replace(d, posted=True)
        return [("EvidencePosted", {"id": key, "evidence": evidence})]

    def _commit(self, sender: Address, block: Block, key: Hash, bound_to: Hash) -> list[Event]:
        d, member = self._seated(key, sender)
        _need(block.time < d.commit_until, "too late")
        _need(not _overdue(d, block.time), "evidence overdue")
        _need(any(bound_to), "no commitment")
        _need(member.seat in (Seat.DRAWN, Seat.MISSING), "already done")
        d = self._seat(key, sender, seat=Seat.COMMITTED, commitment=bound_to)
        events: list[Event] = [("Committed", {"id": key, "member": _hex(sender), "commitment": bound_to})]
        if len(d.seats(Seat.COMMITTED)) == PANEL_SIZE:
            until = block.time + self.terms.reveal_seconds
            self.disputes[key] = replace(d, commit_until=block.time, reveal_until=until)
            events.append(("RevealOpened", {"id": key, "revealUntil": until}))
        return events

    def _reveal(self, sender: Address, block: Block, key: Hash, number: int, salt: Hash) -> list[Event]:
        d, member = self._seated(key, sender)
        _need(block.time >= d.commit_until, "too early")
        _need(block.time < d.reveal_until, "too late")
        _need(member.seat is not Seat.REVEALED, "already done")
        _need(member.commitment == commitment(key, sender, number, salt), "wrong reveal")
        self._seat(key, sender, seat=Seat.REVEALED, number=number)
        return [("Revealed", {"id": key, "member": _hex(sender), "number": number})]

    def _finish(self, sender: Address, block: Block, key: Hash) -> list[Event]:
        d = self.disputes.get(key)
        _need(d is not None and d.state is not State.FINISHED, "wrong state")
        assert d is not None
        if d.state is State.CHALLENGED:
            _need(block.time >= d.draw_until, "too early")
            return self._end(key, block, Payout(End.NOT_DRAWN, burned=d.bond))
        if _overdue(d, block.time):
            return self._end(key, block, withheld(self.shares, d.stakes, d.seats(*Seat)))
        counted = block.time >= d.reveal_until or not d.seats(Seat.COMMITTED)
        _need(block.time >= d.commit_until and counted, "too early")
        revealed = {m.operator: m.number for m in d.members if m.seat is Seat.REVEALED}
        silent = [who for who in d.seats(*Seat) if who not in revealed]
        return self._end(key, block, settle(self.shares, d.stakes, d.bound, revealed, silent))

    def _withdraw(self, sender: Address, block: Block) -> list[Event]:
        amount = self.credited[sender]
        _need(amount > 0, "nothing credited")
        self.credited[sender] = 0
        self.held -= amount
        self.tokens[sender] += amount
        return []

    # --- inside ------------------------------------------------------------------------------------------------------------

    def _end(self, key: Hash, block: Block, payout: Payout) -> list[Event]:
        """Take what the payout takes, credit what it credits; the rest of the lock is free."""
        d = self.disputes[key]
        for who in d.seats(*Seat):
            self.panels[who] -= 1
        for who, fee in payout.fees.items():
            self._slash(who, fee)
            self.seats[who] -= fee
        self._slash(d.provider, payout.taken)
        self.locked[d.provider] -= d.locked - payout.taken
        self.credited.update(payout.credited)
        self.burned += payout.burned
        self.disputes[key] = replace(d, state=State.FINISHED, payout=payout, ended_at=block.time)
        numbers = [m.number for m in d.members if m.seat is Seat.REVEALED]
        beyond = sum(number > d.bound for number in numbers)
        said = {"id": key, "outcome": payout.outcome.value, "beyond": beyond, "within": len(numbers) - beyond}
        return [("Finished", said | {"taken": payout.taken, "burned": payout.burned})]

    def _slash(self, who: Address, amount: int) -> None:
        """The registry gives locked stake to the contract."""
        assert amount <= self.locked[who], "more is taken than is locked"
        self.staked[who] -= amount
        self.locked[who] -= amount
        self.held += amount

    def _covers(self, who: Address) -> bool:
        return self.seats[who] >= self.terms.no_show_fee * (self.panels[who] + 1)

    def _in(self, key: Hash, state: State) -> Record:
        d = self.disputes.get(key)
        _need(d is not None and d.state is state, "wrong state")
        assert d is not None
        return d

    def _seated(self, key: Hash, sender: Address) -> tuple[Record, Member]:
        d = self._in(key, State.DRAWN)
        found: Sequence[Member] = [m for m in d.members if m.operator == sender]
        _need(bool(found), "not a member")
        return d, found[0]

    def _seat(self, key: Hash, sender: Address, **changes: Any) -> Record:
        d = self.disputes[key]
        members = tuple(replace(m, **changes) if m.operator == sender else m for m in d.members)
        self.disputes[key] = replace(d, members=members)
        return self.disputes[key]


def _overdue(d: Record, now: int) -> bool:
    return bool(d.seats(Seat.MISSING)) and not d.posted and now >= d.post_until


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise Revert(what)


def _hex(address: Address) -> str:
    return "0x" + address.hex()

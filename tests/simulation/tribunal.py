"""A world of disputes: a challenger, an accused provider, verifiers, a chain and a network; and what must hold of them at every moment.

Conservation: tokens and stake are somebody's, the contract's, or burned; what the contract holds is credits, bonds and what waits to be
burned; what is locked belongs to a seat or an open dispute. Numbers: a member says one number in a dispute, its commitment is to that one,
and none leaves before committing is over. Verdicts: with at most two of five hostile an honest provider loses nothing. Time: each ends.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
from dispute_kit import Deal
from numpy.typing import NDArray
from simulation.chain_model import Tx
from simulation.dispute_chain import BLOCK_SECONDS, Blocks
from simulation.dispute_contract import Disputes, Record
from simulation.dispute_roles import LOOK_SECONDS, ChallengerRole, MemberRole
from simulation.invariants import need
from simulation.medium import Medium
from simulation.shop import MODELS, TOKEN
from simulation.virtual import START, Timeline
from simulation.wire import CALM, Network
from simulation.world import NETWORKS

from gpumarket.contracts.dispute_terms import DisputeTerms
from gpumarket.core.codec import from_proto
from gpumarket.core.signing import LocalKey
from gpumarket.core.terms import Lease, Task, keccak256
from gpumarket.core.units import Address, Hash
from gpumarket.node.tables import metadata as PROVIDER_TABLES
from gpumarket.sdk.tables import METADATA as CLIENT_TABLES
from gpumarket.settlement.chain.disputes import Head
from gpumarket.settlement.disputes import NUMBER_MAX, PANEL_SIZE, Dispute, Outcome, Seat, State, commitment
from gpumarket.settlement.verification import TEXT_BF16
from gpumarket.v1 import market_pb2 as mpb

VERIFIERS = 6
STAKE = 1_000 * TOKEN
TERMS = replace(
    DisputeTerms(),
    draw_delay_blocks=1,
    draw_seconds=90,
    report_seconds=120,
    post_seconds=180,
    commit_seconds=180,
    reveal_seconds=180,
    slash_verifiers_min=5,
)
"""The deployed shares and amounts; windows of a few dozen blocks, so that a history of minutes has all of them."""
SLACK_SECONDS = 8 * LOOK_SECONDS + 10 * BLOCK_SECONDS
"""How long after its last window a dispute may still be open: whoever finishes first looks, waits for confirmations, and may be refused."""
HOME_SECONDS = 180
"""Enough to see that a dispute is over and to withdraw, also at the second try."""
ON_ITS_WAY_SECONDS = 180
"""From a challenger's start to its challenge in a block, its pauses after failures included."""
HARMED = (Outcome.SLASHED, Outcome.RESTITUTION)
INPUTS = [[1, 2, 3], [4, 5]]
Role = MemberRole | ChallengerRole


class Tribunal:
    """`hostile`: how many places of each panel say what hurts most; `terms.slash_verifiers_min` above VERIFIERS: nothing can be slashed."""

    def __init__(self, seed: int, *, hostile: int = 0, terms: DisputeTerms = TERMS) -> None:
        self.rng, self.hostile = random.Random(seed), hostile
        self.timeline = Timeline()
        self.net = Network(self.timeline, self.rng)
        NETWORKS[id(self.timeline)] = self.net
        client = LocalKey(keccak256(b"sim challenger"))
        for medium in media():
            medium.wipe()
        self.cheats: dict[Hash, bool] = {}
        self.openings: dict[Hash, mpb.Opening] = {}
        contract = Disputes(terms, (), Counter(), Counter({client.address: 10**6 * TOKEN}))
        self.blocks = Blocks(self.timeline, self.rng, contract)
        self.members = [MemberRole(self.net, self.blocks, self.rng, i, media()[1 + i], self._lie) for i in range(VERIFIERS + 1)]
        self.accused = self.members.pop()
        self._seat(contract)
        self.challenger = ChallengerRole(self.net, self.blocks, self.rng, client, media()[0], self.members)
        self.total = self._everything()
        self.seen = 0
        self.said: dict[tuple[Address, Hash, str], tuple[object, ...]] = {}
        self.crashes = self.deep_reorgs = 0

    @property
    def roles(self) -> list[Role]:
        return [self.challenger, self.accused, *self.members]

    def run(self, seconds: float) -> None:
        self.timeline.run(seconds)

    def dispute(self, *, cheats: bool, inputs: list[list[int]] = INPUTS) -> Hash:
        """A finished job of the accused, and a challenge of it."""
        rows = [_row(ids, 0.5 if cheats else 0.0) for ids in inputs]
        deal = Deal(self.challenger.key, SCHEDULER, self.accused.key, MODELS[Task.EMBED].manifest.digest, issued_at=self._unix())
        return self.challenge(deal.embed(inputs, rows, name=b"job %d" % len(self.cheats)), cheats=cheats)

    def text(self, ties: Callable[[int], NDArray[np.float32]], tokens: int) -> Hash:
        """An honest text of the accused, and a challenge of it. `ties`: the gaps that a member's decoder finds."""
        for member in self.members:
            member.ties = ties
        deal = Deal(self.challenger.key, SCHEDULER, self.accused.key, MODELS[Task.GENERATE].manifest.digest, issued_at=self._unix())
        opening = deal.text([1, 2, 3], range(tokens), name=b"job %d" % len(self.cheats), profile=TEXT_BF16)
        return self.challenge(opening, cheats=False)

    def challenge(self, opening: mpb.Opening, *, cheats: bool) -> Hash:
        """Have the challenger dispute this. `cheats`: whether an honest panel finds it gross."""
        key = from_proto(Lease, opening.lease.lease).struct_hash
        self.cheats[key], self.openings[key] = cheats, opening
        self.challenger.challenge(opening, key)
        return key

    def crash(self, role: Role) -> None:
        if role.process.alive:
            self.crashes += 1
            role.process.kill()

    def crash_at(self, role: Role, commits: int, *, after: bool) -> None:
        role.medium.arm(commits, after=after, on_crash=lambda: self.crash(role))

    def restart(self, role: Role) -> None:
        if not role.process.alive:
            role.medium.disarm()
            role.start()

    def heal(self) -> None:
        """No more faults."""
        self.net.weather, self.blocks.full = CALM, 0.0
        self.net.cut.clear()
        self.blocks.cut.clear()
        for role in self.roles:
            role.medium.disarm()
            role.medium.seconds = 0.004
            self.restart(role)

    def close(self) -> None:
        for role in self.roles:
            role.process.kill()
        NETWORKS.pop(id(self.timeline), None)

    def _seat(self, contract: Disputes) -> None:
        contract.verifiers = tuple(m.key.address for m in self.members)
        for member in [*self.members, self.accused]:
            contract.staked[member.key.address] = STAKE
        for operator in contract.verifiers:
            contract.seats[operator] = contract.locked[operator] = contract.terms.seat_stake

    def _lie(self, dispute: Dispute, me: Address) -> int | None:
        place = [m.operator for m in dispute.members].index(me)
        if place >= self.hostile:
            return None
        return 0 if self.cheats[dispute.id] else NUMBER_MAX

    def _unix(self) -> int:
        return int(START + self.timeline.now)

    # --- what must hold ----------------------------------------------------------------------------------------------------

    def holds_now(self) -> None:
        """Raises Broken."""
        need(not self.timeline.defects, f"defects: {self.timeline.defects}")
        c = self.blocks.contract
        need(self._everything() == self.total, f"tokens came from nowhere, or went there: {self._everything() - self.total}")
        bonds = sum(d.bond for d in c.disputes.values() if d.state is not State.FINISHED)
        need(c.held == sum(c.credited.values()) + bonds + c.burned, "the contract owes other than it holds")
        for who, locked in c.locked.items():
            open_locks = sum(d.locked for d in c.disputes.values() if d.provider == who and d.state is not State.FINISHED)
            need(locked == c.seats[who] + open_locks, f"{who.hex()[:8]} has {locked} locked for seats and disputes of another sum")
            need(0 <= locked <= c.staked[who], "more is locked than is staked")
        for key, d in c.disputes.items():
            self._sums(d)
            self._verdict(key, d)
        for tx, head in self.blocks.sent[self.seen :]:
            self._spoken(tx, head)
        self.seen = len(self.blocks.sent)

    def run_to_the_end(self) -> None:
        """Until every dispute is over or its time is, those included whose challenge is still on its way. Raises Broken."""
        began = max(self.timeline.now, self.blocks.resumes)
        while self.timeline.now < began + ON_ITS_WAY_SECONDS or any(self.timeline.now < self._ends_by(d, began) for d in self._open()):
            if not self._open() and self._all_opened():
                return
            self.run(2 * LOOK_SECONDS)
        for d in self._open():
            need(False, f"a dispute does not end: {d.state.name} {[m.seat.name for m in d.members]}")

    def run_home(self) -> None:
        """Until everybody who is there has taken what it earned, or had time to try twice."""
        until = max(self.timeline.now, self.blocks.resumes) + HOME_SECONDS
        while self.timeline.now < until and self._untaken():
            self.run(LOOK_SECONDS)

    def _ends_by(self, d: Record, healed: float) -> float:
        return max(healed, d.opened_at - START + self.blocks.contract.terms.dispute_seconds) + SLACK_SECONDS

    def _all_opened(self) -> bool:
        """Every challenge is in a block, or lost with the process that had not written it down."""
        return not self.challenger.process.alive or len(self.blocks.contract.disputes) == len(self.cheats)

    def settled(self) -> None:
        """After the last fault, all windows and the slack: nothing is open, nothing stays locked, what was earned was taken."""
        c = self.blocks.contract
        need(not self._open(), "a dispute is open still")
        need(not any(c.panels.values()), "a panel is over and its members' seats are still in use")
        need(c.lockable(self.accused.key.address) == c.staked[self.accused.key.address], "a dispute is over and its lock is not")
        need(not self._untaken(), f"earned and never taken: {self._untaken()}")

    def _untaken(self) -> dict[str, int]:
        credited = {role.name: self.blocks.contract.credited[role.key.address] for role in self.roles}
        return {name: amount for name, amount in credited.items() if amount}

    def _open(self) -> list[Record]:
        return [d for d in self.blocks.contract.disputes.values() if d.state is not State.FINISHED]

    def _everything(self) -> int:
        c = self.blocks.contract
        return sum(c.tokens.values()) + sum(c.staked.values()) + c.held

    def _sums(self, d: Record) -> None:
        paid = d.payout
        if paid is None:
            return
        given = sum(paid.credited.values()) + paid.burned
        need(given == paid.taken + d.bond + sum(paid.fees.values()), f"{given} paid out of {paid.taken} taken and a bond of {d.bond}")
        need(paid.taken <= d.locked, "a verdict took more than its challenge locked")
        need(paid.burned * 2 >= paid.taken, "less than half of a slash was burned")
        need(paid.outcome is not Outcome.SLASHED or d.slashable, "slashed where too few verifiers are seasoned")

    def _verdict(self, key: Hash, d: Record) -> None:
        beyond = sum(m.number > d.bound for m in d.members if m.seat is Seat.REVEALED)
        if d.payout is not None and not self.cheats[key] and self.hostile <= PANEL_SIZE // 2:
            need(d.payout.taken == 0 and d.payout.outcome not in HARMED, f"an honest provider lost {d.payout.taken}")
        for place, m in enumerate(d.members):
            if m.seat is Seat.REVEALED and place >= self.hostile and not self.cheats[key]:
                need(m.number <= d.bound, f"an honest member says {m.number} of an honest result")
        if d.payout is not None and d.members and d.payout.outcome is not Outcome.WITHHELD:
            need((d.payout.outcome is Outcome.SLASHED) == (beyond >= 4 and d.slashable), f"{beyond} beyond: {d.payout.outcome.name}")

    def _spoken(self, tx: Tx, head: Head) -> None:
        """What left a member: always the same, and what it committed to."""
        if tx.name not in ("commit", "reveal"):
            return
        key, who = tx.args[0], tx.sender
        before = self.said.setdefault((who, key, tx.name), tx.args)
        need(before == tx.args, f"a member says two things in one {tx.name}")
        if tx.name == "reveal":
            committed = self.said.get((who, key, "commit"))
            need(committed is not None, "a reveal without a commit")
            assert committed is not None
            need(committed[1] == commitment(key, who, *tx.args[1:]), "a reveal of another number than was committed")
            d = self.blocks.contract.disputes.get(key)
            if d is not None and not self.deep_reorgs and d.state is State.DRAWN:
                over = head.time >= d.commit_until or not d.seats(Seat.DRAWN, Seat.MISSING)
                need(over, "a number left before committing was over")


SCHEDULER = LocalKey(keccak256(b"sim scheduler"))


@cache
def media() -> tuple[Medium, ...]:
    """The disks, made once: the challenger's, the members', the accused's."""
    return tuple(Medium(tables) for tables in (CLIENT_TABLES, *[PROVIDER_TABLES] * (VERIFIERS + 1)))


def _row(ids: list[int], wrong: float) -> bytes:
    return np.array([len(ids), ids[0], 0.25 + wrong], dtype="<f4").tobytes()

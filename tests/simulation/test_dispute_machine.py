"""Disputes in random histories: the product's members, challenger and payouts; crashes, silence, withheld evidence, reorgs, stalls."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reliability import record
from simulation import invariants
from simulation.dispute_chain import CONFIRMATIONS
from simulation.profiles import EXAMPLES, EXAMPLES_ALL, run
from simulation.tribunal import TERMS, VERIFIERS, Role, Tribunal
from simulation.wire import stormy
from simulation.world import simulated_lines

from gpumarket.core.units import Hash
from gpumarket.settlement.disputes import Outcome

INJECTED: Counter[str] = Counter()
"""What all histories of this process had to bear."""
OUTCOMES: Counter[str] = Counter()
ROLES = st.integers(0, VERIFIERS + 1)
DISPUTES_MAX = 2


class DisputeMachine(RuleBasedStateMachine):
    """One chain, and up to two disputes on it."""

    broken = False

    @initialize(
        seed=st.integers(0, 2**32 - 1),
        hostile=st.sampled_from([0, 1, 2]),
        slashable=st.sampled_from([True, True, False]),
        cheats=st.booleans(),
        stays=st.sampled_from([0.0, 0.0, 0.0, 8.0, 40.0]),
    )
    def begin(self, seed: int, hostile: int, slashable: bool, cheats: bool, stays: float) -> None:
        """`stays`: after so many seconds the challenger is gone for ever, before its panel is drawn or soon after."""
        note(f"seed {seed}, hostile {hostile}, slashable {slashable}, cheats {cheats}, stays {stays}")
        terms = TERMS if slashable else replace(TERMS, slash_verifiers_min=VERIFIERS + 1)
        self.world = Tribunal(seed, hostile=hostile, terms=terms)
        self.faults = 0
        self.gone: set[str] = set()
        self.world.run(1)
        self.world.dispute(cheats=cheats)
        if stays:
            self.world.run(stays)
            self._goes(self.world.challenger, ever=True)

    @precondition(lambda self: len(self.world.cheats) < DISPUTES_MAX)
    @rule(cheats=st.booleans())
    def dispute_another(self, cheats: bool) -> None:
        self.world.dispute(cheats=cheats)
        self.world.run(0.5)

    @rule(seconds=st.sampled_from([3.0, 20.0, 60.0, 130.0, 250.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.run(seconds)

    # --- the parties -----------------------------------------------------------------------------------------------------------

    @rule(posts=st.sampled_from(["nothing", "rubbish", "sealed"]), shown=st.integers(0, VERIFIERS))
    def challenger_withholds(self, posts: str, shown: int) -> None:
        """It shows the evidence to `shown` of the verifiers, and posts this to the others."""
        self.faults += 1
        self.world.challenger.posts = posts
        self.world.net.walls = {frozenset((self.world.challenger.name, m.name)) for m in self.world.members[shown:]}

    @rule(who=st.integers(0, VERIFIERS - 1), ever=st.booleans())
    def member_goes_silent(self, who: int, ever: bool) -> None:
        """For ever, or until somebody looks after it."""
        self._goes(self.world.members[who], ever=ever)

    @rule(who=ROLES, seconds=st.sampled_from([0.0, 5.0, 60.0, 200.0]))
    def crash(self, who: int, seconds: float) -> None:
        self.faults += 1
        role = self._role(who)
        self.world.crash(role)
        self.world.run(seconds)
        self._restart(role)

    @rule(who=ROLES, commits=st.integers(1, 3), after=st.booleans())
    def crash_at_a_commit(self, who: int, commits: int, after: bool) -> None:
        self.faults += 1
        self.world.crash_at(self._role(who), commits, after=after)

    @rule()
    def restart_the_dead(self) -> None:
        for role in self.world.roles:
            self._restart(role)
        self.world.run(0.5)

    # --- network and chain -----------------------------------------------------------------------------------------------------

    @rule(strength=st.sampled_from([0.3, 1.0]))
    def weather_changes(self, strength: float) -> None:
        self.faults += 1
        self.world.net.weather = stormy(self.world.rng, strength)

    @rule(who=ROLES, chain=st.booleans())
    def cut_off(self, who: int, chain: bool) -> None:
        self.faults += 1
        role = self._role(who)
        if chain:
            self.world.blocks.cut.add(role.key.address)
        else:
            self.world.net.cut.add(role.name)

    @rule()
    def reach_again(self) -> None:
        self.world.net.cut.clear()
        self.world.blocks.cut.clear()

    @rule(depth=st.integers(1, CONFIRMATIONS + 2))
    def reorganisation(self, depth: int) -> None:
        self.faults += 1
        self.world.deep_reorgs += depth > CONFIRMATIONS
        self.world.blocks.reorganise(depth)
        self.world.run(0.1)

    @rule(seconds=st.sampled_from([20.0, 100.0]), full=st.sampled_from([0.0, 0.5]))
    def blocks_are_late(self, seconds: float, full: float) -> None:
        self.faults += 1
        self.world.blocks.stall(seconds)
        self.world.blocks.full = full

    # --- what must hold --------------------------------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            try:
                self.world.holds_now()
            except invariants.Broken:
                self.broken = True
                raise

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        try:
            if self.broken:  # what follows a broken invariant says nothing
                return
            self._end()
            world.holds_now()
            world.settled()
            for key, cheats in world.cheats.items():
                d = world.blocks.contract.disputes.get(key)
                if not self.faults:
                    assert d is not None and d.payout is not None
                    self._as_deserved(key, d.payout.outcome, cheats)
                OUTCOMES[d.payout.outcome.name if d is not None and d.payout is not None else "never opened"] += 1
        finally:
            INJECTED.update(histories=1, crashes=world.crashes, reorganisations=world.blocks.reorgs, returned=world.blocks.returned)
            INJECTED.update(lost=world.net.lost, repeated=world.net.repeated, late=world.net.late, stalls=world.blocks.stalls)
            world.close()

    def _end(self) -> None:
        """Everybody who is not gone for ever is looked after; then time alone has its say, and those gone at last take what is theirs."""
        world = self.world
        world.heal()
        for role in world.roles:
            if role.name in self.gone:
                role.process.kill()
        world.run_to_the_end()
        for role in world.roles:
            world.restart(role)
        world.run_home()

    def _as_deserved(self, key: Hash, outcome: Outcome, cheats: bool) -> None:
        """Without a fault, the verdict is the truth's."""
        d = self.world.blocks.contract.disputes[key]
        harm = Outcome.SLASHED if self.world.hostile <= 1 and d.slashable else Outcome.RESTITUTION
        expected = harm if cheats else Outcome.DISMISSED
        assert outcome is expected, f"{outcome.name}, and nothing went wrong"

    def _goes(self, role: Role, *, ever: bool) -> None:
        self.faults += 1
        self.world.crash(role)
        if ever:
            self.gone.add(role.name)

    def _restart(self, role: Role) -> None:
        if role.name not in self.gone:
            self.world.restart(role)

    def _role(self, who: int) -> Role:
        return self.world.roles[who]


FORMS = [
    pytest.param(EXAMPLES, marks=pytest.mark.timeout(900)),
    pytest.param(EXAMPLES_ALL, marks=[pytest.mark.slow, pytest.mark.timeout(4 * 3_600)]),
]


@pytest.mark.parametrize("examples", FORMS)
def test_dispute_random_histories_conserve_money_and_end(examples: int) -> None:
    INJECTED.clear()
    OUTCOMES.clear()
    with simulated_lines():
        run(DisputeMachine, examples)
    faults = sum(INJECTED.values()) - INJECTED["histories"]
    record("I1-I8 of disputes", INJECTED["histories"], f"broken 0, under {faults} faults ({dict(OUTCOMES)})", "broken 0")

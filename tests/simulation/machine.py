"""The rule machine over a simulated world (`world.World`): orders, time, weather, crashes, chain events; invariants after each rule."""

from __future__ import annotations

from collections import Counter

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulation import invariants
from simulation.contract_model import CLOSE_WINDOW_SECONDS
from simulation.shop import CLIENT, SCHEDULER, SCHEDULER_SETTINGS
from simulation.virtual import START
from simulation.wire import stormy
from simulation.world import Role, World, wiped

from gpumarket.core.errors import ProtocolError
from gpumarket.core.terms import Task
from gpumarket.core.units import Hash
from gpumarket.sdk import money
from gpumarket.sdk.desk import Desk
from gpumarket.settlement.chain.view import ChannelOnChain

SETTLE_SECONDS = 40 + 2 * SCHEDULER_SETTINGS.claim_grace_seconds + 2 * SCHEDULER_SETTINGS.check_seconds + 40
ROLES = st.integers(0, 4)
INJECTED: Counter[str] = Counter()
"""What all histories of this process had to bear."""
embeddings = st.lists(st.integers(1, 4), min_size=1, max_size=5)


class MarketMachine(RuleBasedStateMachine):
    """One world."""

    broken = False

    @initialize(seed=st.integers(0, 2**32 - 1), cheat=st.sampled_from([None, None, 0, 1, 2]), storm=st.sampled_from([1.0, 0.3, 0.0]))
    def begin(self, seed: int, cheat: int | None, storm: float) -> None:
        note(f"seed {seed}, cheat {cheat}, storm {storm}")
        wiped()
        self.world = World(seed, cheats=() if cheat is None else (cheat,))
        self.watch = invariants.Watch(self.world)
        self.undisturbed: dict[Hash, int] = {}
        """Channels whose payer asked to close alone, and nothing kept their payee from the chain since: what it was owed then."""
        self.world.run(12)
        if storm:
            self.world.net.weather = stormy(self.world.rng, storm)
            self.world.slow_disks()
        for _ in range(3):
            self.world.client.order(Task.EMBED, [self.world.rng.randint(1, 4) for _ in range(3)])
        self.world.run(0.5)

    # --- work ------------------------------------------------------------------------------------------------------------------

    @rule(sizes=embeddings)
    def order_embeddings(self, sizes: list[int]) -> None:
        self.world.client.order(Task.EMBED, sizes)
        self.world.run(0.3)

    @rule(tokens=st.integers(1, 14), leaves=st.none() | st.integers(1, 8))
    def order_text(self, tokens: int, leaves: int | None) -> None:
        self.world.client.order(Task.GENERATE, [tokens], stream_until=leaves)
        self.world.run(0.3)

    @rule(index=st.integers(0, 3))
    def caller_cancels(self, index: int) -> None:
        self.world.client.leave(index)
        self.world.run(0.1)

    @rule(seconds=st.sampled_from([0.05, 0.4, 1.5, 4.0, 12.0, 45.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.run(seconds)

    # --- faults ----------------------------------------------------------------------------------------------------------------

    @rule(strength=st.sampled_from([0.0, 0.3, 1.0]))
    def weather_changes(self, strength: float) -> None:
        self.world.net.weather = stormy(self.world.rng, strength)

    @rule(who=ROLES, seconds=st.sampled_from([0.0, 0.2, 3.0, 30.0]))
    def crash(self, who: int, seconds: float) -> None:
        self.undisturbed.clear()
        role = self._role(who)
        self.world.crash(role)
        self.world.run(seconds)
        self.world.restart(role)
        self.world.run(0.2)

    @rule(who=ROLES, commits=st.integers(1, 6), after=st.booleans())
    def crash_at_a_commit(self, who: int, commits: int, after: bool) -> None:
        self.undisturbed.clear()
        self.world.crash_at(self._role(who), commits, after=after)

    @rule()
    def restart_the_dead(self) -> None:
        for role in self.world.roles:
            self.world.restart(role)
        self.world.run(0.5)

    @rule(who=st.integers(1, 4))
    def cut_off(self, who: int) -> None:
        self.world.net.cut.add(self._role(who).name)

    @precondition(lambda self: self.world.net.cut)
    @rule()
    def reach_again(self) -> None:
        self.world.net.cut.clear()

    @rule()
    def disks_slow_down(self) -> None:
        self.undisturbed.clear()
        self.world.slow_disks()

    # --- chain -----------------------------------------------------------------------------------------------------------------

    @rule(depth=st.integers(1, 3))
    def reorganisation(self, depth: int) -> None:
        self.undisturbed.clear()
        self.world.chain.reorganise(depth)
        self.world.run(0.1)

    @rule(seconds=st.sampled_from([5.0, 40.0]), answers=st.booleans())
    def chain_stops(self, seconds: float, answers: bool) -> None:
        """No block for so long; or no node answers until somebody looks after it."""
        self.undisturbed.clear()
        if answers:
            self.world.chain.stall(seconds)
        else:
            self.world.chain.go_down()
        self.world.run(seconds / 4)

    @precondition(lambda self: self.world.chain.down)
    @rule()
    def chain_comes_back(self) -> None:
        self.world.chain.come_back()
        self.world.run(1.0)

    @rule()
    def client_closes_with_consent(self) -> None:
        """`gpumarket wallet close-channel`."""
        self.world.client.on_desk(money.close)
        self.world.run(0.3)

    @rule(index=st.integers(0, 3), spoke=st.booleans(), waits=st.sampled_from([2.5, 2.5, CLOSE_WINDOW_SECONDS + 5.0]))
    def payer_closes_alone(self, index: int, spoke: bool, waits: float) -> None:
        """It asks the contract, as anybody can with the payer's key and no daemon at all; it may sit the window out."""
        payer = SCHEDULER.address if spoke else CLIENT.address
        mine = [c for c in self.world.chain.head.channels.values() if c.payer == payer and not c.closes_at]
        if mine:
            channel = mine[index % len(mine)]
            self.undisturbed[channel.id] = self._owed(channel)
            self.world.closed_alone.add(channel.id)
            self.world.chain.send(payer, "request_close", channel.id)
            self.world.run(waits)
            self._take_the_rest()

    def _take_the_rest(self) -> None:
        """Payers close what can be closed."""
        for channel in self._closable():
            owed = self.undisturbed.pop(channel.id, 0)
            assert channel.claimed >= owed, f"I7: a voucher lapsed: {channel.claimed} was claimed of {owed}"
            self.world.chain.send(channel.payer, "close", channel.id)

    # --- what must hold --------------------------------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            try:
                invariants.holds_now(self.world, self.watch)
            except invariants.Broken:
                self.broken = True
                raise

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        if self.broken:  # what follows a broken invariant says nothing
            world.close()
            return
        try:
            world.heal()
            world.run(SETTLE_SECONDS / 2)
            self._take_the_rest()
            world.crash(world.client)  # what a bad network left resumable is taken up by the next process
            world.heal()
            world.run(SETTLE_SECONDS / 2)
            invariants.holds_now(world, self.watch)
            invariants.settled(world, self.watch, honest=[p for p in world.providers if not p.cheats])
            self._leave()
        finally:
            INJECTED.update(outages=world.chain.outages, closed=world.chain.closed)
            INJECTED.update(histories=1, crashes=world.crashes, reorganisations=world.chain.reorgs)
            INJECTED.update(lost=world.net.lost, repeated=world.net.repeated, late=world.net.late)
            world.close()

    def _owed(self, channel: ChannelOnChain) -> int:
        """What its payee, if it lives, could redeem of a channel now and has a right to."""
        world = self.world
        if world.chain.down or world.timeline.now < world.chain.stalled_until:
            return 0
        if channel.payee == SCHEDULER.address:
            market = world.scheduler.market if world.scheduler.alive else None
            hub = market.ledger.hubs.get(channel.id) if market is not None else None
            return min(hub.state.used, hub.state.voucher) if hub is not None else 0
        held = [p.vouchers()[channel.id].cumulative for p in world.providers if channel.id in p.vouchers()]
        return held[0] if held else 0

    def _leave(self) -> None:
        """The client goes: with consent, or alone where the scheduler's last bill is more than its own acks (by a window at most)."""
        disputed: list[str] = []

        async def close(desk: Desk) -> None:
            try:
                await money.close(desk)
            except ProtocolError as error:
                disputed.append(error.message)

        self.world.client.on_desk(close)
        self.world.run(20)
        if disputed:
            for channel in list(self.world.chain.head.channels.values()):
                if channel.payer == CLIENT.address and not channel.closes_at:
                    self.world.chain.send(CLIENT.address, "request_close", channel.id)
            self.world.run(CLOSE_WINDOW_SECONDS + 5)
            self._take_the_rest()
            self.world.run(5)
        invariants.client_is_out(self.world)

    def _closable(self) -> list[ChannelOnChain]:
        """Channels whose close window is over."""
        now = START + self.world.timeline.now
        return [c for c in self.world.chain.head.channels.values() if c.closes_at and now >= c.closes_at]

    def _role(self, who: int) -> Role:
        return self.world.roles[who]

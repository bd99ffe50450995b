"""A member of panels: takes evidence, writes its number down, commits, reveals, and reports what did not come, without anybody's hand.

The chain says what was done, the journal what must be said; every step follows from the two (`settlement.disputes.member_step`), so that a
restart repeats nothing and forgets nothing. Invariants: the number is in the journal before its commitment leaves, and a commitment is
always to that number; no number leaves before committing is over. Never: evidence in the journal or a log.

A dispute about this provider's own work is ended here too when its time has come and nobody else ends it: until then its stake is locked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import structlog

from gpumarket.core.errors import BadSignature, GpumarketError, JournalError, NetworkError, ProtocolError
from gpumarket.core.ports import Clock, Random
from gpumarket.core.units import Address, Hash, hex0x
from gpumarket.node.panel.judging import NOTHING_SHOWN, Judge
from gpumarket.node.panel.pacing import Pacing
from gpumarket.node.panel.records import PanelRecords
from gpumarket.settlement.disputes import Dispute, Mine, Rules, Seat, State, Step, accused_step, commitment, member_step
from gpumarket.settlement.sealed_evidence import open_posted

FINISH_SECONDS = 2.0
"""How long each of those who could finish a dispute waits for the one before."""
SHORT_BLOCKS = 32
"""How long the contract may count more panels than are seen: longer than any confirmations, shorter than any window."""
_log = structlog.get_logger()


class Watch(Protocol):
    """The disputes of the chain (settlement.chain.dispute_watch)."""

    @property
    def disputes(self) -> Mapping[Hash, Dispute]: ...
    @property
    def block(self) -> int: ...
    async def sync(self) -> None: ...
    def forget(self) -> None: ...


class Mined(Protocol):
    @property
    def block(self) -> int: ...


class Head(Protocol):
    @property
    def time(self) -> int: ...


class Seated(Protocol):
    @property
    def panels(self) -> int: ...


class PanelChain(Protocol):
    """What a member asks and sends (settlement.chain.disputes.DisputeActions)."""

    async def head(self) -> Head: ...
    async def seat(self, operator: Address) -> Seated: ...
    async def report_missing(self, dispute: Hash, evidence_key: bytes) -> Mined: ...
    async def commit(self, dispute: Hash, commitment: Hash) -> Mined: ...
    async def reveal(self, dispute: Hash, number: int, salt: Hash) -> Mined: ...
    async def finish(self, dispute: Hash) -> Mined: ...
    async def credited(self) -> int: ...
    async def withdraw(self) -> Mined: ...


class Panel:
    """This provider's part in disputes. `take` serves the rpc; `run` does the rest until it is cancelled.

    `on_home` is awaited when no panel is left, for what the seat needs then.
    """

    def __init__(
        self,
        me: Address,
        watch: Watch,
        chain: PanelChain,
        judge: Judge,
        records: PanelRecords,
        rules: Rules,
        clock: Clock,
        random: Random,
        *,
        on_home: Callable[[], Awaitable[None]],
        look_seconds: float,
    ) -> None:
        self._me, self._watch, self._chain, self._judge, self._records = me, watch, chain, judge, records
        self._rules, self._random, self._on_home, self._look_seconds = rules, random, on_home, look_seconds
        self._pacing = Pacing(clock)
        self._judging: dict[Hash, asyncio.Task[None]] = {}
        self._acting: dict[Hash, asyncio.Task[None]] = {}
        self._read: dict[Hash, int] = {}
        self._over: set[Hash] = set()
        self._away = False
        self._counted = self._short_since = -1
        self._finishable: dict[Hash, float] = {}
        self._clock = clock

    async def take(self, caller: Address, dispute: Hash, evidence: bytes) -> None:
        """Judge evidence from a challenger; returns once the number is durable. Raises ProtocolError, BadSignature, EngineFailed."""
        found = await self._seated(dispute)
        if caller != found.challenger:
            raise BadSignature("evidence is taken from the challenger only")
        if self._records.number(dispute) is None:
            await self._decide(found, evidence)

    async def run(self) -> None:
        """Look at every dispute, again and again. A chain that fails is logged and asked again; JournalError ends it."""
        down = False
        while True:
            try:
                await self.look()
                down = False
            except NetworkError as error:
                if not down:
                    _log.warning("disputes_unseen", reason=error.message, hint=error.hint)
                down = True
            await asyncio.sleep(self._look_seconds)

    async def look(self) -> None:
        """One round: start every step that is due; each dispute's steps are taken one at a time. Raises what broke the journal."""
        await self._watch.sync()
        mine = [d for key, d in self._watch.disputes.items() if key not in self._over and self._concerns(d)]
        await self._recount([d for d in mine if d.member(self._me) is not None])
        now = (await self._chain.head()).time if mine else 0
        for dispute in mine:
            self._away = True
            step = self._step(dispute, now)
            if step is Step.DONE:
                self._over.add(dispute.id)
            elif step is not Step.WAIT and self._idle(dispute.id) and self._pacing.due(dispute.id, step, self._watch.block):
                self._acting[dispute.id] = asyncio.create_task(self._try(dispute, step))
        if self._away and all(dispute.id in self._over for dispute in mine) and self._idle(_HOME):
            self._acting[_HOME] = asyncio.create_task(self._go_home())

    async def settled(self) -> None:
        """Wait for the steps under way."""
        if self._acting:
            await asyncio.wait(list(self._acting.values()))

    async def close(self) -> None:
        """End what is under way; the chain and the journal tell the next start how far it came."""
        tasks = [*self._judging.values(), *self._acting.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- steps -------------------------------------------------------------------------------------------------------------

    def _concerns(self, dispute: Dispute) -> bool:
        return dispute.provider == self._me or dispute.member(self._me) is not None

    def _step(self, dispute: Dispute, now: int) -> Step:
        if dispute.provider == self._me:
            step = accused_step(dispute, now, self._rules)
        else:
            has_number = self._records.number(dispute.id) is not None
            mine = Mine(has_number, dispute.id in self._judging, self._read.get(dispute.id, 0))
            step = member_step(dispute, self._me, mine, now, self._rules)
        return step if step is not Step.FINISH or self._my_turn(dispute) else Step.WAIT

    def _my_turn(self, dispute: Dispute) -> bool:
        """Seven could finish it, and one has to pay for that: the challenger first, then the members in their order, then the accused."""
        since = self._finishable.setdefault(dispute.id, self._clock.monotonic())
        order = [*(member.operator for member in dispute.members), dispute.provider]
        place = order.index(self._me)
        return self._clock.monotonic() - since >= FINISH_SECONDS * (1 + place)

    async def _recount(self, mine: Sequence[Dispute]) -> None:
        """Compare the panels that we see with those that the contract counts: a node that left out a draw must not cost the fee of a member
        who stayed away. Our view lags by the confirmations, so only what stays short for long is read again."""
        if self._watch.block == self._counted:
            return
        self._counted = self._watch.block
        if (await self._chain.seat(self._me)).panels <= sum(dispute.state is State.DRAWN for dispute in mine):
            self._short_since = -1
        elif self._short_since < 0:
            self._short_since = self._counted
        elif self._counted - self._short_since >= SHORT_BLOCKS:
            _log.error("panel_not_seen", reason="the contract counts more panels than the chain's node tells of", hint="all is read again")
            self._watch.forget()
            self._short_since = -1

    def _idle(self, dispute: Hash) -> bool:
        """Whether no step of this dispute is under way. Raises what ended the last one, if that was our journal."""
        task = self._acting.get(dispute)
        if task is None or not task.done():
            return task is None
        del self._acting[dispute]
        task.result()
        return True

    async def _try(self, dispute: Dispute, step: Step) -> None:
        try:
            block = await self._do(dispute, step)
        except JournalError:
            raise
        except GpumarketError as error:
            self._pacing.failed(dispute.id, step)
            _log.warning("dispute_step_failed", dispute=hex0x(dispute.id), step=step.value, reason=error.message)
        else:
            self._pacing.done(dispute.id, step, block)
            _log.info("dispute_step", dispute=hex0x(dispute.id), step=step.value)

    async def _do(self, dispute: Dispute, step: Step) -> int:
        """Take a step; the block that shows it."""
        match step:
            case Step.READ:
                await self._read_posted(dispute)
                return -1
            case Step.SHOWN_NOTHING:
                await self._records.write_number(dispute.id, NOTHING_SHOWN, self._salt(), (await self._chain.head()).time)
                return -1
            case Step.REPORT:
                key = await self._records.add_key(self._random.token(32))
                return (await self._chain.report_missing(dispute.id, key)).block
            case Step.COMMIT:
                written = self._records.number(dispute.id)
                assert written is not None, "a commit follows a number"
                return (await self._chain.commit(dispute.id, commitment(dispute.id, self._me, written.number, written.salt))).block
            case Step.REVEAL:
                written = self._records.number(dispute.id)
                assert written is not None, "a reveal follows a number"
                return (await self._chain.reveal(dispute.id, written.number, written.salt)).block
            case Step.FINISH:
                return (await self._chain.finish(dispute.id)).block
        raise AssertionError(f"{step} is no step of a member")

    async def _read_posted(self, dispute: Dispute) -> None:
        """Open what was posted; evidence in it is judged like evidence that came directly."""
        evidence = await asyncio.to_thread(open_posted, dispute.posted, dispute.id, self._me, self._records.secrets())
        if evidence is not None:
            try:
                await self._decide(dispute, evidence)
            except ProtocolError:  # not what the challenge committed to: the same as nothing
                _log.info("posted_evidence_is_another", dispute=hex0x(dispute.id))
        self._read[dispute.id] = len(dispute.posted)

    async def _go_home(self) -> None:
        """No panel is left: forget the keys that evidence was sealed to, take what was earned, see to the seat."""
        if not self._pacing.due(_HOME, Step.DONE, self._watch.block):
            return
        try:
            if self._records.secrets():
                await self._records.forget_keys()
            if await self._chain.credited():
                await self._chain.withdraw()
            await self._on_home()
        except JournalError:
            raise
        except GpumarketError as error:
            self._pacing.failed(_HOME, Step.DONE)
            _log.warning("panel_fees_wait", reason=error.message)
        else:
            self._away = False

    # --- evidence ----------------------------------------------------------------------------------------------------------

    async def _seated(self, dispute: Hash) -> Dispute:
        """A dispute on whose panel we sit and that still takes numbers; looked for once more, since a drawn panel is news."""
        if dispute not in self._watch.disputes or self._watch.disputes[dispute].state is State.CHALLENGED:
            await self._watch.sync()
        found = self._watch.disputes.get(dispute)
        member = found.member(self._me) if found is not None else None
        if found is None or member is None:
            raise ProtocolError("this provider sits on no panel of that dispute, as far as it can see", hint="wait for the confirmations")
        if member.seat in (Seat.DRAWN, Seat.MISSING) and found.state is State.DRAWN:
            return found
        if self._records.number(dispute) is None:
            raise ProtocolError("it is too late for evidence in that dispute")
        return found

    async def _decide(self, dispute: Dispute, evidence: bytes) -> None:
        """Judge once, whoever asks how often; it goes on when the asking one leaves."""
        task = self._judging.get(dispute.id)
        if task is None:
            task = asyncio.create_task(self._judge_and_write(dispute, evidence))
            self._judging[dispute.id] = task
            task.add_done_callback(lambda done: self._judged(dispute.id, done))
        await asyncio.shield(task)

    def _judged(self, dispute: Hash, task: asyncio.Task[None]) -> None:
        del self._judging[dispute]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("evidence_not_judged", dispute=hex0x(dispute), error=type(error).__name__)

    async def _judge_and_write(self, dispute: Dispute, evidence: bytes) -> None:
        number = await self._judge.number(dispute, evidence)
        await self._records.write_number(dispute.id, number, self._salt(), (await self._chain.head()).time)

    def _salt(self) -> Hash:
        return Hash(self._random.token(32))


_HOME = Hash(b"\0" * 32)

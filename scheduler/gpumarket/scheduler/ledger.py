"""The ledger: jobs, channels and reputation in memory, every change journaled before anybody hears of it.

While the process runs, the state machines in memory are the authority; SQL is what a restart reads. A change marks what it touched; one
flusher writes all that is marked, as of one point in time, in one transaction, and only then lets the waiting answers go (I2). While a
commit is under way the next changes gather, so that many orders share one. A voucher's guard moves in the transaction of the ledger entry
that it pays, and the signature is made after it (I3).
Must never: answer from state that is not yet committed, sign a voucher lower than its guard, go on after a failed commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gpumarket.core.errors import GpumarketError, JournalError, ProtocolError
from gpumarket.core.signing import Domain, Signer
from gpumarket.core.units import Address, Hash
from gpumarket.scheduler import records
from gpumarket.scheduler.lifecycle import Change, Instruction, Job, Judge, Move, Understated, finished
from gpumarket.scheduler.moves import move_hub, move_spoke
from gpumarket.scheduler.reputation import Deed, Reputation
from gpumarket.settlement.channel import PaidChannel, ReceivedChannel
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.vouchers import sign_voucher

GATHERED_MAX = 64
"""Answers that wait for one commit; more would make the first of them late."""


@dataclass(slots=True)
class HubChannel:
    """A client's channel. `close_signed`: we consented to its close, so no order is taken on it any more."""

    state: ReceivedChannel
    payer: Address
    close_signed: bool = False
    stored: bool = False


@dataclass(slots=True)
class Spoke:
    """Our channel to a provider. `released`: highest cumulative amount whose guard is committed; `signature` is its voucher's.

    `confirmed`: the provider has said in this life what it holds. A ledger that was read from disk may be an older copy than the vouchers
    that its key has signed; until the payee has been heard, what is owed waits (I3).
    """

    state: PaidChannel
    provider: Address
    released: int = 0
    signature: bytes = b""
    stored: bool = False
    confirmed: bool = False
    leaving: bool = False
    """We are about to close it: no lease goes on it any more."""


class Ledger:
    """`load` it, `start` it, change it with `apply` and the setters, and `await commit()` before telling anybody."""

    def __init__(self, journal: Journal, signer: Signer, channels_domain: Domain) -> None:
        self._journal, self._signer, self._domain = journal, signer, channels_domain
        self.jobs: dict[Hash, Job] = {}
        self.by_lease: dict[Hash, tuple[Hash, int]] = {}
        self.hubs: dict[Hash, HubChannel] = {}
        self.spokes: dict[Hash, Spoke] = {}
        self.reputations: dict[Address, Reputation] = {}
        self._by_provider: dict[Address, list[Spoke]] = {}
        self.on_judged: Callable[[Address, Reputation], None] = lambda provider, reputation: None
        self.on_spoke: Callable[[Spoke], None] = lambda spoke: None
        self.failure: JournalError | None = None
        self.failed = asyncio.Event()
        self._dirty = records.Dirty()
        self._writing: set[Hash] = set()
        self._stored_jobs: set[Hash] = set()
        self._stored_attempts: set[Hash] = set()
        self._stored_offers: set[Hash] = set()
        self._stored_reputations: set[Address] = set()
        self._answers: list[Callable[[GpumarketError | None], None]] = []
        self._wake = asyncio.Event()
        self._flusher: asyncio.Task[None] | None = None

    # --- life ----------------------------------------------------------------------------------------------------------------

    def load(self, now: int) -> None:
        """Read what a restart needs: all channels and reputations, and the jobs that are live or whose deadline is ahead."""
        kept = self._journal.read(lambda connection: records.load(connection, now))
        for channel, payer, close_signed in kept.hubs:
            self.hubs[channel.id] = HubChannel(channel, payer, close_signed, stored=True)
        for spoke, provider, guarded in kept.spokes:
            # the same bytes as before the restart (RFC 6979)
            signature = sign_voucher(self._signer, self._domain, spoke.id, guarded) if guarded else b""
            self._index(Spoke(spoke, provider, guarded, signature, stored=True))
        self.reputations.update(kept.reputations)
        self._stored_reputations.update(kept.reputations)
        for job in kept.jobs:
            self._keep_stored(job)
        self._stored_offers.update(kept.offers)
        self.check()

    def start(self) -> None:
        """Begin to write; needs a running loop."""
        self._flusher = asyncio.create_task(self._flush_forever(), name="ledger flusher")

    async def close(self) -> None:
        """Write what is marked, then stop."""
        if self._flusher is None:
            return
        if self.failure is None and (self._answers or self._dirty):
            await self.commit()
        self._flusher.cancel()
        await asyncio.gather(self._flusher, return_exceptions=True)
        self._flusher = None

    def check(self) -> None:
        """Asserts I1 between jobs and channels: what the channels hold open and held is what the jobs do. Raises JournalError."""
        for hub_id, hub in self.hubs.items():
            jobs = [j for j in self.jobs.values() if j.channel == hub_id]
            found = (sum(j.open for j in jobs), sum(records.held(j) for j in jobs))
            if found != (hub.state.open, hub.state.held):
                raise JournalError(
                    f"channel 0x{hub_id.hex()}: jobs hold (open, held) {found}, the channel says {(hub.state.open, hub.state.held)}",
                    hint="stop and restore the newest backup: the ledger was changed by hand or is damaged",
                )

    def look_after(self) -> None:
        """Fail with the journal, also while nothing is to be written."""
        try:
            self._journal.require_whole()
        except JournalError as error:
            if self.failure is None:
                self.fail(error)

    def require_space(self) -> None:
        """Before a new order. Raises Busy while the disk has little room."""
        self._journal.require_space()

    # --- answers -------------------------------------------------------------------------------------------------------------

    def after_commit(self, answer: Callable[[GpumarketError | None], None]) -> None:
        """Call `answer(None)` once everything changed so far is durable, or `answer(error)` when it will never be."""
        if self.failure is not None:
            answer(self.failure)
            return
        self._answers.append(answer)
        self._wake.set()

    async def commit(self) -> None:
        """Return once everything changed so far is durable. Raises JournalError."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: GpumarketError | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        self.after_commit(done)
        await future

    # --- changes -------------------------------------------------------------------------------------------------------------

    def apply(self, change: Change, now: int) -> Job:
        """Carry a job's change out, all of it or nothing. Raises FundsError where a channel does not cover it."""
        job, instructions = change
        if job is self.jobs.get(job.key):
            return job
        hub, spokes = self._moved(job, instructions)
        if hub is not None:
            self.put_hub(hub)
        for spoke in spokes:
            self.put_spoke(spoke)
        self._remember(job)
        self._dirty.jobs.add(job.key)
        for instruction in instructions:
            if isinstance(instruction, Judge):
                self.judge(instruction, now)
            elif isinstance(instruction, Understated):  # who pays is counted: the keys that may order for it are made at will
                self.judge(Judge(self.hubs[job.channel].payer, Deed.UNDERSTATED), now)
        return job

    def put_hub(self, state: ReceivedChannel) -> None:
        """A client channel's new state."""
        hub = self.hubs[state.id]
        if state != hub.state or not hub.stored:
            hub.state = state
            self._dirty.hubs.add(state.id)

    def put_spoke(self, state: PaidChannel) -> None:
        """A provider channel's new state."""
        spoke = self.spokes[state.id]
        if state != spoke.state or not spoke.stored:
            spoke.state = state
            self._dirty.spokes.add(state.id)
            self.on_spoke(spoke)

    def mark_close_signed(self, channel: Hash) -> None:
        """We are about to sign a close: no more orders on the channel."""
        self.hubs[channel].close_signed = True
        self._dirty.hubs.add(channel)

    def judge(self, judged: Judge, now: int) -> None:
        """One more deed of a provider, or of a client's payer."""
        after = self.reputations.get(judged.provider, Reputation()).after(judged.deed, now)
        self.reputations[judged.provider] = after
        self._dirty.reputations.add(judged.provider)
        self.on_judged(judged.provider, after)

    def confirm(self, channel: Hash) -> None:
        """The payee has been heard: what was owed on this spoke and waited for that is released."""
        if not self.spokes[channel].confirmed:
            self.spokes[channel].confirmed = True
            self._dirty.spokes.add(channel)
            self.after_commit(lambda error: None)

    def keep_offer(self, digest: Hash, signed: bytes) -> None:
        """Remember an offer that a lease was made from."""
        if digest not in self._stored_offers:
            self._dirty.offers[digest] = signed

    def voucher(self, channel: Hash) -> tuple[int, bytes]:
        """(cumulative, signature) of the newest voucher that may leave; (0, b"") before the first."""
        spoke = self.spokes[channel]
        return spoke.released, spoke.signature

    # --- lookups -------------------------------------------------------------------------------------------------------------

    def find(self, key: Hash) -> Job | None:
        """A job, from memory or, when it ended long ago, from the database; then it is in memory again, until it is forgotten."""
        job = self.jobs.get(key)
        if job is None:
            job = self._journal.read(lambda connection: records.load_job(connection, key))
            if job is not None:
                self._keep_stored(job)
        return job

    def find_lease(self, lease: Hash) -> tuple[Job, int]:
        """The job and attempt number of a lease. Raises ProtocolError for one that this ledger never signed."""
        at = self.by_lease.get(lease)
        if at is None:
            at = self._journal.read(lambda connection: records.load_lease(connection, lease))
        job = self.find(at[0]) if at else None
        if at is None or job is None:
            raise ProtocolError(f"lease 0x{lease.hex()} is not in this scheduler's ledger")
        return job, at[1]

    def spokes_of(self, provider: Address) -> Iterable[Spoke]:
        """Channels to one provider that are not closed."""
        return [s for s in self._by_provider.get(provider, ()) if not s.state.closed]

    def spokes_ever(self, provider: Address) -> int:
        """How many channels were opened to a provider, closed ones included."""
        return len(self._by_provider.get(provider, ()))

    def add_spoke(self, state: PaidChannel, provider: Address) -> None:
        """A channel that we have just opened; its guard is written with it."""
        self._index(Spoke(state, provider, confirmed=True))
        self.put_spoke(state)

    def _index(self, spoke: Spoke) -> None:
        self.spokes[spoke.state.id] = spoke
        self._by_provider.setdefault(spoke.provider, []).append(spoke)

    def forget(self, before: int) -> None:
        """Drop finished jobs whose deadline is past from memory; an order for one of them can only be a replay."""
        busy = self._dirty.jobs | self._writing  # until it is written, the database does not have its last word
        for key in [k for k, j in self.jobs.items() if j.spec.deadline < before and finished(j) and k not in busy]:
            job = self.jobs.pop(key)
            self._stored_jobs.discard(key)
            for attempt in job.attempts:
                self.by_lease.pop(attempt.hash, None)
                self._stored_attempts.discard(attempt.hash)

    # --- inside --------------------------------------------------------------------------------------------------------------

    def _keep_stored(self, job: Job) -> None:
        """A job as the database has it."""
        self._remember(job)
        self._stored_jobs.add(job.key)
        self._stored_attempts.update(a.hash for a in job.attempts)

    def _remember(self, job: Job) -> None:
        before = self.jobs.get(job.key)
        self.jobs[job.key] = job
        for attempt in job.attempts[len(before.attempts) if before else 0 :]:
            self.by_lease[attempt.hash] = (job.key, attempt.lease.attempt)

    def _moved(self, job: Job, instructions: list[Instruction]) -> tuple[ReceivedChannel | None, list[PaidChannel]]:
        hub: ReceivedChannel | None = None
        spokes: dict[Hash, PaidChannel] = {}
        for move in instructions:
            if not isinstance(move, Move):
                continue
            if move.attempt is None:
                hub = move_hub(hub if hub is not None else self.hubs[job.channel].state, move)
            else:
                channel = move.attempt.lease.provider_channel
                spokes[channel] = move_spoke(spokes.get(channel) or self.spokes[channel].state, move)
        return hub, list(spokes.values())

    async def _flush_forever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self.failure is None:
                await self._gather()
                await self._flush()

    async def _gather(self) -> None:
        """Let the loop read on while requests keep coming: the orders of one burst share a commit, a lone one waits a turn of the loop."""
        waiting = 0
        while waiting < len(self._answers) < GATHERED_MAX:
            waiting = len(self._answers)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def _flush(self) -> None:
        answers, self._answers = self._answers, []
        dirty, self._dirty = self._dirty, records.Dirty()
        error: JournalError | None = None
        if dirty:
            batch, self._writing = self._batch(dirty), dirty.jobs
            try:
                await self._journal.transact(batch.write)
            except Exception as cause:
                error = self.fail(cause)
            else:
                self._written(batch)
            self._writing = set()
        for answer in answers:
            answer(error)

    def _batch(self, dirty: records.Dirty) -> records.Batch:
        batch = records.Batch()
        for key in dirty.jobs:
            job = self.jobs[key]
            batch.add_job(job, new=key not in self._stored_jobs, known_attempts=self._stored_attempts)
        for hub_id in dirty.hubs:
            hub = self.hubs[hub_id]
            batch.add_hub(hub.state, hub.payer, hub.close_signed, new=not hub.stored)
        for spoke_id in dirty.spokes:
            spoke = self.spokes[spoke_id]
            batch.add_spoke(
                spoke.state, spoke.provider, new=not spoke.stored, pays=spoke.confirmed and spoke.state.vouchered > spoke.released
            )
        for provider in dirty.reputations:
            batch.add_reputation(provider, self.reputations[provider], new=provider not in self._stored_reputations)
        batch.add_offers({digest: raw for digest, raw in dirty.offers.items() if digest not in self._stored_offers})
        return batch

    def _written(self, batch: records.Batch) -> None:
        self._stored_jobs.update(batch.new_jobs)
        self._stored_attempts.update(batch.new_attempts)
        self._stored_offers.update(batch.new_offers)
        self._stored_reputations.update(batch.new_reputations)
        for hub_id in batch.new_hubs:
            self.hubs[hub_id].stored = True
        for spoke_id in batch.new_spokes:
            self.spokes[spoke_id].stored = True
        for channel, cumulative in batch.guards:
            spoke = self.spokes[channel]
            spoke.signature = sign_voucher(self._signer, self._domain, channel, cumulative)
            spoke.released = cumulative

    def fail(self, cause: Exception) -> JournalError:
        """From now on nothing is written, answered or signed; the daemon stops with this error."""
        if isinstance(cause, JournalError):
            error = cause
        else:
            error = JournalError(f"the ledger could not be written: {cause}", hint="stop the scheduler, mend the database, start it again")
        self.failure = error
        self.failed.set()
        waiting, self._answers = self._answers, []
        for answer in waiting:
            answer(error)
        return error

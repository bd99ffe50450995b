"""Claims, retries, reports, closes: what happens to a job after its lease. Each step commits before it answers.

Must never: pay an attempt twice or above its lease, reject on a client's word without evidence that is recomputed here, recall a voucher.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import Callable

import structlog

from gpumarket.core.codec import open_ack, open_lease, open_receipt, voucher_proto
from gpumarket.core.errors import BadSignature, OutOfFunds, ProtocolError
from gpumarket.core.ports import Clock
from gpumarket.core.signing import Domain, Signer
from gpumarket.core.terms import Ack, Receipt, Voucher
from gpumarket.core.units import Address, Hash, Money, hex0x, money_bytes
from gpumarket.scheduler import answers, lifecycle
from gpumarket.scheduler.channels import Channels
from gpumarket.scheduler.desk import Desk
from gpumarket.scheduler.judging import Judging
from gpumarket.scheduler.ledger import Ledger
from gpumarket.scheduler.lifecycle import Attempt, AttemptState, Change, Job, Judge
from gpumarket.scheduler.presence import Presence
from gpumarket.scheduler.reputation import LEFT, WORDS
from gpumarket.scheduler.settings import SchedulerSettings
from gpumarket.settlement.chain.view import ChainView
from gpumarket.settlement.verification import Decision, Verdict
from gpumarket.settlement.vouchers import sign_close
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import terms_pb2

_CLAIM_STATES = {
    AttemptState.HELD: pb.CLAIM_STATE_HELD,
    AttemptState.OWED: pb.CLAIM_STATE_OWED,
    AttemptState.REJECTED: pb.CLAIM_STATE_REJECTED,
    AttemptState.CLOSED: pb.CLAIM_STATE_CLOSED,
    AttemptState.EXPIRED: pb.CLAIM_STATE_CLOSED,
}
_ENDED = frozenset(_CLAIM_STATES) - {AttemptState.HELD}
BLAME_SECONDS, BLAMES_MAX = 3_600, 10_000
"""One client's unproven word against one provider counts once in this time; so many are remembered, more do not count."""
FORGET_SECONDS = 600
"""Finished jobs stay in memory this long past their deadline, for repeated reports and claims."""
_log = structlog.get_logger()


class Billing:
    """The ledger's events from outside and from time."""

    def __init__(
        self,
        settings: SchedulerSettings,
        signer: Signer,
        domain: Domain,
        channels_domain: Domain,
        clock: Clock,
        ledger: Ledger,
        channels: Channels,
        presence: Presence,
        desk: Desk,
        view: ChainView,
    ) -> None:
        self._settings, self._signer, self._clock, self._view = settings, signer, clock, view
        self._domain, self._channels_domain = domain, channels_domain
        self._ledger, self._channels, self._presence, self._desk = ledger, channels, presence, desk
        self._judging, self._judged = Judging(domain, self._owner), set[asyncio.Task[None]]()
        self._timers: list[tuple[int, Hash]] = []
        self._blamed: dict[tuple[Address, Address], int] = {}
        self._forget_at = 0
        self.on_ended: Callable[[Job, Attempt], None] = lambda job, attempt: None
        """Told of each attempt that came to its end, once that is durable."""
        self.ended: Counter[AttemptState] = Counter()
        """Attempts that reached a state, by state."""
        self.verdicts: Counter[str] = Counter()
        """Clients' words on results; of rejections those whose evidence was judged here."""
        desk.on_placed = self._schedule

    async def claim(self, caller: Address, request: pb.ClaimRequest) -> pb.ClaimReply:
        """The provider's bill. Raises ProtocolError, BadSignature or FundsError."""
        lease = open_lease(self._domain, request.lease)
        if lease.scheduler != self._signer.address or lease.provider != caller:
            raise ProtocolError("the claimed lease is not one between this scheduler and the caller")
        job, number = self._ledger.find_lease(lease.struct_hash)
        attempt = job.attempt(number)
        if attempt.state in (AttemptState.OPEN, AttemptState.HELD, AttemptState.CLOSED):
            receipt = open_receipt(self._domain, request.receipt, caller)
            ack = open_ack(self._domain, request.last_ack, lease.client) if request.HasField("last_ack") else None
            _check_bill(attempt, job, receipt, ack)
            raw = request.receipt.SerializeToString(), request.last_ack.SerializeToString() if ack else b""
            now, check_seconds = self._clock.now(), self._settings.check_seconds
            if ack is not None:
                grace = self._settings.claim_grace_seconds
                job = self._apply(lifecycle.raise_to(job, number, ack, raw[1], now, check_seconds, grace))
            self._apply(lifecycle.claim(job, number, receipt, ack, raw, now, check_seconds))
        await self._ledger.commit()  # also for a repeated claim: its first answer may still be on its way to the disk
        return self._claim_reply(lease.struct_hash)

    async def retry(self, caller: Address, request: pb.RetryRequest) -> pb.MatchReply:
        """Close the running attempt at the client's last ack, open the next, or none when the client left. Raises ProtocolError,
        BadSignature or FundsError."""
        job = self._own_job(caller, request.job)
        number = request.attempt
        if number < len(job.attempts):
            await self._ledger.commit()
            return self._desk.granted(0, job, len(job.attempts))
        attempt = job.attempt(number)
        ack = open_ack(self._domain, request.last_ack, job.spec.client) if request.HasField("last_ack") else None
        _check_ack(attempt, ack)
        if request.reason == LEFT:
            return await self._left(job, number, ack, request.last_ack)
        lifecycle.may_retry(job, number)
        units, chain = lifecycle.next_prefix(job, number, ack, request.reason)
        raw_ack = request.last_ack.SerializeToString() if ack else b""
        if ack is not None:
            self._catch_up(job, number, ack, raw_ack)
            job = self._found(job.key)
        change = lifecycle.close(job, number, ack, raw_ack, request.reason, self._clock.now(), self._settings.check_seconds)
        job = self._apply(self._weighed(change, attempt.lease.provider))
        if self._clock.now() >= job.spec.deadline:
            await self._ledger.commit()
            raise ProtocolError("the job's deadline is over", hint="order it again under a new job id")
        if units >= job.spec.max_output_units:
            await self._ledger.commit()
            raise ProtocolError("everything the job allows was delivered; there is nothing left to do elsewhere")
        answer = self._desk.again(job, units, chain)
        await self._ledger.commit()
        return answer

    async def _left(self, job: Job, number: int, ack: Ack | None, signed: terms_pb2.SignedAck) -> pb.MatchReply:
        """The job's end on its client's word; said again, it changes nothing."""
        raw_ack = signed.SerializeToString() if ack else b""
        if ack is not None:
            self._catch_up(job, number, ack, raw_ack)
            job = self._found(job.key)
        job = self._apply(lifecycle.leave(job, number, ack, raw_ack, self._clock.now(), self._settings.check_seconds))
        await self._ledger.commit()
        return self._desk.granted(0, job, number)

    async def report(self, caller: Address, request: pb.ReportRequest) -> pb.JobStatus:
        """The client's word, and for a rejection its evidence. Raises ProtocolError, BadSignature or VerificationError."""
        job = self._own_job(caller, request.job)
        number, verdict = request.attempt, int(request.verdict)
        job.attempt(number)
        if verdict in (Verdict.ACCEPTED, Verdict.GREY):
            self._apply(lifecycle.accept(job, number))
            self.verdicts[Verdict(verdict).name.lower()] += 1
        elif verdict == Verdict.REJECTED:
            task = asyncio.create_task(self._judge(job, number, request))
            self._judged.add(task)
            task.add_done_callback(self._judged.discard)
            await asyncio.shield(task)  # a client that hangs up must not free the place of a thread that still computes
        else:
            raise ProtocolError("a report without a verdict")
        await self._ledger.commit()
        return answers.job_status(self._found(job.key))

    async def status(self, caller: Address, key: Hash) -> pb.JobStatus:
        """A job, for its client and its providers."""
        job = self._ledger.find(key)
        if job is None or caller not in (job.spec.client, *(a.lease.provider for a in job.attempts)):
            raise ProtocolError(f"job 0x{key.hex()} is not one of the caller's")
        return answers.job_status(job)

    async def account(self, caller: Address, channel: Hash) -> pb.Account:
        """A channel, for its client."""
        hub = self._channels.hub(channel)
        if caller not in (hub.payer, hub.state.signer):
            raise ProtocolError("the channel is not the caller's")
        return answers.account(hub.state)

    async def deposit(self, voucher: terms_pb2.SignedVoucher) -> pb.Account:
        """Take a voucher; it is durable when this returns."""
        hub = self._channels.receive(voucher)
        await self._ledger.commit()
        return answers.account(hub.state)

    async def close_channel(self, caller: Address, channel: Hash) -> terms_pb2.SignedClose:
        """Consent to the close of a client's channel at what was used. Raises ProtocolError while something is open or held."""
        hub = self._ledger.hubs.get(channel) or self._channels.hub(channel)
        if caller not in (hub.payer, hub.state.signer):
            raise ProtocolError("the channel is not the caller's")
        if hub.state.open or hub.state.held:
            raise ProtocolError(
                "attempts are still open or held on this channel", hint="wait for them: a minute for checks, the deadline for the rest"
            )
        self._ledger.mark_close_signed(channel)
        await self._ledger.commit()
        amount = max(hub.state.used, hub.state.redeemed)
        signature = sign_close(self._signer, self._channels_domain, channel, amount)
        return terms_pb2.SignedClose(channel=channel, cumulative=money_bytes(amount), signature=signature)

    def voucher(self, channel: Hash) -> terms_pb2.SignedVoucher | None:
        """The newest voucher of a spoke that may leave."""
        cumulative, signature = self._ledger.voucher(channel)
        return voucher_proto(Voucher(channel, Money(cumulative)), signature) if cumulative else None

    # --- time ----------------------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Set the timers of the jobs that a restart found."""
        for job in self._ledger.jobs.values():
            self._schedule(job)

    async def tick(self) -> None:
        """Carry out what is due: ends of holds, of deadlines, of reservations."""
        now = self._clock.now()
        self._presence.lapse()
        changed = False
        while self._timers and self._timers[0][0] <= now:
            key = heapq.heappop(self._timers)[1]
            job = self._ledger.jobs.get(key)
            if job is not None and not self._judging.concerns(key):  # one that is being judged is looked at with its verdict
                changed |= self._apply(lifecycle.due(job, now, self._settings.claim_grace_seconds)) is not job
        if changed:
            await self._ledger.commit()
        if now >= self._forget_at:  # it looks at every job in memory
            self._ledger.forget(now - FORGET_SECONDS)
            self._forget_at = now + FORGET_SECONDS // 10

    # --- inside --------------------------------------------------------------------------------------------------------------

    async def _judge(self, job: Job, number: int, request: pb.ReportRequest) -> None:
        try:
            self._take_verdict(job.key, number, await self._judging.judge(job, number, request))
        finally:  # what came due meanwhile waited for the verdict and waits no longer: reports in a row delay nothing
            if not self._judging.concerns(job.key):
                self._apply(lifecycle.due(self._found(job.key), self._clock.now(), self._settings.claim_grace_seconds))

    def _take_verdict(self, key: Hash, number: int, decision: Decision) -> None:
        job = self._found(key)
        if decision.verdict is Verdict.REJECTED:
            self._apply(lifecycle.reject(job, number, decision.reason[:200]))
            self.verdicts["rejected"] += 1
        elif decision.verdict is Verdict.GREY:
            self._apply(lifecycle.suspect(job, number, self._clock.now() + self._settings.check_seconds))
            self.verdicts["suspected"] += 1
        else:
            raise ProtocolError(f"the evidence does not reject attempt {number}: {decision.reason}")

    def _apply(self, change: Change) -> Job:
        before = self._ledger.jobs.get(change[0].key)
        job = self._ledger.apply(change, self._clock.now())
        for attempt in job.attempts:
            old = before.attempts[attempt.lease.attempt - 1] if before else None
            if old is not None and old.state is attempt.state:
                continue
            if attempt.state is not AttemptState.OPEN:
                self.ended[attempt.state] += 1
                self._presence.release(attempt.hash)
            if attempt.state in _ENDED:
                self._ledger.after_commit(lambda error, a=attempt: self._tell(job, a) if error is None else None)  # type: ignore[misc]
        if job is not before:
            self._schedule(job)
        return job

    def _catch_up(self, job: Job, number: int, ack: Ack, raw_ack: bytes) -> None:
        """The client proves more than the provider claimed. Without room in the provider's channel the retry goes on all the same."""
        try:
            self._apply(lifecycle.catch_up(job, number, ack, raw_ack, self._clock.now(), self._settings.check_seconds))
        except OutOfFunds as error:
            _log.warning("earned_by_ack_and_unpaid", lease=hex0x(job.attempt(number).hash), units=ack.units, reason=error.message)

    def _weighed(self, change: Change, provider: Address) -> Change:
        """A retry with its blame, or without when its client has blamed this provider a short while ago: words cost nothing."""
        job, instructions = change
        if not any(isinstance(i, Judge) and i.deed in WORDS for i in instructions):
            return change
        now, word = self._clock.now(), (self._ledger.hubs[job.channel].payer, provider)
        if len(self._blamed) >= BLAMES_MAX:
            self._blamed = {key: until for key, until in self._blamed.items() if until > now}
        if self._blamed.get(word, 0) <= now and len(self._blamed) < BLAMES_MAX:
            self._blamed[word] = now + BLAME_SECONDS
            return change
        return job, [i for i in instructions if not (isinstance(i, Judge) and i.deed in WORDS)]

    def _tell(self, job: Job, attempt: Attempt) -> None:
        self.on_ended(job, attempt)
        self._presence.settled(attempt.lease.provider, attempt.hash)

    def _schedule(self, job: Job) -> None:
        when = lifecycle.next_due(job, self._settings.claim_grace_seconds)
        if when:
            heapq.heappush(self._timers, (when, job.key))

    def _claim_reply(self, lease: Hash) -> pb.ClaimReply:
        job, number = self._ledger.find_lease(lease)
        attempt = job.attempt(number)
        return pb.ClaimReply(
            state=_CLAIM_STATES[attempt.state],
            amount=money_bytes(attempt.amount),
            voucher=self.voucher(attempt.lease.provider_channel),
            reason=attempt.reason,
        )

    def _own_job(self, caller: Address, raw: bytes) -> Job:
        job = self._ledger.find(Hash(raw)) if len(raw) == 32 else None
        if job is None or job.spec.client != caller:
            raise ProtocolError("the job is not one of the caller's in this ledger")
        return job

    def _found(self, key: Hash) -> Job:
        job = self._ledger.find(key)
        assert job is not None
        return job

    def _owner(self, provider: Address) -> Address:
        node = self._view.nodes.get(provider)
        if node is None:
            raise ProtocolError(f"0x{provider.hex()} is not registered on chain; whose checks count must be")
        return node.owner


def _check_bill(attempt: Attempt, job: Job, receipt: Receipt, ack: Ack | None) -> None:
    if receipt.lease != attempt.hash or receipt.request_hash != job.spec.request_hash:
        raise ProtocolError("the receipt is of another lease or request")
    _check_ack(attempt, ack)


def _check_ack(attempt: Attempt, ack: Ack | None) -> None:
    if ack is not None and ack.lease != attempt.hash:
        raise BadSignature("the ack is of another lease")

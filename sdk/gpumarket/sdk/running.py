"""One job from its order to its receipt: carries out what `session` says, each step durable before its effect is visible.

    async for items in run.items(): ...      # output as it becomes durable; ends when the answer is whole and its receipt verified

Leaving the iteration early, or `leave`, tells the provider to stop; what was received until then is acked and paid. Who does not read the
iteration acks nothing: the provider stops one window on. Never: a decision about money that is not in `session`, `lease_rules` or
`account`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from sqlalchemy import Connection

from gpumarket.core.codec import signed_ack
from gpumarket.core.errors import BadSignature, GpumarketError, NetworkError, ProtocolError, Unreachable
from gpumarket.core.terms import Ack, Task
from gpumarket.core.units import Address, Hash, Money, hex0x
from gpumarket.sdk import last_word, leasing, store
from gpumarket.sdk.account import PaidChannelState, bill
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.infer_stream import InferStream, Lost, finished_receipt, frame_items, open_message
from gpumarket.sdk.logprobs import Logprobs, logprobs_of
from gpumarket.sdk.logs import log
from gpumarket.sdk.session import (
    AttemptFailed,
    ClientLeaves,
    Conclude,
    Event,
    FinishedReceived,
    FrameReceived,
    GiveUp,
    Instruction,
    LeaseReceived,
    Leave,
    Phase,
    Progress,
    Record,
    RetryElsewhere,
    StartedReceived,
    StreamIdle,
    handle,
)
from gpumarket.telemetry.spans import NO_SPAN, Span
from gpumarket.v1 import market_pb2 as mpb
from gpumarket.v1 import provider_pb2 as ppb
from gpumarket.v1 import terms_pb2 as pb

T = TypeVar("T")
IDLE_SECONDS = 0.25
"""After this silence everything received is acked, whatever the window: the provider may be waiting for it."""
FUNDS_PAUSE_SECONDS = 0.3
"""Between two looks at the account while other jobs' maxima are still reserved at the scheduler."""
LAST_WORD_SECONDS = 1.0
"""How long a provider whose job we left may take to give its receipt for what it did."""


@dataclass(slots=True)
class _Wire:
    """Signed forms of what the machine handles as terms."""

    lease: pb.SignedLease
    offer: pb.SignedOffer
    body: pb.OfferBody
    receipt: pb.SignedReceipt | None = None


class JobRun:
    """A job under way. `progress` tells where it stands; `explanation` is the scheduler's, when it was asked for."""

    def __init__(self, desk: Desk, job: store.StoredJob, channel: PaidChannelState, progress: Progress, *, probability: float) -> None:
        self._desk, self._channel, self._probability = desk, channel, probability
        self.job, self.progress = job, progress
        self.explanation: mpb.Explanation | None = None
        self.explain = False
        self.will_check = False
        self.traceparent = ""
        """Context of the span that the job belongs to."""
        self.first = progress.items
        """Index of the first item that comes out of this run: earlier ones are in the journal."""
        self.logprobs: list[Logprobs] = []
        """Of the items that came out, where they were asked for."""
        self._left: ClientLeaves | None = None
        self._infer: Span = NO_SPAN
        self._wire: _Wire | None = None
        self._retry: RetryElsewhere | None = None
        self._retry_receipt: pb.SignedReceipt | None = None

    @property
    def signed_receipt(self) -> pb.SignedReceipt:
        """The receipt of the answer, once it is whole."""
        assert self._wire is not None and self._wire.receipt is not None
        return self._wire.receipt

    @property
    def billed(self) -> Money:
        return self.progress.billed

    @property
    def answered(self) -> bool:
        """Whether the provider has given all of its answer: leaving would save nothing."""
        return self.progress.phase is Phase.DELIVERED or self.progress.last_item is not None

    def leave(self, finish_reason: str = "") -> None:
        """End the job at what came so far, also while somebody waits in `items`, which then ends within a moment. "stop" as
        `finish_reason` makes what came the answer. Changes nothing once the answer is whole."""
        self._left = ClientLeaves(self.progress.attempt, finish_reason)

    async def items(self) -> AsyncGenerator[tuple[bytes, ...], None]:
        """Output items as they become durable. Raises JobFailed with every attempt's reason, NoProvider or a refusal before any work."""
        try:
            while self.progress.phase not in (Phase.DELIVERED, Phase.CANCELLED):
                if self.progress.phase is Phase.FAILED:
                    raise leasing.failure(self.progress)
                if self._left is not None:
                    await self._close_books("cancelled", "the client left", Phase.CANCELLED)
                    return
                await self._lease()
                async with aclosing(self._attempt()) as output:
                    async for items in output:
                        yield items
        except (GeneratorExit, asyncio.CancelledError):
            await unbroken(self._close_books("cancelled", "the client left", Phase.CANCELLED))  # where no attempt is under way
            raise
        except NetworkError as error:
            error.hint = f"nothing is lost: gpumarket job resume {hex0x(self.job.job)}"
            raise
        except GpumarketError as error:
            await self._close_books("failed", str(error))
            raise

    async def _lease(self) -> None:
        desk, job, channel, retry = self._desk, self.job, self._channel, self._retry
        name = "client.order" if retry is None else "client.retry"
        with desk.tracing.span(name, parent=self.traceparent, job=hex0x(job.job), attempt=self.progress.attempt + 1) as span:
            if retry is None:
                granted = await leasing.order(desk, job, channel, explain=self.explain, traceparent=span.context)
            else:
                proof = self._retry_receipt
                granted = await leasing.next_attempt(desk, job, self.progress, retry, proof, traceparent=span.context)
        if granted.HasField("explanation"):
            self.explanation = granted.explanation
        lease, body = await leasing.checked(desk, job, channel.id, self.progress, granted)
        progress, _ = handle(self.progress, LeaseReceived(lease))
        await desk.journal.transact(lambda c: store.add_attempt(c, job.job, granted.lease, granted.offer))
        self.progress, self._wire = progress, _Wire(granted.lease, granted.offer, body)
        self._retry, self._retry_receipt = None, None

    # --- a job that was read back from the journal -------------------------------------------------------------------------

    async def restart(self) -> None:
        """Close the attempt that was running when the client stopped, at what the journal holds of it; nobody is blamed."""
        failed = AttemptFailed(self.progress.attempt, "client-restart", "the client was restarted", self._desk.clock.now())
        await self._apply([failed])

    async def expire(self) -> None:
        """End a job whose deadline passed while no attempt ran."""
        await self._close_books("failed", "its deadline passed while the client was away")

    def resume_retry(self, retry: RetryElsewhere, receipt: pb.SignedReceipt | None = None) -> None:
        """Continue a job that was read back from the journal at this retry."""
        self._retry, self._retry_receipt = retry, receipt

    # --- one attempt -------------------------------------------------------------------------------------------------------

    async def _attempt(self) -> AsyncGenerator[tuple[bytes, ...], None]:
        desk, wire = self._desk, self._wire
        assert wire is not None
        body = wire.body
        try:
            line = await desk.peers.line(body.endpoint, body.tls_key_hash)
        except (Unreachable, BadSignature) as error:
            await self._apply([AttemptFailed(self.progress.attempt, "unreachable", error.message, desk.clock.now())])
            return
        left = max(1.0, float(self.job.spec.deadline - desk.clock.now()))
        self._infer = desk.tracing.span("client.infer", parent=self.traceparent, attempt=self.progress.attempt)
        stream = InferStream(line, Address(wire.lease.lease.provider), left + 5.0, self._infer.context)
        try:
            await stream.send(open_message(wire.lease, self.job.order, self.job.request, self.job.salt, await self._prefix()))
            async with aclosing(self._follow(stream)) as output:
                async for items in output:
                    yield items
        except (GeneratorExit, asyncio.CancelledError):
            await unbroken(self._abandon(stream))
            raise
        finally:
            good = self.progress.phase is Phase.DELIVERED
            self._infer.note(outcome=self.progress.phase.name.lower(), units=self.progress.units)
            self._infer.end()
            if good:
                desk.later(_goodbye(stream))
            else:
                await stream.hang_up()
            await desk.peers.release(body.endpoint, body.tls_key_hash, broken=not good)

    async def _follow(self, stream: InferStream) -> AsyncGenerator[tuple[bytes, ...], None]:
        """Read until the attempt is over, journaling and acking on the way."""
        attempt, silent_since = self.progress.attempt, self._desk.clock.monotonic()
        while self.progress.attempt == attempt and self.progress.phase in (Phase.LEASED, Phase.STREAMING):
            if self._left is not None:
                await unbroken(self._abandon(stream))
                return
            replies = await stream.receive(IDLE_SECONDS)
            now = self._desk.clock.monotonic()
            events: list[Event] = [self._event(attempt, reply) for reply in replies]
            if replies:
                silent_since = now
            elif now - silent_since > self._desk.settings.stall_seconds or self._desk.clock.now() > self.job.spec.deadline:
                detail = f"no sign of life for {now - silent_since:.0f} s"
                events = [AttemptFailed(attempt, "lost", detail, self._desk.clock.now())]
            else:
                events = [StreamIdle(attempt)]
            items, ack = await unbroken(self._apply(events))
            if ack is not None:
                with self._desk.tracing.span("client.ack", parent=self._infer.context, units=ack.ack.units):
                    await stream.send(ppb.InferRequest(ack=ack))
            if items:
                yield items

    def _event(self, attempt: int, reply: ppb.InferReply | Lost) -> Event:
        now = self._desk.clock.now()
        if isinstance(reply, Lost):
            return AttemptFailed(attempt, reply.reason, reply.detail, now)
        try:
            if reply.HasField("started"):
                return StartedReceived(attempt, Hash(reply.started.nonce))
            if reply.HasField("frame"):
                return FrameReceived(attempt, frame_items(reply.frame), reply.frame.units, logprobs_of(reply.frame))
            if reply.HasField("finished"):
                return self._finished(attempt, reply.finished, now)
        except (ProtocolError, BadSignature) as error:
            return AttemptFailed(attempt, "bad-output", error.message, now)
        return AttemptFailed(attempt, "bad-output", "an empty message", now)

    def _finished(self, attempt: int, finished: ppb.Finished, now: int) -> Event:
        """The answer is there: now, and not before, draw whether it is checked."""
        from gpumarket.settlement.verification import draw_check

        assert self._wire is not None
        with self._desk.tracing.span("client.receipt", parent=self._infer.context):
            receipt = finished_receipt(self._desk.domain, finished, Address(self._wire.lease.lease.provider))
        self._wire.receipt = finished.receipt
        drawn = draw_check(self._probability, self._desk.random)
        return FinishedReceived(attempt, receipt, finished.finish_reason, drawn, now)

    async def _prefix(self) -> list[int]:
        """Tokens that earlier attempts delivered."""
        if self.job.task is not Task.GENERATE or not self.progress.items:
            return []
        stored = self._desk.journal.read(lambda c: store.load_output(c, self.job.job))
        return [int.from_bytes(item, "little") for item in stored]

    async def _abandon(self, stream: InferStream) -> None:
        """The caller left: ack what came, tell the provider to stop, and wait a moment for its receipt."""
        if self.progress.phase not in (Phase.LEASED, Phase.STREAMING):
            return
        assert self._wire is not None
        attempt, reason = self.progress.attempt, self._left.finish_reason if self._left else ""
        _, ack = await self._apply([ClientLeaves(attempt, reason)])
        if ack is not None:
            await stream.send(ppb.InferRequest(ack=ack))
        await stream.send(ppb.InferRequest(cancel=True))
        finished = await stream.finished(LAST_WORD_SECONDS)
        if finished is not None and (ended := await last_word.keep(self._desk, self.job, self._channel, self.progress, finished)):
            self.progress = ended
            self._wire.receipt = finished.receipt
            if finished.receipt.receipt.outcome == pb.OUTCOME_COMPLETED:
                return  # it bills the whole answer, which ends the job
        self._desk.later(leasing.tell_left(self._desk, self.job, attempt, ack))

    # --- carrying instructions out -----------------------------------------------------------------------------------------

    async def _apply(self, events: Sequence[Event]) -> tuple[tuple[bytes, ...], pb.SignedAck | None]:
        """Let the machine take these events, make all that follows durable in one transaction; what may go out is the answer."""
        progress, instructions, fresh_nonce = self.progress, list[Instruction](), None
        for event in events:
            before = progress.nonce
            progress, more = handle(progress, event)
            instructions += more
            fresh_nonce = (
                progress.nonce if progress.nonce not in (None, before) else fresh_nonce
            )  # though the attempt ends in the same breath
        ack = _newest_ack(instructions)
        signed = signed_ack(self._desk.signer, self._desk.domain, ack) if ack is not None else None
        number = self.progress.attempt
        if instructions or fresh_nonce:
            work = self._writes(number, instructions, fresh_nonce, signed, progress)
            await self._desk.journal.transact(work)
        self.progress = progress
        self._settle_books(instructions)
        given = [i for i in instructions if isinstance(i, Record | Conclude)]
        for step in given:
            self.logprobs += step.logprobs
        return tuple(item for step in given for item in step.items), signed

    def _writes(
        self, number: int, instructions: Sequence[Instruction], nonce: Hash | None, ack: pb.SignedAck | None, progress: Progress
    ) -> Callable[[Connection], None]:
        job, channel = self.job.job, self._channel.id
        receipt = self._wire.receipt if self._wire else None
        now = self._desk.clock.now()

        def work(connection: Connection) -> None:
            if nonce is not None:
                store.set_attempt(connection, job, number, nonce=nonce)
            if ack is not None:
                store.set_attempt(connection, job, number, ack=ack.SerializeToString(deterministic=True))
            for step in instructions:
                if isinstance(step, Record | Conclude) and step.items:
                    store.add_output(connection, job, step.first, step.items)
                if isinstance(step, Conclude):
                    store.end_attempt(connection, job, progress.ends[-1], ack, receipt)
                    store.set_job(connection, job, **_delivered(progress, step, now))
                    bill(connection, channel, progress.billed)
                elif isinstance(step, RetryElsewhere | GiveUp | Leave):
                    store.end_attempt(connection, job, step.end, ack, receipt)
                    if isinstance(step, GiveUp | Leave):
                        state = "failed" if isinstance(step, GiveUp) else "cancelled"
                        reason = progress.finish_reason[:16]
                        store.set_job(connection, job, state=state, billed=progress.billed, finish_reason=reason, ended_at=now)
                        bill(connection, channel, progress.billed)

        return work

    def _settle_books(self, instructions: Sequence[Instruction]) -> None:
        for step in instructions:
            if isinstance(step, RetryElsewhere):
                self._retry = step
                self._retry_receipt = self._wire.receipt if self._wire else None
                log.info("attempt_ended", job=hex0x(self.job.job), attempt=step.end.number, reason=step.end.reason, detail=step.end.detail)
            elif isinstance(step, Conclude):
                self.will_check = step.ack.will_check
                self._desk.account.release(self._channel, self.job.spec.max_amount, self.progress.billed)
            elif isinstance(step, GiveUp | Leave):
                self._desk.account.release(self._channel, self.job.spec.max_amount, self.progress.billed)

    async def _close_books(self, state: str, reason: str, phase: Phase = Phase.FAILED) -> None:
        """A job that ends between attempts (no lease to be had, a lease refused): its maximum is free again."""
        if self.progress.phase is not Phase.ORDERED and self.progress.phase is not Phase.LEASED:
            return
        billed, now, channel, job = self.progress.billed, self._desk.clock.now(), self._channel.id, self.job.job
        told = self._left.finish_reason if self._left is not None else ""

        def work(connection: Connection) -> None:
            facts = {"reason": reason[:2_000]}
            store.set_verdict(connection, job, "", facts, state=state, billed=billed, finish_reason=told, ended_at=now)
            bill(connection, channel, billed)

        await self._desk.journal.transact(work)
        self._desk.account.release(self._channel, self.job.spec.max_amount, billed)
        self.progress = replace(self.progress, phase=phase)
        if phase is Phase.CANCELLED:
            acked = self._retry.ack if self._retry is not None else None
            signed = signed_ack(self._desk.signer, self._desk.domain, acked) if acked is not None else None
            self._desk.later(leasing.tell_left(self._desk, self.job, max(1, self.progress.attempt), signed))


async def unbroken(work: Coroutine[Any, Any, T]) -> T:
    """Finish `work` even when the caller is cancelled meanwhile: a commit and what we hold in memory must not come apart."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _newest_ack(instructions: Sequence[Instruction]) -> Ack | None:
    acks = [step.ack for step in instructions if step.ack is not None]
    return acks[-1] if acks else None


def _delivered(progress: Progress, step: Conclude, now: int) -> dict[str, Any]:
    """Columns of a job whose answer is whole: over, unless it was drawn for a check."""
    shared = {"billed": progress.billed, "will_check": step.ack.will_check, "finish_reason": progress.finish_reason[:16]}
    if step.ack.will_check:
        return shared | {"state": "delivered", "verdict": "", "ended_at": 0}
    return shared | {"state": "done", "verdict": "not-drawn", "ended_at": now}


async def _goodbye(stream: InferStream) -> None:
    await stream.say_goodbye()

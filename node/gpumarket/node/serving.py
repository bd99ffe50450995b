"""The shell around one attempt: runs the instructions of `attempt` against engine, journal and client.

One task per attempt owns its state and is never cancelled by the client's leaving, so that a receipt is always written; the rpc handler
only carries messages. Everything reaches it through one inbox, in order. What waits to be sent is bounded by the lease's window.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import structlog

from gpumarket.core.codec import open_ack, signed_receipt
from gpumarket.core.errors import GpumarketError, JobFailed, JournalError, ProtocolError
from gpumarket.core.ports import Clock
from gpumarket.core.signing import Domain, Signer
from gpumarket.core.terms import Task
from gpumarket.core.units import hex0x
from gpumarket.node.accounts import Accounts, Bill
from gpumarket.node.admission import Admitted
from gpumarket.node.attempt import (
    Acked,
    AckKept,
    Attempt,
    Broke,
    Cancelled,
    Close,
    Conclude,
    Ended,
    Event,
    Gone,
    Instruction,
    KeepAck,
    Late,
    Phase,
    Produced,
    Send,
    Stalled,
)
from gpumarket.node.engine.base import TokenLogprobs
from gpumarket.node.engines import Place
from gpumarket.node.meter import Item
from gpumarket.node.pace import Stopwatch
from gpumarket.node.spans import AttemptSpans
from gpumarket.node.tally import Tally
from gpumarket.node.work import run
from gpumarket.v1 import provider_pb2 as pb
from gpumarket.v1 import terms_pb2 as terms

FRAME_BYTES_MAX = 1 << 20
MESSAGE_BYTES = 4
"""What tag and length of a message in a frame take at most."""
STOP_SECONDS = 10.0
_log = structlog.get_logger()

Reply = pb.InferReply | GpumarketError | None
"""What goes to the client: a message, the error that ends the call, or None for its good end."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What every attempt of this provider works with."""

    signer: Signer
    domain: Domain
    accounts: Accounts
    clock: Clock
    ack_seconds: float
    final_ack_seconds: float
    on_bill: Callable[[Bill], None]
    """An attempt ended and can be claimed."""
    tally: Tally = field(default_factory=Tally)


class Session:
    """One attempt being served. `run` in a task of its own; `outbox` is what the handler sends; `leave` when the client is gone."""

    def __init__(self, desk: Desk, job: Admitted, place: Place, spans: AttemptSpans) -> None:
        self.job, self._spans = job, spans
        self.outbox: asyncio.Queue[Reply] = asyncio.Queue()
        self._desk, self._place = desk, place
        self._attempt = Attempt(job.lease, job.nonce, job.spec.request_hash, job.spec.prompt_units)
        self._inbox: asyncio.Queue[tuple[Event, asyncio.Future[None] | None]] = asyncio.Queue()
        self._hungry = asyncio.Event()
        self._opened_at = desk.clock.monotonic()
        self._deaf = False
        self._fault: GpumarketError | None = None
        self._stall: asyncio.TimerHandle | None = None

    # --- from the handler ------------------------------------------------------------------------------------------------------

    async def acknowledge(self, message: terms.SignedAck) -> None:
        """Judge an ack; returns once it is durable. What is wrong with it ends the attempt."""
        try:
            ack = open_ack(self._desk.domain, message, self.job.lease.client)
        except GpumarketError as error:
            self.refuse(error)
            return
        done = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait((Acked(ack, message.SerializeToString()), done))
        await done

    def cancel(self) -> None:
        """The client wants no more, and still listens."""
        self._post(Cancelled())

    def leave(self) -> None:
        """The client is gone: its work ends now. Harmless after the end."""
        self._post(Gone())

    def hang_up(self) -> None:
        """The client will say nothing more: whatever waits for its word ends."""
        self._deaf = True
        self._post(Produced(()))

    def refuse(self, error: GpumarketError) -> None:
        """The client broke the protocol: the last good ack counts, and it is told why."""
        self._fault = self._fault or error
        self._post(Gone())

    def shut_down(self) -> None:
        """This provider ends before the job does."""
        self._post(Broke("draining"))

    def give_up(self, error: GpumarketError) -> None:
        """The attempt could not be written down: it never was."""
        self._place.leave()
        self._spans.end(error.code)
        self.outbox.put_nowait(error)

    # --- the task --------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve to the end. Raises JournalError when the journal broke: nothing of this attempt may become visible then."""
        loop = asyncio.get_running_loop()
        started = pb.InferReply(started=pb.Started(nonce=self.job.nonce, queue_position=self._place.position))
        self.outbox.put_nowait(started)
        self._spans.stage("queue")
        pump = asyncio.create_task(self._pump())
        deadline = loop.call_later(max(0.0, self.job.lease.deadline - self._desk.clock.now()), self._post, Late())
        try:
            while self._attempt.phase is not Phase.CLOSED:
                event, done = await self._inbox.get()
                try:
                    await self._run(self._judge(event), pump)
                finally:
                    _tell(done)
                self._after()
        except JournalError as error:
            self.outbox.put_nowait(error)
            raise
        finally:
            deadline.cancel()
            self._disarm()
            await _stop(pump)
            self._place.leave()
            self._spans.end(self._fault.code if self._fault is not None else "")
            self._refuse_waiting()

    def _judge(self, event: Event) -> Sequence[Instruction]:
        try:
            return self._attempt.handle(event)
        except ProtocolError as error:
            self._fault = self._fault or error
            return self._attempt.handle(Gone())

    async def _run(self, instructions: Sequence[Instruction], pump: asyncio.Task[None]) -> None:
        for instruction in instructions:
            match instruction:
                case Send(items, units):
                    for frame in _frames(self.job.lease.task, items, units):
                        self.outbox.put_nowait(pb.InferReply(frame=frame))
                case KeepAck(ack, evidence):
                    await self._desk.accounts.keep_ack(self.job.lease_hash, evidence)
                    await self._run(self._attempt.handle(AckKept(ack)), pump)
                case Conclude(_, finish_reason):
                    await _stop(pump)
                    await self._conclude(finish_reason)
                case Close():
                    self._desk.on_bill(await self._desk.accounts.close(self.job.lease_hash))
                    self.outbox.put_nowait(self._fault)

    async def _conclude(self, finish_reason: str) -> None:
        self._spans.stage("receipt")
        receipt = signed_receipt(self._desk.signer, self._desk.domain, self._attempt.receipt(self._desk.clock.now()))
        await self._desk.accounts.keep_receipt(self.job.lease_hash, receipt)
        outcome = terms.Outcome.Name(receipt.receipt.outcome)
        word = outcome.removeprefix("OUTCOME_").lower()
        self._desk.tally.attempts[word] += 1
        self._spans.note(word, receipt.receipt.output_units)
        _log.info(
            "attempt ended", lease=hex0x(self.job.lease_hash), outcome=outcome, units=receipt.receipt.output_units, reason=finish_reason
        )
        if self._fault is None:
            self.outbox.put_nowait(pb.InferReply(finished=pb.Finished(receipt=receipt, finish_reason=finish_reason)))
        asyncio.get_running_loop().call_later(self._desk.final_ack_seconds, self._post, Gone())

    def _after(self) -> None:
        """Feed the engine, watch for a client that says nothing, end what waits for one that cannot speak."""
        attempt = self._attempt
        if attempt.hungry:
            self._hungry.set()
        if self._deaf and (attempt.waiting_for_ack or attempt.phase is Phase.CONCLUDED):
            self._post(Gone())
        elif attempt.waiting_for_ack:
            self._arm(attempt.meter.acked)
        else:
            self._disarm()

    def _arm(self, acked: int) -> None:
        if self._stall is None or self._stall_at != acked:
            self._disarm()
            self._stall_at = acked
            self._stall = asyncio.get_running_loop().call_later(self._desk.ack_seconds, self._post, Stalled())

    _stall_at = -1

    def _disarm(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _post(self, event: Event) -> None:
        self._inbox.put_nowait((event, None))

    def _refuse_waiting(self) -> None:
        while not self._inbox.empty():
            _, done = self._inbox.get_nowait()
            _tell(done)

    def _count(self, event: Event, *, first: bool) -> int:
        """Units of what the engine gave."""
        seat, now = self._place.seat, self._desk.clock.monotonic()
        seat.heard_at = now
        units = sum(item.units for item in event.items) if isinstance(event, Produced) else 0
        if units:
            tally, model = self._desk.tally, self.job.lease.model
            tally.tokens[model] += units
            if first:
                tally.prompt_tokens[model] += self.job.spec.prompt_units
                tally.on_first(model, now - self._opened_at)
                self._spans.stage("decode")
        return units

    async def _pump(self) -> None:
        """The engine's output into the inbox, one batch at a time, no faster than it is taken."""
        watch, units, clock = Stopwatch(), 0, self._desk.clock
        try:
            async with self._place.engine() as engine, aclosing(run(self.job.work, engine)) as output:
                self._spans.stage("prefill")
                watch.start(clock.monotonic())
                async for event in output:
                    watch.stop(clock.monotonic())
                    units += self._count(event, first=not units)
                    self._hungry.clear()
                    self._post(event)
                    if isinstance(event, Ended):
                        return
                    await self._hungry.wait()
                    watch.start(clock.monotonic())
        except GpumarketError as error:
            _log.warning("attempt failed", lease=hex0x(self.job.lease_hash), code=error.code, reason=error.message)
            await self._place.seat.check()
            self._post(Broke(error.code))
        except Exception:
            _log.exception("attempt failed by a defect", lease=hex0x(self.job.lease_hash))
            self._post(Broke("internal"))
        finally:
            if self.job.lease.task is self.job.model.manifest.task:  # a check replays a text in one pass: another pace
                self._place.seat.pace.add(units, watch.seconds)


def draining() -> JobFailed:
    """Why a provider that is going away takes nothing more."""
    return JobFailed("this provider is draining", hint="ask the scheduler for another one", retryable=True)


def _frames(task: Task, items: Sequence[Item], units: int) -> list[pb.Frame]:
    """Frames of at most about FRAME_BYTES_MAX; `units` is the attempt's count after all of them."""
    sent = units - sum(item.units for item in items)
    frames: list[pb.Frame] = []
    size = FRAME_BYTES_MAX
    for item in items:
        told = _logprobs(item.logprobs) if item.logprobs is not None else None
        bytes_ = len(item.data) + (told.ByteSize() + MESSAGE_BYTES if told is not None else 0)
        if size + bytes_ > FRAME_BYTES_MAX:
            frames.append(pb.Frame())
            size = 0
        frame = frames[-1]
        size += bytes_
        sent += item.units
        frame.units = sent
        if task is Task.GENERATE:
            frame.tokens.append(int.from_bytes(item.data, "little"))
            if told is not None:
                frame.logprobs.append(told)
        else:
            frame.items.append(item.data)
    return frames


def _logprobs(told: TokenLogprobs) -> pb.TokenLogprobs:
    top, values = zip(*told.top, strict=True) if told.top else ((), ())
    return pb.TokenLogprobs(token=told.token, logprob=told.logprob, top=top, top_logprobs=values)


def _tell(done: asyncio.Future[None] | None) -> None:
    """Wake who waits for an event to be judged. A client that hung up meanwhile waits no longer: its future is cancelled."""
    if done is not None and not done.done():
        done.set_result(None)


async def _stop(task: asyncio.Task[None]) -> None:
    """Cancel and wait; an engine that does not let go in time is left to `Seat.check`. Raises what the task raised."""
    task.cancel()
    await asyncio.wait([task], timeout=STOP_SECONDS)
    if not task.done():
        _log.error("an engine does not let go of a cancelled job")
    elif not task.cancelled() and (error := task.exception()) is not None:
        raise error

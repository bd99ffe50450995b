"""The Provider service: opens attempts, answers for receipts and GPUs, serves manifests and small files.

Every call that costs something is bounded: an attempt needs a lease by a scheduler that pays, a proof a registered scheduler, a blob a free
place (I8). Nothing of a request or an output is logged (I9).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import grpc.aio
import structlog

from gpumarket.core.codec import CallGuard, manifest_to_proto
from gpumarket.core.errors import BadSignature, Busy, GpumarketError, JobFailed, JournalError, ProtocolError, UnknownModel
from gpumarket.core.ports import Random
from gpumarket.core.rpc import abort
from gpumarket.core.units import Address, Hash, hex0x
from gpumarket.node.admission import House, Spoke, admit
from gpumarket.node.credit import require_credit, require_deposit
from gpumarket.node.engines import Engines
from gpumarket.node.gpu_proof import Commitment, Prover
from gpumarket.node.peers import Node
from gpumarket.node.serving import Desk, Session, draining
from gpumarket.node.spans import AttemptSpans, Spans
from gpumarket.v1 import provider_pb2 as pb
from gpumarket.v1 import terms_pb2 as terms
from gpumarket.v1.provider_pb2_grpc import ProviderServicer

SCHEDULER_ROLE = 2
"""Role bit of the registry (settlement.chain.SCHEDULER; not imported, to keep web3 out of tests of this module)."""
FIRST_MESSAGE_SECONDS = 10.0
GPU_READS_MAX = 16
UNOPENED_MAX = 256
BLOB_BYTES_MAX = 32 << 20
BLOB_PIECE_BYTES = 1 << 20
BLOB_SECONDS = 60.0
BLOBS_AT_ONCE = 8
WEIGHTS = (".safetensors", ".onnx", ".bin", ".gguf")
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Credit:
    """Where a scheduler's limit starts (base units), and how it grows with what was paid."""

    start: int
    growth: float


class Bench(Protocol):
    """Who judges evidence (node.panel.member.Panel)."""

    async def take(self, caller: Address, dispute: Hash, evidence: bytes) -> None: ...


class ProviderService(ProviderServicer):
    """gpumarket.v1.Provider."""

    def __init__(
        self,
        house: House,
        desk: Desk,
        engines: Engines,
        prover: Prover,
        randomness: Random,
        *,
        channels: Mapping[Hash, Spoke],
        nodes: Mapping[Address, Node],
        credit: Credit,
        read_blob: Callable[[Hash, int], bytes],
        on_journal_error: Callable[[JournalError], None],
        on_change: Callable[[], None] = lambda: None,
        spans: Spans | None = None,
    ) -> None:
        self._spans = spans or Spans()
        self._house, self._desk, self._engines, self._prover, self._random = house, desk, engines, prover, randomness
        self._channels, self._nodes, self._credit = channels, nodes, credit
        self._read_blob, self._on_journal_error, self._on_change = read_blob, on_journal_error, on_change
        self._guard = CallGuard(house.domain, house.address, desk.clock, known=lambda caller: caller in nodes)
        self._sessions: dict[asyncio.Task[None], Session] = {}
        self._unopened = 0
        self._blobs = asyncio.Semaphore(BLOBS_AT_ONCE)
        self.draining = False
        self.panel: Bench | None = None
        """Where evidence goes; None while this provider sits on no panels."""

    @property
    def open_attempts(self) -> int:
        return len(self._sessions)

    def open_leases(self, scheduler: Address) -> list[Hash]:
        """Leases of this scheduler that were opened here and are not over."""
        return [session.job.lease_hash for session in self._sessions.values() if session.job.lease.scheduler == scheduler]

    def credit_left(self, scheduler: Address) -> bool:
        """Whether this scheduler may owe anything more."""
        return self._desk.accounts.standing(scheduler).owed < self.credit_limit(scheduler)

    def credit_limit(self, scheduler: Address) -> int:
        """Most that this scheduler may owe now, base units."""
        return self._desk.accounts.standing(scheduler).limit(self._credit.start, self._credit.growth)

    # --- attempts --------------------------------------------------------------------------------------------------------------

    async def Infer(  # type: ignore[override]  # the reader-writer form: its end runs at once when the client leaves
        self, request_iterator: AsyncIterator[pb.InferRequest], context: grpc.aio.ServicerContext[pb.InferRequest, pb.InferReply]
    ) -> None:
        """One attempt (proto: Provider.Infer)."""
        spans = self._spans.attempt(context)
        try:
            session = self._open(await self._first(request_iterator), spans)
        except GpumarketError as error:
            spans.end(error.code)
            self._desk.tally.refusals[error.code] += 1
            await abort(context, error)
        listening = asyncio.create_task(_listen(session, request_iterator))
        try:
            while (reply := await session.outbox.get()) is not None:
                if isinstance(reply, GpumarketError):
                    await abort(context, reply)
                await context.write(reply)
        finally:
            session.leave()
            listening.cancel()

    async def _first(self, requests: AsyncIterator[pb.InferRequest]) -> pb.InferOpen:
        if self.draining:
            raise draining()
        if self._unopened >= UNOPENED_MAX:
            raise Busy("too many calls that have not said what they want", retry_after_seconds=1.0)
        self._unopened += 1
        try:
            message = await asyncio.wait_for(anext(requests), FIRST_MESSAGE_SECONDS)
        except (StopAsyncIteration, TimeoutError) as error:
            raise ProtocolError(f"no InferOpen within {FIRST_MESSAGE_SECONDS:.0f} s") from error
        finally:
            self._unopened -= 1
        if message.WhichOneof("message") != "open":
            raise ProtocolError("the first message of Infer must be an InferOpen")
        return message.open

    def _open(self, message: pb.InferOpen, spans: AttemptSpans) -> Session:
        """Judge, reserve, and start the attempt's task. Without an await between the checks and the reservation."""
        job = admit(message, self._house, self._channels, Hash(self._random.token(32)), self._desk.clock.now())
        accounts, lease = self._desk.accounts, job.lease
        accounts.journal.require_space()
        standing = accounts.standing(lease.scheduler)
        require_credit(standing, job.open_job, self.credit_limit(lease.scheduler))
        channel = self._channels[lease.provider_channel]
        require_deposit(
            standing,
            job.open_job,
            channel.deposit,
            accounts.vouchered(lease.provider_channel),
            accounts.open_jobs(lease.scheduler),
        )
        if job.lease_hash in standing.open:
            raise ProtocolError("this attempt is running already")
        place = self._engines.seats[lease.model].enter()
        spans.admitted(job)
        session = Session(self._desk, job, place, spans)
        accounts.reserve(job)
        evidence = message.lease.SerializeToString(), message.order.SerializeToString()
        task = asyncio.create_task(self._serve(session, *evidence))
        self._sessions[task] = session
        task.add_done_callback(self._ended)
        return session

    async def _serve(self, session: Session, signed_lease: bytes, signed_order: bytes) -> None:
        """An attempt's task: written down first, then served. Nobody cancels it, so the journal and memory agree."""
        job = session.job
        try:
            await self._desk.accounts.begin(job, signed_lease, signed_order, self._desk.clock.now())
        except GpumarketError as error:
            self._desk.accounts.release(job)
            session.give_up(error)
            if isinstance(error, JournalError):
                raise
            return
        await session.run()

    def _ended(self, task: asyncio.Task[None]) -> None:
        session = self._sessions.pop(task)
        self._on_change()
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, JournalError):
            self._on_journal_error(error)
            return
        _log.error("an attempt's task failed by a defect", lease=hex0x(session.job.lease_hash), exc_info=error)
        session.outbox.put_nowait(JobFailed("the provider failed", hint="ask the scheduler for another one", retryable=True))

    async def drain(self, seconds: float) -> None:
        """Take nothing more; let what runs end, and after `seconds` end it as failed."""
        self.draining = True
        self._on_change()
        if self._sessions:
            await asyncio.wait(list(self._sessions), timeout=seconds)
        for session in self._sessions.values():
            session.shut_down()
        if self._sessions:
            await asyncio.wait(list(self._sessions), timeout=seconds)

    # --- receipts, proofs, files -------------------------------------------------------------------------------------------------

    async def GetReceipt(
        self, request: terms.SignedCall, context: grpc.aio.ServicerContext[terms.SignedCall, terms.SignedReceipt]
    ) -> terms.SignedReceipt:
        """A receipt again, for the lease's client or scheduler."""
        try:
            caller, body = self._guard.open("Provider/GetReceipt", request, pb.ReceiptRequest)
            found = self._desk.accounts.receipt(Hash(body.lease))
            if found is None:
                raise JobFailed("there is no receipt of this lease (yet)", hint="the attempt may still run", retryable=True)
            lease, receipt = found
            if caller not in (lease.client, lease.scheduler):
                raise BadSignature("a receipt is shown to the lease's client and scheduler only")
        except GpumarketError as error:
            await abort(context, error)
        return receipt

    async def ProveGpu(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.GpuChallenge], context: grpc.aio.ServicerContext[pb.GpuChallenge, pb.GpuAnswer]
    ) -> None:
        """Commit to a seeded product, then answer for it (settlement.gpu_proof)."""
        try:
            seed = (await _next_challenge(request_iterator, "seed")).seed
            caller, _ = self._guard.open("Provider/ProveGpu", seed.call, terms.TokenList)
            node = self._nodes.get(caller)
            if node is None or not node.roles & SCHEDULER_ROLE:
                raise BadSignature(f"{hex0x(caller)} is no registered scheduler; proofs are for schedulers")
            commitment = await self._prover.commit(caller, seed.seed, seed.size, seed.repeats, seed.uuid, seed.keep)
            try:
                await _answer_for(commitment, request_iterator, context)
            finally:
                await commitment.release()
        except GpumarketError as error:
            await abort(context, error)
        self._on_change()

    async def GetManifest(
        self, request: pb.ManifestRequest, context: grpc.aio.ServicerContext[pb.ManifestRequest, terms.ModelManifest]
    ) -> terms.ModelManifest:
        """The manifest of a model on sale."""
        model = self._house.models.get(Hash(request.model))
        if model is None:
            await abort(context, UnknownModel(f"model {hex0x(request.model)} is not on sale here"))
        return manifest_to_proto(model.manifest)

    async def GetBlob(  # type: ignore[override]
        self, request: pb.BlobRequest, context: grpc.aio.ServicerContext[pb.BlobRequest, pb.BlobPiece]
    ) -> None:
        """A small file of a model on sale, in pieces."""
        try:
            self._require_served(Hash(request.sha256))
            if self._blobs.locked():
                raise Busy("too many files are being read", retry_after_seconds=1.0)
            async with self._blobs:
                data = await asyncio.to_thread(self._read_blob, Hash(request.sha256), BLOB_BYTES_MAX)
                async with asyncio.timeout(BLOB_SECONDS):  # whoever reads slowly must not hold a place that others wait for
                    for start in range(0, max(1, len(data)), BLOB_PIECE_BYTES):
                        await context.write(pb.BlobPiece(data=data[start : start + BLOB_PIECE_BYTES]))
        except TimeoutError:
            await abort(context, Busy(f"the file was not read within {BLOB_SECONDS:.0f} s", retry_after_seconds=1.0))
        except GpumarketError as error:
            await abort(context, error)

    async def TakeEvidence(
        self, request: terms.SignedCall, context: grpc.aio.ServicerContext[terms.SignedCall, pb.EvidenceTaken]
    ) -> pb.EvidenceTaken:
        """Evidence of a dispute on whose panel this provider sits (node.panel)."""
        try:
            caller, body = self._guard.open("Provider/TakeEvidence", request, pb.PanelEvidence)
            if self.panel is None:
                raise ProtocolError("this provider sits on no panels")
            await self.panel.take(caller, Hash(body.dispute), body.evidence)
        except GpumarketError as error:
            if isinstance(error, JournalError):
                self._on_journal_error(error)
            await abort(context, error)
        return pb.EvidenceTaken()

    def _require_served(self, sha256: Hash) -> None:
        for model in self._house.models.values():
            for file in model.manifest.files:
                if file.sha256 != sha256:
                    continue
                if file.path.endswith(WEIGHTS) or file.size > BLOB_BYTES_MAX:
                    raise ProtocolError(f"{file.path} is not served: weights stay here", hint="get the model from where it is published")
                return
        raise UnknownModel(f"no model on sale here has a file {hex0x(sha256)}")


async def _listen(session: Session, requests: AsyncIterator[pb.InferRequest]) -> None:
    async for message in requests:
        match message.WhichOneof("message"):
            case "ack":
                await session.acknowledge(message.ack)
            case "cancel":
                session.cancel()
            case _:
                session.refuse(ProtocolError("after the InferOpen only acks and cancel may come"))
                return
    session.hang_up()


async def _answer_for(
    commitment: Commitment, requests: AsyncIterator[pb.GpuChallenge], context: grpc.aio.ServicerContext[pb.GpuChallenge, pb.GpuAnswer]
) -> None:
    """Show the commitment, answer reads of what it keeps, then open it."""
    told = pb.GpuCommitment(root=commitment.root, gpu_class=commitment.gpu.gpu_class)
    await context.write(pb.GpuAnswer(commitment=told))
    for _ in range(GPU_READS_MAX):
        message = await _next_challenge(requests, "opening", "read")
        if message.HasField("opening"):
            break
        kept = await commitment.read(message.read.links, message.read.rows)
        await context.write(pb.GpuAnswer(kept=pb.GpuKept(rows=kept)))
    else:
        message = await _next_challenge(requests, "opening")
    opening = message.opening
    product, rows = await asyncio.to_thread(commitment.open, opening.vector_seed, list(opening.rows))
    shown = [pb.GpuRow(index=row.index, values=row.values, path=row.path) for row in rows]
    await context.write(pb.GpuAnswer(proof=pb.GpuProof(product=product, rows=shown)))


async def _next_challenge(requests: AsyncIterator[pb.GpuChallenge], *wanted: str) -> pb.GpuChallenge:
    try:
        message = await asyncio.wait_for(anext(requests), FIRST_MESSAGE_SECONDS)
    except (StopAsyncIteration, TimeoutError) as error:
        raise ProtocolError(f"no {wanted[0]} within {FIRST_MESSAGE_SECONDS:.0f} s") from error
    if message.WhichOneof("message") not in wanted:
        raise ProtocolError(f"a GPU challenge's next message must be its {' or a '.join(wanted)}")
    return message

"""A market for tests of the SDK: scripted scheduler and providers that speak the protocol over real TLS, and a chain in memory.

They are honest unless told otherwise: `FakeProvider` has a switch for each thing that can go wrong, `FakeScheduler.change_lease` bends
a lease.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import sdk_models

from gpumarket.core import rpc, tensor_requests
from gpumarket.core.codec import (
    CallGuard,
    from_proto,
    manifest_to_proto,
    open_ack,
    open_lease,
    open_order,
    parse,
    signed_lease,
    signed_offer,
    signed_receipt,
)
from gpumarket.core.errors import Busy, FundsError, GpumarketError, OutOfFunds
from gpumarket.core.ports import SystemClock
from gpumarket.core.signing import Domain, LocalKey, channels_domain, market_domain
from gpumarket.core.tensor_requests import TensorRequest
from gpumarket.core.tensors import encode_item
from gpumarket.core.terms import Ack, JobSpec, Lease, Outcome, Receipt, Task, Voucher, keccak256, output_chain, request_hash, token_item
from gpumarket.core.units import ZERO_HASH, Address, Hash, Money, money_bytes
from gpumarket.settlement import pricing
from gpumarket.settlement.verification import EMBED_FP32, INFER_FP32, TEXT_FP32, judge, open_evidence, profile_by_digest
from gpumarket.settlement.vouchers import sign_close, verify_voucher
from gpumarket.v1 import market_pb2 as mpb
from gpumarket.v1 import market_pb2_grpc as mgrpc
from gpumarket.v1 import provider_pb2 as ppb
from gpumarket.v1 import provider_pb2_grpc as pgrpc
from gpumarket.v1 import terms_pb2 as pb

CHAIN_ID = 31_337
DOMAIN = market_domain(CHAIN_ID, Address(b"\x11" * 20))
CHANNELS_DOMAIN = channels_domain(CHAIN_ID, Address(b"\x22" * 20))
TOKEN = 10**18
CLIENT = LocalKey(keccak256(b"sdk client"))
FEE_PPM = 10_000
DIMENSIONS = 4


# --- chain ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Node:
    operator: Address
    owner: Address
    roles: int
    stake: int = 10 * TOKEN
    tls_key_hash: Hash = ZERO_HASH
    endpoint: str = ""


@dataclass
class Channel:
    id: Hash
    payer: Address
    payee: Address
    deposit: int
    expires_at: int
    claimed: int = 0
    closes_at: int = 0
    closed: bool = False
    signer: Address = CLIENT.address


class MemoryChain:
    """ChainPort without a chain."""

    chain_id = CHAIN_ID
    market_domain = DOMAIN
    channels_domain: Domain = CHANNELS_DOMAIN

    def __init__(self, balance: int = 100 * TOKEN) -> None:
        self.nodes: dict[Address, Any] = {}
        self.channels: dict[Hash, Any] = {}
        self.money = balance
        self.opened: dict[str, Hash] = {}
        self.close_fails: Exception | None = None
        """Raised by the next cooperative close."""

    async def refresh(self) -> None: ...

    async def balance(self) -> Money:
        return Money(self.money)

    async def faucet(self) -> None:
        self.money += 1_000 * TOKEN

    async def open_channel(self, label: str, payee: Address, amount: Money, expires_at: int) -> Hash:
        if label not in self.opened:
            self.money -= amount
            self.opened[label] = Hash(hashlib.sha256(label.encode() + bytes([len(self.opened)])).digest())
            self.channels[self.opened[label]] = Channel(self.opened[label], CLIENT.address, payee, amount, expires_at)
        return self.opened[label]

    async def top_up(self, channel: Hash, amount: Money, expires_at: int) -> None:
        self.money -= amount
        self.channels[channel].deposit += amount

    async def cooperative_close(self, channel: Hash, cumulative: Money, payee_signature: bytes) -> None:
        if (failure := self.close_fails) is not None:
            self.close_fails = None
            raise failure
        self.channels[channel].closed = True
        self.money += self.channels[channel].deposit - cumulative

    async def close(self) -> None: ...


# --- providers -----------------------------------------------------------------------------------------------------------------


def vector(ids: list[int], wrong: float = 0.0) -> bytes:
    """A text's embedding: any function of its tokens will do, if all providers use the same."""
    digest = hashlib.sha256(np.asarray(ids, dtype="<u4").tobytes()).digest()
    return (np.frombuffer(digest[: 2 * DIMENSIONS], dtype="<u2").astype("<f4") / 65_535 + np.float32(wrong)).astype("<f4").tobytes()


def row(asked: TensorRequest, index: int) -> bytes:
    """A row's answer: the sum of what went in, and how many numbers those were."""
    (given,) = (tensor.array[index] for tensor in asked.inputs)
    answers = {"y": np.asarray(given.sum(), dtype="<f4"), "n": np.asarray(given.size, dtype="<i8")}
    return encode_item([answers[spec.name] for spec in asked.outputs])


def token_at(prompt: list[int], position: int, wrong: int = 0) -> int:
    """The answer's token at a position; 0 and 1 (special) never come."""
    return 2 + (sum(prompt) + 7 * position + wrong) % 318


@dataclass
class FakeProvider(pgrpc.ProviderServicer):
    """A provider. Each switch is one way to go wrong."""

    name: str
    owner: str = ""
    prompt_price: int = TOKEN // 50
    output_price: int = TOKEN // 10
    checks: bool = True
    models: tuple[Any, ...] = (sdk_models.EMBED, sdk_models.CHAT)
    dies_after_items: int | None = None
    silent_after_items: int | None = None
    """From then on the call stays open and nothing comes: no frame, no receipt, no error."""
    busy: bool = False
    wrong_numbers: float = 0.0
    change_receipt: Callable[[Receipt], Receipt] = lambda r: r
    outcome: Outcome = Outcome.COMPLETED
    change_frame: Callable[[ppb.Frame], ppb.Frame] = lambda f: f
    files: Callable[[str, bytes], bytes] = lambda _path, data: data
    hold: asyncio.Event | None = None
    hold_after_items: int = 12
    frame_items: int = 3
    jobs: list[Lease] = field(default_factory=list)
    acks: list[Ack] = field(default_factory=list)
    prefixes: list[list[int]] = field(default_factory=list)
    cancelled: bool = False
    cancelled_at: float = 0.0
    """By the loop's clock, when it was told to stop."""
    outcome_when_left: Outcome = Outcome.CANCELLED
    last_word: bool = True
    """Whether a job that its client left gets a receipt."""
    sent_units: int = 0
    """Of the newest attempt."""
    change_logprobs: Callable[[ppb.TokenLogprobs], object] = lambda _: None
    requests: list[bytes] = field(default_factory=list)
    endpoint: str = ""
    tls_key_hash: Hash = ZERO_HASH

    def __post_init__(self) -> None:
        self.key = LocalKey(keccak256(b"provider " + self.name.encode()))
        self.owner_address = Address(keccak256(b"owner " + (self.owner or self.name).encode())[:20])

    @property
    def offer(self) -> pb.SignedOffer:
        profiles = {Task.EMBED: EMBED_FP32.digest, Task.GENERATE: TEXT_FP32.digest, Task.INFER: INFER_FP32.digest}
        models = [
            pb.ModelOffer(
                model=m.digest,
                name=m.name,
                task=pb.Task.ValueType(int(m.task)),
                dtype=m.dtype,
                prompt_price_per_mtok=money_bytes(self.prompt_price),
                output_price_per_mtok=money_bytes(self.output_price),
                profile=profiles[m.task],
                max_input_tokens=m.max_input_tokens,
            )
            for m in self.models
        ]
        body = pb.OfferBody(
            provider=self.key.address,
            endpoint=self.endpoint,
            tls_key_hash=self.tls_key_hash,
            models=models,
            sequence=1,
            expires_at=SystemClock().now() + 3_600,
            checks=self.checks,
            capacity=4,
        )
        return signed_offer(self.key, DOMAIN, body)

    async def GetReceipt(self, request: pb.SignedCall, context: Any) -> pb.SignedReceipt:
        await rpc.abort(context, GpumarketError("no receipt is kept here"))

    async def TakeEvidence(self, request: pb.SignedCall, context: Any) -> ppb.EvidenceTaken:
        await rpc.abort(context, GpumarketError("no panel sits here"))

    async def ProveGpu(self, requests: Any, context: Any) -> AsyncIterator[ppb.GpuAnswer]:
        await rpc.abort(context, GpumarketError("there is no GPU here"))
        yield ppb.GpuAnswer()

    async def GetManifest(self, request: ppb.ManifestRequest, context: Any) -> pb.ModelManifest:
        for model in self.models:
            if model.digest == request.model:
                return manifest_to_proto(model)
        await rpc.abort(context, GpumarketError("not on sale"))

    async def GetBlob(self, request: ppb.BlobRequest, context: Any) -> AsyncIterator[ppb.BlobPiece]:
        for model in self.models:
            for path, data in sdk_models.small_files(model.task).items():
                if hashlib.sha256(data).digest() == request.sha256:
                    data = self.files(path, data)
                    for start in range(0, len(data), 1_000):
                        yield ppb.BlobPiece(data=data[start : start + 1_000])
                    return

    async def Infer(self, requests: AsyncIterator[ppb.InferRequest], context: Any) -> AsyncIterator[ppb.InferReply]:
        opened = (await anext(requests)).open
        lease = open_lease(DOMAIN, opened.lease)
        spec, _ = open_order(DOMAIN, opened.order)
        assert lease.provider == self.key.address
        assert spec.struct_hash == lease.spec
        assert request_hash(opened.salt, opened.request) == spec.request_hash
        self.jobs.append(lease)
        self.prefixes.append(list(opened.prefix))
        self.requests.append(opened.request)
        if self.busy:
            await rpc.abort(context, Busy("the queue is full"))
        attempt = _Attempt(self, lease, spec, opened)
        reader = asyncio.create_task(attempt.read(requests))
        try:
            async for reply in attempt.replies(context):
                yield reply
            await asyncio.wait({reader}, timeout=5)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            reader.cancel()


class _Attempt:
    """One Infer call, honest about windows: it waits for acks."""

    def __init__(self, provider: FakeProvider, lease: Lease, spec: JobSpec, opened: ppb.InferOpen) -> None:
        self.provider, self.lease, self.spec, self.opened = provider, lease, spec, opened
        self.acked, self.moved, self.told = 0, asyncio.Event(), asyncio.Event()
        self.nonce = Hash(keccak256(lease.struct_hash + provider.name.encode()))

    @property
    def left(self) -> bool:
        """Whether the client wants no more."""
        return self.told.is_set()

    async def read(self, requests: AsyncIterator[ppb.InferRequest]) -> None:
        async for message in requests:
            if message.HasField("ack"):
                ack = open_ack(DOMAIN, message.ack, self.lease.client)
                assert ack.units >= self.acked
                self.provider.acks.append(ack)
                self.acked = ack.units
                self.moved.set()
                if ack.complete:
                    return
            if message.cancel:
                self.provider.cancelled = True
                self.told.set()
                self.provider.cancelled_at = asyncio.get_running_loop().time()
                self.moved.set()
                return

    def items(self) -> list[tuple[bytes, int]]:
        """What this attempt has to deliver: (item, units)."""
        wrong = self.provider.wrong_numbers
        if self.spec.task is Task.GENERATE:
            request = parse(pb.GenerateRequest, self.opened.request)
            start = self.lease.prefix_units
            assert output_chain(token_item(t) for t in self.opened.prefix) == self.lease.prefix_hash
            return [(token_item(token_at(list(request.prompt), i, round(wrong))), 1) for i in range(start, request.max_tokens)]
        if self.spec.task is Task.EMBED:
            inputs, skip, found = parse(pb.EmbedRequest, self.opened.request).inputs, self.lease.prefix_units, []
            for entry in inputs:
                if skip > 0:
                    skip -= len(entry.ids)
                else:
                    found.append((vector(list(entry.ids), wrong), len(entry.ids)))
            return found
        if self.spec.task is Task.INFER:
            asked = tensor_requests.from_bytes(self.opened.request)
            found = [(row(asked, index), 1) for index in range(asked.items)]
            return found[self.lease.prefix_units :]
        check = parse(pb.CheckRequest, self.opened.request)
        if check.embed.inputs:
            return [(vector(list(entry.ids), wrong), len(entry.ids)) for entry in check.embed.inputs]
        prompt = list(check.generate.prompt)
        gaps = [0.0 if t == token_at(prompt, i, round(wrong)) else np.inf for i, t in enumerate(check.output)]
        return [(np.asarray(gaps, dtype="<f4").tobytes(), len(prompt) + len(check.output))]

    async def replies(self, context: Any) -> AsyncIterator[ppb.InferReply]:
        yield ppb.InferReply(started=ppb.Started(nonce=self.nonce))
        units, sent, chain = 0, 0, self.lease.prefix_hash
        batch: list[tuple[bytes, int]] = []
        todo = self.items()
        for index, (item, cost) in enumerate(todo):
            if self.provider.dies_after_items is not None and index == self.provider.dies_after_items:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
            if index == self.provider.silent_after_items:
                if batch:
                    yield self._frame(batch, units)
                await asyncio.Event().wait()
            while units + cost - self.acked > self.lease.window_units and units > self.acked and not self.left:
                if batch:
                    yield self._frame(batch, units)
                    batch = []
                self.moved.clear()
                await self.moved.wait()
            if self.left:
                break
            units, sent, chain = units + cost, sent + 1, output_chain([item], chain)
            batch.append((item, cost))
            if len(batch) == self.provider.frame_items or index + 1 == len(todo):
                yield self._frame(batch, units)
                batch = []
            if self.provider.hold is not None and index + 1 == self.provider.hold_after_items:
                waiting = [asyncio.ensure_future(self.provider.hold.wait()), asyncio.ensure_future(self.told.wait())]
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in waiting:
                    task.cancel()
        if self.left:
            if not self.provider.last_word:
                await asyncio.Event().wait()
            if batch:
                yield self._frame(batch, units)  # was on its way
        receipt = Receipt(
            lease=self.lease.struct_hash,
            nonce=self.nonce,
            request_hash=self.spec.request_hash,
            output_hash=chain,
            prefix_units=self.lease.prefix_units,
            prefix_hash=self.lease.prefix_hash,
            prompt_units=self.spec.prompt_units,
            output_units=units,
            outcome=self.provider.outcome_when_left if self.left else self.provider.outcome,
            finished_at=SystemClock().now(),
        )
        signed = signed_receipt(self.provider.key, DOMAIN, self.provider.change_receipt(receipt))
        yield ppb.InferReply(finished=ppb.Finished(receipt=signed, finish_reason="length"))

    def _frame(self, batch: list[tuple[bytes, int]], units: int) -> ppb.InferReply:
        frame = ppb.Frame(units=units)
        self.provider.sent_units = units
        if self.spec.task is Task.GENERATE:
            frame.tokens.extend(int.from_bytes(item, "little") for item, _ in batch)
            request = parse(pb.GenerateRequest, self.opened.request)
            if request.HasField("top_logprobs"):
                frame.logprobs.extend(self._logprobs(token, request.top_logprobs) for token in frame.tokens)
        else:
            frame.items.extend(item for item, _ in batch)
        return ppb.InferReply(frame=self.provider.change_frame(frame))

    def _logprobs(self, token: int, count: int) -> ppb.TokenLogprobs:
        """The token itself is the likeliest, its neighbours follow."""
        found = ppb.TokenLogprobs(token=token, logprob=-0.5)
        found.top.extend((token + i) % 320 for i in range(count))
        found.top_logprobs.extend(-0.5 if i == 0 else -2.0 - i for i in range(count))
        self.provider.change_logprobs(found)
        return found


# --- scheduler -----------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    spec: JobSpec
    constraints: pb.Constraints
    leases: list[pb.SignedLease]
    offers: list[pb.SignedOffer]
    excluded: set[Address]
    spent: int = 0
    prefix_units: int = 0
    prefix_hash: Hash = ZERO_HASH


class FakeScheduler(mgrpc.MarketServicer):
    """A scheduler: takes the first provider that fits, in the order they joined."""

    def __init__(self, chain: MemoryChain, window: int = 8, name: str = "scheduler") -> None:
        self.name, self.key = name, LocalKey(keccak256(b"sdk " + name.encode()))
        self.chain, self.window = chain, window
        self.providers: list[FakeProvider] = []
        self.guard = CallGuard(DOMAIN, self.key.address, SystemClock())
        self.jobs: dict[bytes, Job] = {}
        self.vouchers: dict[bytes, int] = {}
        self.newest: dict[bytes, pb.SignedVoucher] = {}
        self.came: list[int] = []
        """Vouchers' amounts in the order in which orders brought them."""
        self.used: dict[bytes, int] = {}
        self.reports: list[mpb.ReportRequest] = []
        self.retries: list[mpb.RetryRequest] = []
        self.matched: list[JobSpec] = []
        self.change_lease: Callable[[Lease], Lease] = lambda lease: lease
        self.change_offer: Callable[[pb.SignedOffer], pb.SignedOffer] = lambda offer: offer
        self.break_streams_before_answer = 0

    async def Info(self, request: mpb.InfoRequest, context: Any) -> mpb.SchedulerInfo:
        return mpb.SchedulerInfo(
            address=self.key.address,
            chain_id=CHAIN_ID,
            registry=DOMAIN.contract,
            channels=CHANNELS_DOMAIN.contract,
            fee_ppm=FEE_PPM,
            check_seconds=60,
            max_job_seconds=3_600,
            window_units=self.window,
            channel_margin_seconds=60,
        )

    async def Match(self, requests: AsyncIterator[mpb.MatchRequest], context: Any) -> AsyncIterator[mpb.MatchReply]:
        async for request in requests:
            reply = await self._answer(request)
            if self.break_streams_before_answer:
                self.break_streams_before_answer -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
            reply.id = request.id
            yield reply

    async def _answer(self, request: mpb.MatchRequest) -> mpb.MatchReply:
        try:
            spec, constraints = open_order(DOMAIN, request.order, check_signature=not request.quote)
            chosen = self._choose(spec, constraints, set())
            if chosen is None:
                count = mpb.FilterCount(filter="model", removed=len(self.providers), example="not on sale")
                return mpb.MatchReply(no_match=mpb.NoMatch(considered=len(self.providers), removed=[count]))
            if request.quote:
                return mpb.MatchReply(quote=self._quote(spec, chosen))
            self.matched.append(spec)
            if spec.key not in self.jobs:
                self._take_voucher(spec, request)
                self.jobs[spec.key] = Job(spec, constraints, [], [], set())
                self._lease(self.jobs[spec.key], chosen, Hash(request.client_channel))
            return mpb.MatchReply(granted=self._granted(self.jobs[spec.key]))
        except GpumarketError as error:
            return mpb.MatchReply(problem=mpb.Problem(code=error.code, message=error.message, hint=error.hint, retryable=error.retryable))

    def _take_voucher(self, spec: JobSpec, request: mpb.MatchRequest) -> None:
        channel = bytes(request.client_channel)
        entry = self.chain.channels[Hash(channel)]
        if request.HasField("voucher"):
            voucher = from_proto(Voucher, request.voucher.voucher)
            verify_voucher(CHANNELS_DOMAIN, voucher.channel, voucher.cumulative, request.voucher.signature, entry.payer)
            if voucher.cumulative > entry.deposit:
                raise FundsError("a voucher above the deposit")
            self.came.append(voucher.cumulative)
            if voucher.cumulative > self.vouchers.get(channel, 0):  # else one sent again, or overtaken on the way: not taken, as by ours
                self.vouchers[channel] = voucher.cumulative
                self.newest[channel] = request.voucher
        free = self.vouchers.get(channel, 0) - self.used.get(channel, 0) - self._open(channel)
        if free < spec.max_amount:
            raise OutOfFunds(f"the voucher covers {free}, the job needs {spec.max_amount}")

    def _open(self, channel: bytes) -> int:
        """This scheduler settles nothing by itself: every job holds its maximum until `settle`."""
        return sum(job.spec.max_amount for job in self.jobs.values() if job.leases and job.leases[-1].lease.client_channel == channel)

    def settle(self, used: int) -> None:
        """As if all claims had come: jobs hold nothing any more."""
        channel = next(iter(self.vouchers))
        self.used[channel] = used
        self.jobs.clear()

    def _choose(self, spec: JobSpec, constraints: pb.Constraints, excluded: set[Address]) -> FakeProvider | None:
        for provider in self.providers:
            address = provider.key.address
            if spec.model not in {m.digest for m in provider.models} or address in excluded:
                continue
            if constraints.require_provider and constraints.require_provider != address:
                continue
            if address in constraints.exclude_providers or provider.owner_address in constraints.exclude_owners:
                continue
            return provider
        return None

    def _quote(self, spec: JobSpec, provider: FakeProvider) -> mpb.Quote:
        maximum = pricing.attempt_maximum(spec, provider.prompt_price, provider.output_price, FEE_PPM, spent=0, prefix_units=0)
        return mpb.Quote(
            provider=provider.key.address,
            prompt_price_per_mtok=money_bytes(provider.prompt_price),
            output_price_per_mtok=money_bytes(provider.output_price),
            fee_ppm=FEE_PPM,
            maximum=money_bytes(pricing.client_amount(maximum, FEE_PPM)),
        )

    def _lease(self, job: Job, provider: FakeProvider, channel: Hash) -> None:
        spec = job.spec
        maximum = pricing.attempt_maximum(
            spec, provider.prompt_price, provider.output_price, FEE_PPM, spent=job.spent, prefix_units=job.prefix_units
        )
        lease = Lease(
            job=spec.key,
            spec=spec.struct_hash,
            attempt=len(job.leases) + 1,
            client=spec.client,
            scheduler=self.key.address,
            provider=provider.key.address,
            model=spec.model,
            task=spec.task,
            prompt_price_per_mtok=Money(provider.prompt_price),
            output_price_per_mtok=Money(provider.output_price),
            maximum=maximum,
            fee_ppm=FEE_PPM,
            client_channel=channel,
            provider_channel=Hash(b"\x07" * 32),
            profile=spec.profile,
            window_units=self.window,
            prefix_units=job.prefix_units,
            prefix_hash=job.prefix_hash,
            issued_at=SystemClock().now(),
            deadline=spec.deadline,
        )
        job.leases.append(signed_lease(self.key, DOMAIN, self.change_lease(lease)))
        job.offers.append(self.change_offer(provider.offer))
        job.excluded.add(provider.key.address)

    def _granted(self, job: Job) -> mpb.Granted:
        return mpb.Granted(lease=job.leases[-1], offer=job.offers[-1], account=self._account(job.leases[-1].lease.client_channel))

    def _account(self, channel: bytes) -> mpb.Account:
        return mpb.Account(
            channel=channel,
            deposit=money_bytes(self.chain.channels[Hash(channel)].deposit),
            voucher=money_bytes(self.vouchers.get(channel, 0)),
            used=money_bytes(self.used.get(channel, 0)),
            open=money_bytes(self._open(channel)),
            newest=self.newest.get(channel),
        )

    async def Retry(self, call: pb.SignedCall, context: Any) -> mpb.MatchReply:
        _, request = self.guard.open("Market/Retry", call, mpb.RetryRequest)
        self.retries.append(request)
        job = self.jobs[request.job]
        if request.reason == "client-left":
            return mpb.MatchReply(granted=self._granted(self.jobs.pop(request.job)))
        if len(job.leases) == request.attempt:
            lease = from_proto(Lease, job.leases[-1].lease)
            if request.HasField("last_ack"):
                ack = open_ack(DOMAIN, request.last_ack, lease.client)
                assert ack.lease == lease.struct_hash
                amount = pricing.attempt_amount(lease, prompt_units=job.spec.prompt_units, units=ack.units, complete=False)
                job.spent += pricing.client_amount(amount, FEE_PPM)
                job.prefix_units, job.prefix_hash = lease.prefix_units + ack.units, ack.output_hash
            if request.reason == "client-restart":
                job.excluded.clear()
            chosen = self._choose(job.spec, job.constraints, job.excluded)
            if chosen is None:
                return mpb.MatchReply(no_match=mpb.NoMatch(considered=len(self.providers)))
            self._lease(job, chosen, lease.client_channel)
        return mpb.MatchReply(granted=self._granted(job))

    async def Report(self, call: pb.SignedCall, context: Any) -> mpb.JobStatus:
        _, request = self.guard.open("Market/Report", call, mpb.ReportRequest)
        self.reports.append(request)
        state = "completed"
        if request.verdict == mpb.VERDICT_REJECTED:
            subject, *checks = (open_evidence(DOMAIN, o) for o in (request.subject, *request.checks))
            owners = {p.key.address: p.owner_address for p in self.providers}
            decision = judge(profile_by_digest(subject.lease.profile), subject, checks, list(request.drawn), owners.__getitem__)
            state = decision.verdict.name.lower()
        return mpb.JobStatus(job=request.job, state=state)

    async def GetAccount(self, call: pb.SignedCall, context: Any) -> mpb.Account:
        _, request = self.guard.open("Market/GetAccount", call, mpb.AccountRequest)
        return self._account(request.channel)

    async def CloseChannel(self, call: pb.SignedCall, context: Any) -> pb.SignedClose:
        _, request = self.guard.open("Market/CloseChannel", call, mpb.AccountRequest)
        used = self.used.get(request.channel, 0)
        signature = sign_close(self.key, CHANNELS_DOMAIN, Hash(request.channel), used)
        return pb.SignedClose(channel=request.channel, cumulative=money_bytes(used), signature=signature)

    async def WatchOffers(self, request: mpb.WatchRequest, context: Any) -> AsyncIterator[mpb.OfferEvent]:
        for revision, provider in enumerate(self.providers, 1):
            if not request.model or request.model in {m.digest for m in provider.models}:
                yield mpb.OfferEvent(revision=revision, offer=provider.offer, reputation_ppm=500_000, proven_mflops=1_234)
        yield mpb.OfferEvent(revision=len(self.providers), synced=True)
        await asyncio.Event().wait()

    async def Claim(self, call: pb.SignedCall, context: Any) -> mpb.ClaimReply:
        await rpc.abort(context, GpumarketError("nobody bills here"))

    async def Heartbeat(self, requests: Any, context: Any) -> AsyncIterator[mpb.HeartbeatDown]:
        await rpc.abort(context, GpumarketError("providers are listed by hand here"))
        yield mpb.HeartbeatDown()

    async def GetJob(self, call: pb.SignedCall, context: Any) -> mpb.JobStatus:
        await rpc.abort(context, GpumarketError("no job is kept here"))

    async def Deposit(self, voucher: pb.SignedVoucher, context: Any) -> mpb.Account:
        await rpc.abort(context, GpumarketError("vouchers come with orders here"))

    async def Explain(self, order: pb.JobOrder, context: Any) -> mpb.Explanation:
        open_order(DOMAIN, order, check_signature=False)
        assert not order.signature, "a signed order is nothing to hand out with a question"
        return mpb.Explanation(considered=len(self.providers))


# --- all together --------------------------------------------------------------------------------------------------------------


@dataclass
class FakeMarket:
    chain: MemoryChain
    scheduler: FakeScheduler
    folder: Path
    servers: list[grpc.aio.Server] = field(default_factory=list)
    served: dict[str, grpc.aio.Server] = field(default_factory=dict)
    """Servers by their endpoint."""

    async def add(self, provider: FakeProvider) -> FakeProvider:
        provider.endpoint, provider.tls_key_hash = await self._serve(
            provider.name, lambda server: pgrpc.add_ProviderServicer_to_server(provider, server)
        )
        self.scheduler.providers.append(provider)
        address = provider.key.address
        self.chain.nodes[address] = Node(address, provider.owner_address, 1, 10 * TOKEN, provider.tls_key_hash, provider.endpoint)
        return provider

    async def start(self, scheduler: FakeScheduler | None = None, stake: int = 100 * TOKEN) -> None:
        """Serve a scheduler (None: the market's own), and register where."""
        served = scheduler or self.scheduler
        endpoint, key_hash = await self._serve(served.name, lambda server: mgrpc.add_MarketServicer_to_server(served, server))
        self.chain.nodes[served.key.address] = Node(served.key.address, served.key.address, 2, stake, key_hash, endpoint)

    async def another(self, stake: int = 50 * TOKEN) -> FakeScheduler:
        """A second scheduler, of a smaller stake, to which the same providers belong."""
        second = FakeScheduler(self.chain, self.scheduler.window, "second scheduler")
        second.providers = self.scheduler.providers
        await self.start(second, stake)
        return second

    async def stop(self, scheduler: FakeScheduler) -> None:
        """As if it died: its server is gone, its registration stays."""
        port = self.chain.nodes[scheduler.key.address].endpoint
        await self.served[port].stop(None)

    async def _serve(self, name: str, add: Callable[[grpc.aio.Server], None]) -> tuple[str, Hash]:
        identity = rpc.load_identity(self.folder / name)
        server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
        add(server)
        port = server.add_secure_port("127.0.0.1:0", identity.credentials())
        await server.start()
        self.servers.append(server)
        self.served[f"127.0.0.1:{port}"] = server
        return f"127.0.0.1:{port}", identity.key_hash


@asynccontextmanager
async def fake_market(folder: Path, *providers: FakeProvider, window: int = 8) -> AsyncIterator[FakeMarket]:
    chain = MemoryChain()
    market = FakeMarket(chain, FakeScheduler(chain, window), folder)
    await market.start()
    for provider in providers:
        await market.add(provider)
    try:
        yield market
    finally:
        await asyncio.gather(*(server.stop(None) for server in market.servers))

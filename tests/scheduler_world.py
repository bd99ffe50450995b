"""A scheduler over real TLS and a real journal, on a chain that is filled in by hand; a scripted provider and client beside it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from gpumarket.core.codec import open_lease, signed_ack, signed_call, signed_offer, signed_order, signed_receipt, voucher_proto
from gpumarket.core.ports import SystemRandom
from gpumarket.core.rpc import SERVER_OPTIONS, ServerIdentity, load_identity, open_channel
from gpumarket.core.signing import Domain, LocalKey, channels_domain, market_domain
from gpumarket.core.terms import Ack, JobSpec, Lease, Outcome, Receipt, Task, Voucher, keccak256, output_chain, request_hash
from gpumarket.core.units import Address, Hash, Money, money_bytes
from gpumarket.scheduler.market import Market, World
from gpumarket.scheduler.settings import SchedulerSettings
from gpumarket.scheduler.tables import metadata
from gpumarket.settlement import gpu_proof
from gpumarket.settlement.chain.view import PROVIDER, ChainView, ChannelChanged, ChannelOnChain, NodeChanged, NodeOnChain
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.verification.profiles import EMBED_FP32
from gpumarket.settlement.vouchers import sign_voucher
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import market_pb2_grpc, provider_pb2, provider_pb2_grpc
from gpumarket.v1 import terms_pb2 as terms

TOKEN = 10**18
DOMAIN: Domain = market_domain(31337, Address(b"\x01" * 20))
CHANNELS: Domain = channels_domain(31337, Address(b"\x02" * 20))
MODEL = Hash(keccak256(b"a model"))
PROFILE = EMBED_FP32.digest
PRICE = 10 * TOKEN  # per million units: a unit costs 10^13


def key(name: str) -> LocalKey:
    return LocalKey(hashlib.sha256(name.encode()).digest())


@dataclass
class HandClock:
    """Both clocks, moved by hand."""

    at: int = 1_800_000_000
    mono: float = 1_000.0

    def now(self) -> int:
        return self.at

    def monotonic(self) -> float:
        return self.mono

    def pass_seconds(self, seconds: int) -> None:
        self.at += seconds
        self.mono += seconds


@dataclass
class HandChain:
    """The chain: a view, and actions that write to it at once."""

    me: Address
    clock: HandClock
    view: ChainView = field(default_factory=ChainView)
    opened: list[str] = field(default_factory=list)
    fail: Exception | None = None

    async def open_channel(
        self, payee: Address, amount: int, expires_at: int, signer: Address | None = None, *, label: str | None = None
    ) -> Hash:
        if self.fail is not None:
            raise self.fail
        assert label is not None
        channel = Hash(keccak256(label.encode()))
        if label not in self.opened:
            self.opened.append(label)
            self.put_channel(ChannelOnChain(channel, self.me, payee, self.me, amount, 0, expires_at))
        return channel

    async def top_up(self, channel: Hash, amount: int, expires_at: int) -> object:
        old = self.view.channels[channel]
        self.put_channel(ChannelOnChain(channel, old.payer, old.payee, old.signer, old.deposit + amount, old.claimed, expires_at))
        return None

    def put_channel(self, channel: ChannelOnChain) -> None:
        self.view.channels[channel.id] = channel
        self.view.publish(ChannelChanged(channel.id))

    def put_node(self, node: NodeOnChain) -> None:
        self.view.nodes[node.operator] = node
        self.view.publish(NodeChanged(node.operator))

    def hub(self, client: LocalKey, deposit: int = 100 * TOKEN, seconds: int = 10**7) -> Hash:
        """A client's channel to the scheduler."""
        channel = Hash(keccak256(b"hub" + client.address))
        self.put_channel(ChannelOnChain(channel, client.address, self.me, client.address, deposit, 0, self.clock.now() + seconds))
        return channel


def settings(state: Path, **changes: Any) -> SchedulerSettings:
    quick = {"cpu_challenge_size": 64, "cpu_challenge_repeats": 1, "cpu_floor_mflops": 0, "drain_seconds": 0.1}
    return SchedulerSettings(state=state, **(quick | changes))


@asynccontextmanager
async def running(state: Path, chain: HandChain, clock: HandClock, **changes: Any) -> AsyncIterator[Market]:
    """A scheduler that serves until the block ends; the same state folder continues its ledger."""
    os.makedirs(state, exist_ok=True)
    options = settings(state, **changes)
    journal = Journal(options.database_url, metadata)
    journal.open()
    chain.view._subscribers.clear()
    world = World(SCHEDULER, DOMAIN, CHANNELS, chain.view, journal, chain, clock, SystemRandom())
    market = Market(options, world)
    market.open()
    await market.listen(load_identity(state))
    try:
        yield market
    finally:
        await market.close()
        await journal.close()


SCHEDULER = key("scheduler")


class ScriptedProvider(provider_pb2_grpc.ProviderServicer):
    """Answers GPU challenges; sends heartbeats when told to."""

    def __init__(self, name: str, folder: Path, *, honest_gpu: bool = True, owner: Address | None = None) -> None:
        self.key = key(name)
        self.owner = owner or key(name + " owner").address
        self.identity: ServerIdentity = load_identity(folder / name)
        self.honest_gpu = honest_gpu
        self.endpoint = ""
        self.sequence = 0
        self.held: list[terms.SignedVoucher] = []
        self.seeds: list[bytes] = []
        self.call: Any = None
        self._server: grpc.aio.Server | None = None
        self._channel: grpc.aio.Channel | None = None

    @property
    def address(self) -> Address:
        return self.key.address

    async def ProveGpu(self, request_iterator: Any, context: Any) -> Any:  # type: ignore[override]
        first = (await context.read()).seed
        self.seeds.append(first.seed)
        kept = gpu_proof.products(first.seed, first.size, first.repeats, first.keep)
        rows = kept[first.repeats]
        if not self.honest_gpu:
            rows = rows * 1.01
        root, tree = gpu_proof.commit(rows)
        await context.write(provider_pb2.GpuAnswer(commitment=provider_pb2.GpuCommitment(root=root, gpu_class="CPU")))
        while (message := await context.read()).HasField("read"):
            read = [kept[link][row].tobytes() for link, row in zip(message.read.links, message.read.rows, strict=True)]
            await context.write(provider_pb2.GpuAnswer(kept=provider_pb2.GpuKept(rows=read)))
        opening = message.opening
        opened = [
            provider_pb2.GpuRow(index=r.index, values=r.values, path=r.path) for r in gpu_proof.open_rows(rows, tree, list(opening.rows))
        ]
        answer = gpu_proof.answer(rows, opening.vector_seed)
        await context.write(provider_pb2.GpuAnswer(proof=provider_pb2.GpuProof(product=answer, rows=opened)))

    async def start(self, chain: HandChain, stake: int = 100 * TOKEN) -> None:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        provider_pb2_grpc.add_ProviderServicer_to_server(self, self._server)
        port = self._server.add_secure_port("127.0.0.1:0", self.identity.credentials())
        await self._server.start()
        self.endpoint = f"127.0.0.1:{port}"
        chain.put_node(NodeOnChain(self.address, self.owner, PROVIDER, stake, tls_key_hash=self.identity.key_hash, endpoint=self.endpoint))

    async def Infer(self, request_iterator: Any, context: Any) -> Any:  # type: ignore[override]
        raise AssertionError("the scheduler never infers")

    async def GetReceipt(self, request: Any, context: Any) -> Any:
        raise AssertionError("the scheduler asks for no receipts")

    async def GetManifest(self, request: Any, context: Any) -> Any:
        raise AssertionError("the scheduler reads no manifests")

    async def TakeEvidence(self, request: Any, context: Any) -> Any:
        raise AssertionError("the scheduler shows no evidence")

    async def GetBlob(self, request: Any, context: Any) -> Any:  # type: ignore[override]
        raise AssertionError("the scheduler reads no blobs")

    def offer(
        self, clock: HandClock, *, price: int = PRICE, model: Hash = MODEL, seconds: int = 10**6, text: bool = False
    ) -> terms.SignedOffer:
        self.sequence += 1
        sale = terms.ModelOffer(
            model=model,
            name="m",
            task=terms.TASK_GENERATE if text else terms.TASK_EMBED,
            prompt_price_per_mtok=money_bytes(price),
            profile=PROFILE,
            max_input_tokens=512,
        )
        body = terms.OfferBody(
            provider=self.address,
            endpoint=self.endpoint,
            tls_key_hash=self.identity.key_hash,
            gpus=[terms.GpuClaim(gpu_class="CPU", vram_bytes=2**30)],
            models=[sale],
            sequence=self.sequence,
            expires_at=clock.now() + seconds,
            checks=True,
            capacity=8,
        )
        return signed_offer(self.key, DOMAIN, body)

    async def greet(self, market: Market, clock: HandClock, *, beats: bool = True, **changes: Any) -> None:
        """Hello and one load, then down messages until jobs may come."""
        self._channel = await open_channel(market.endpoint, load_identity(market.settings.state).key_hash)
        await self.say_hello(clock, beats=beats, **changes)

    async def say_hello(self, clock: HandClock, *, beats: bool = True, **changes: Any) -> None:
        """A heartbeat stream on the connection that there is. Without `beats` for a hello that will be refused: a message that is written
        as the refusal comes in may take its place (grpc.aio: INTERNAL, "Internal error from Core")."""
        assert self._channel is not None
        stub = market_pb2_grpc.MarketStub(self._channel)
        self.call = stub.Heartbeat()  # type: ignore[call-arg]
        hello = signed_call(
            self.key,
            DOMAIN,
            "Market/Heartbeat",
            self.offer(clock, **changes),
            SCHEDULER.address,
            clock.now(),
            Hash(SystemRandom().token(32)),
        )
        await self.call.write(pb.HeartbeatUp(hello=hello))
        if not beats:
            return
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # a refused hello ends the stream: `told` meets it
            if self.held:
                await self.call.write(pb.HeartbeatUp(held=pb.Holdings(vouchers=self.held)))
            await self.beat()

    async def beat(self, free: int = 8) -> None:
        await self.call.write(pb.HeartbeatUp(load=pb.Load(free=free, warm=[MODEL])))

    async def told(self, wanted: Any) -> pb.HeartbeatDown:
        """Down messages until one that `wanted` likes."""
        while True:
            down = await self.call.read()
            assert isinstance(down, pb.HeartbeatDown), "the scheduler ended the heartbeat"
            if wanted(down):
                return down

    async def ready(self, market: Market, clock: HandClock, **changes: Any) -> None:
        await self.greet(market, clock, **changes)
        await self.told(lambda down: not down.notice and down.channel)

    async def stop(self) -> None:
        if self.call is not None:
            self.call.cancel()
        if self._channel is not None:
            await self._channel.close(None)
        if self._server is not None:
            await self._server.stop(None)


@dataclass
class Bought:
    """A job as its client knows it."""

    spec: JobSpec
    order: terms.JobOrder
    request: bytes
    salt: bytes
    lease: Lease | None = None
    signed_lease: terms.SignedLease | None = None
    receipt: terms.SignedReceipt | None = None
    output: list[bytes] = field(default_factory=list)

    @property
    def hash(self) -> Hash:
        assert self.lease is not None
        return self.lease.struct_hash

    def opening(self) -> pb.Opening:
        return pb.Opening(
            lease=self.signed_lease, order=self.order, receipt=self.receipt, request=self.request, salt=self.salt, output=self.output
        )


class ScriptedClient:
    """Signs orders, vouchers, acks and reports."""

    def __init__(self, name: str, channel: Hash, clock: HandClock) -> None:
        self.key, self.channel, self.clock = key(name), channel, clock
        self.paid = 0
        self._jobs = 0
        self._grpc: grpc.aio.Channel | None = None
        self.stub: Any = None

    async def connect(self, market: Market) -> None:
        await self.close()
        self._grpc = await open_channel(market.endpoint, load_identity(market.settings.state).key_hash)
        self.stub = market_pb2_grpc.MarketStub(self._grpc)

    async def close(self) -> None:
        if self._grpc is not None:
            await self._grpc.close(None)

    def voucher(self, add: int) -> terms.SignedVoucher:
        self.paid += add
        signature = sign_voucher(self.key, CHANNELS, self.channel, self.paid)
        return voucher_proto(Voucher(self.channel, Money(self.paid)), signature)

    def job(
        self,
        *,
        inputs: list[list[int]] | None = None,
        check_of: terms.EmbedRequest | None = None,
        max_amount: int = TOKEN,
        constraints: terms.Constraints | None = None,
        **changes: Any,
    ) -> Bought:
        self._jobs += 1
        if check_of is not None:
            body: Any = terms.CheckRequest(embed=check_of)
            units = sum(len(i.ids) for i in check_of.inputs)
        else:
            body = terms.EmbedRequest(inputs=[terms.TokenList(ids=i) for i in (inputs or [[1, 2, 3], [4, 5], [6]])])
            units = sum(len(i.ids) for i in body.inputs)
        request, salt = body.SerializeToString(), hashlib.sha256(b"salt%d" % self._jobs).digest()
        raw = (constraints or terms.Constraints()).SerializeToString(deterministic=True)
        values: dict[str, Any] = {
            "client": self.key.address,
            "scheduler": SCHEDULER.address,
            "job_id": Hash(keccak256(self.key.address + b"%d" % self._jobs)),
            "task": Task.CHECK if check_of is not None else Task.EMBED,
            "model": MODEL,
            "request_hash": request_hash(salt, request),
            "prompt_units": units,
            "max_output_units": units,
            "max_amount": Money(max_amount),
            "constraints_hash": keccak256(raw),
            "profile": PROFILE,
            "deadline": self.clock.now() + 600,
        }
        spec = JobSpec(**(values | changes))
        return Bought(spec, signed_order(self.key, DOMAIN, spec, raw), request, salt)

    async def match(self, job: Bought, *, pay: int = 0, **changes: Any) -> pb.MatchReply:
        """One order on a stream of its own."""
        request = pb.MatchRequest(id=7, order=job.order, client_channel=self.channel, **changes)
        if pay:
            request.voucher.CopyFrom(self.voucher(pay))
        call = self.stub.Match()
        await call.write(request)
        await call.done_writing()
        reply: pb.MatchReply = await call.read()
        assert reply.id == 7
        self.note(job, reply)
        return reply

    def note(self, job: Bought, reply: pb.MatchReply) -> None:
        if reply.HasField("granted"):
            job.signed_lease = reply.granted.lease
            job.lease = open_lease(DOMAIN, reply.granted.lease)

    def ack(
        self, job: Bought, units: int, *, complete: bool = False, will_check: bool = False, items: int | None = None
    ) -> terms.SignedAck:
        chain = output_chain(job.output[:items])
        return signed_ack(self.key, DOMAIN, Ack(job.hash, units, chain, complete, will_check))

    def call(self, method: str, body: Any) -> terms.SignedCall:
        return signed_call(self.key, DOMAIN, method, body, SCHEDULER.address, self.clock.now(), Hash(SystemRandom().token(32)))

    async def retry(self, job: Bought, attempt: int, reason: str, ack: terms.SignedAck | None = None) -> pb.MatchReply:
        body = pb.RetryRequest(job=job.spec.key, attempt=attempt, reason=reason, last_ack=ack)
        reply: pb.MatchReply = await self.stub.Retry(self.call("Market/Retry", body))
        self.note(job, reply)
        return reply

    async def report(self, job: Bought, verdict: int, checks: list[Bought] | None = None) -> pb.JobStatus:
        assert job.lease is not None
        body = pb.ReportRequest(job=job.spec.key, attempt=job.lease.attempt, verdict=pb.Verdict.ValueType(verdict))
        if checks is not None:
            body.subject.CopyFrom(job.opening())
            body.checks.extend(check.opening() for check in checks)
        status: pb.JobStatus = await self.stub.Report(self.call("Market/Report", body))
        return status

    async def account(self) -> pb.Account:
        account: pb.Account = await self.stub.GetAccount(self.call("Market/GetAccount", pb.AccountRequest(channel=self.channel)))
        return account


def deliver(
    provider: LocalKey, job: Bought, output: list[bytes], *, units: int | None = None, outcome: Outcome = Outcome.COMPLETED
) -> None:
    """The provider's receipt over an output."""
    assert job.lease is not None
    job.output = output
    done = job.spec.prompt_units - job.lease.prefix_units if units is None else units
    receipt = Receipt(
        lease=job.hash,
        nonce=Hash(keccak256(b"nonce" + job.hash)),
        request_hash=job.spec.request_hash,
        output_hash=output_chain(output),
        prefix_units=job.lease.prefix_units,
        prefix_hash=job.lease.prefix_hash,
        prompt_units=job.spec.prompt_units,
        output_units=done,
        outcome=outcome,
        finished_at=1,
    )
    job.receipt = signed_receipt(provider, DOMAIN, receipt)


def claim_call(
    provider: LocalKey, clock: HandClock, job: Bought, ack: terms.SignedAck | None, held: terms.SignedVoucher | None = None
) -> terms.SignedCall:
    body = pb.ClaimRequest(lease=job.signed_lease, receipt=job.receipt, last_ack=ack, held=held)
    return signed_call(provider, DOMAIN, "Market/Claim", body, SCHEDULER.address, clock.now(), Hash(SystemRandom().token(32)))

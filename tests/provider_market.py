"""A provider over real TLS with a chain view in memory, and a scripted client and scheduler that talk to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
from node_fixtures import CHAIN_ID, CHANNEL, DOMAIN, PROVIDER, SCHEDULER, Channel, Job, Node, ScriptedEngine, text_hash

from gpumarket.core.codec import CallGuard, from_proto, open_offer, open_receipt, voucher_proto
from gpumarket.core.errors import GpumarketError
from gpumarket.core.ports import SystemClock, SystemRandom
from gpumarket.core.rpc import ServerIdentity, abort, from_rpc, load_identity, open_channel
from gpumarket.core.signing import channels_domain
from gpumarket.core.terms import Ack, Lease, Receipt, Task, Voucher
from gpumarket.core.units import Address, Hash, Money, money_bytes
from gpumarket.node.admission import OnSale
from gpumarket.node.inventory import Gpu, Inventory
from gpumarket.node.provider import Provider, Stock, Surroundings
from gpumarket.node.settings import ProviderSettings
from gpumarket.node.tables import metadata
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.pricing import attempt_amount, counts_as_complete
from gpumarket.settlement.vouchers import sign_voucher
from gpumarket.v1 import market_pb2 as market
from gpumarket.v1 import provider_pb2 as pb
from gpumarket.v1 import terms_pb2 as terms
from gpumarket.v1.market_pb2_grpc import MarketServicer, add_MarketServicer_to_server
from gpumarket.v1.provider_pb2_grpc import ProviderStub

if TYPE_CHECKING:
    from gpumarket.v1.provider_pb2_grpc import ProviderAsyncStub

CHANNELS = channels_domain(CHAIN_ID, Address(b"\x22" * 20))
CPU = Inventory((Gpu(-1, "CPU", "", 1 << 30, 0),), ())
PATIENCE_SECONDS = 60.0
"""How long a test waits for what must happen: far more than it takes, on a loaded machine too."""


@dataclass
class View:
    channels: dict[Hash, Any] = field(default_factory=dict)
    nodes: dict[Address, Any] = field(default_factory=dict)
    trouble: str = ""


@dataclass
class Running:
    """A provider that serves."""

    provider: Provider
    stub: ProviderAsyncStub
    journal: Journal
    view: View
    engines: dict[str, ScriptedEngine]
    announced: list[bytes]

    def attempt(self, job: Job) -> Conversation:
        return Conversation(self, job)


class Conversation:
    """A client's side of one Infer."""

    def __init__(self, running: Running, job: Job) -> None:
        self.job, self._running = job, running
        self.call = running.stub.Infer()  # type: ignore[call-arg]
        self.nonce = b""
        self.tokens: list[int] = []
        self.items: list[bytes] = []
        self.units = 0
        self.finished: pb.Finished | None = None

    async def open(self, message: pb.InferOpen | None = None) -> Conversation:
        try:
            await self.call.write(pb.InferRequest(open=message or self.job.open()))
        except grpc.aio.AioRpcError as error:  # refused before it was written
            raise from_rpc(error, "the provider") from error
        reply = await self.read()
        assert reply is not None
        assert reply.WhichOneof("message") == "started"
        self.nonce = reply.started.nonce
        return self

    async def read(self) -> pb.InferReply | None:
        """The next reply, or None at the end. Raises the provider's error."""
        try:
            reply: Any = await asyncio.wait_for(self.call.read(), PATIENCE_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, "the provider") from error
        if not isinstance(reply, pb.InferReply):  # grpc.aio.EOF
            code = await self.call.code()
            if code is not grpc.StatusCode.OK:
                raise from_rpc(await self._error(), "the provider")
            return None
        if reply.HasField("frame"):
            self.tokens += reply.frame.tokens
            self.items += reply.frame.items
            self.units = reply.frame.units
        if reply.HasField("finished"):
            self.finished = reply.finished
        return reply

    async def _error(self) -> grpc.aio.AioRpcError:
        call = self.call
        return grpc.aio.AioRpcError(
            await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details(), ""
        )

    async def read_units(self, units: int) -> None:
        while self.units < units:
            assert await self.read() is not None

    async def read_finished(self) -> Receipt:
        """Read on to the receipt and open it."""
        while self.finished is None:
            assert await self.read() is not None
        return open_receipt(DOMAIN, self.finished.receipt, PROVIDER.address)

    async def ack(self, units: int | None = None, output_hash: Hash | None = None, **more: Any) -> None:
        """Acknowledge what came (GENERATE), or what a test says."""
        count = self.units if units is None else units
        said = output_hash or text_hash([*self.job.prefix, *self.tokens[:count]])
        await self.call.write(pb.InferRequest(ack=self.job.ack(count, said, **more)))

    async def end(self) -> None:
        await self.call.done_writing()
        while await self.read() is not None:
            pass


class FakeScheduler(MarketServicer):
    """Answers claims honestly, and hears heartbeats."""

    def __init__(self) -> None:
        self.guard = CallGuard(DOMAIN, SCHEDULER.address, SystemClock())
        self.claims: list[tuple[Receipt, Ack | None]] = []
        self.states: list[int] = []
        self.failures: list[GpumarketError] = []
        """Of the next claims, before any is taken."""
        """Answers to give, in order; OWED when there is none left."""
        self.billed: set[bytes] = set()
        self.vouchered = 0
        self.short = 0
        self.hellos: list[terms.OfferBody] = []
        self.loads: list[market.Load] = []
        self.offers: list[terms.OfferBody] = []
        self.down: asyncio.Queue[market.HeartbeatDown] = asyncio.Queue()

    async def Claim(self, request: terms.SignedCall, context: Any) -> market.ClaimReply:
        caller, body = self.guard.open("Market/Claim", request, market.ClaimRequest)
        assert caller == PROVIDER.address
        lease = from_proto(Lease, body.lease.lease)
        receipt = open_receipt(DOMAIN, body.receipt, PROVIDER.address)
        ack = from_proto(Ack, body.last_ack.ack) if body.HasField("last_ack") else None
        if self.failures:
            await abort(context, self.failures.pop(0))
        self.claims.append((receipt, ack))
        state = self.states.pop(0) if self.states else market.CLAIM_STATE_OWED
        reply = market.ClaimReply(state=market.ClaimState.ValueType(state))
        if state == market.CLAIM_STATE_OWED:
            complete = counts_as_complete(ack, receipt, lease.window_units)
            amount = attempt_amount(lease, prompt_units=receipt.prompt_units, units=ack.units if ack else 0, complete=complete)
            if lease.struct_hash not in self.billed:  # a claim made again is owed once
                self.billed.add(lease.struct_hash)
                self.vouchered += amount
            reply.amount = money_bytes(amount)
            reply.voucher.CopyFrom(voucher(self.vouchered - self.short))
        return reply

    async def Heartbeat(self, request_iterator: AsyncIterator[market.HeartbeatUp], context: Any) -> None:  # type: ignore[override]
        async def tell() -> None:
            while True:
                await context.write(await self.down.get())

        telling = asyncio.create_task(tell())
        try:
            async for message in request_iterator:
                match message.WhichOneof("message"):
                    case "hello":
                        _, signed = self.guard.open("Market/Heartbeat", message.hello, terms.SignedOffer)
                        self.hellos.append(open_offer(DOMAIN, signed))
                    case "load":
                        self.loads.append(message.load)
                    case "offer":
                        self.offers.append(open_offer(DOMAIN, message.offer))
        finally:
            telling.cancel()

    async def _none(self, request: Any, context: Any) -> Any:
        """What no provider calls."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not part of this scheduler")

    Info: Any = _none
    Match: Any = _none
    Retry: Any = _none
    Report: Any = _none
    WatchOffers: Any = _none
    Explain: Any = _none
    GetAccount: Any = _none
    GetJob: Any = _none
    Deposit: Any = _none
    CloseChannel: Any = _none


def voucher(cumulative: int, channel: Hash = CHANNEL) -> terms.SignedVoucher:
    return voucher_proto(Voucher(channel, Money(cumulative)), sign_voucher(SCHEDULER, CHANNELS, channel, cumulative))


@asynccontextmanager
async def scheduler_at(folder: Path) -> AsyncIterator[tuple[FakeScheduler, Node]]:
    """A scripted scheduler, with the entry that the registry would show."""
    identity = load_identity(folder)
    server = grpc.aio.server()
    fake = FakeScheduler()
    add_MarketServicer_to_server(fake, server)
    port = server.add_secure_port("127.0.0.1:0", identity.credentials())
    await server.start()
    try:
        yield fake, Node(endpoint=f"127.0.0.1:{port}", tls_key_hash=identity.key_hash)
    finally:
        await server.stop(0)


@asynccontextmanager
async def provider_at(
    folder: Path,
    *models: OnSale,
    scheduler: Node | None = None,
    factory: Callable[..., Any] | None = None,
    folders: dict[Hash, Path] | None = None,
    run: bool = False,
    **settings: Any,
) -> AsyncIterator[Running]:
    """A provider on `folder` (its journal and key live there), with scripted engines unless `factory` is given."""
    engines = {m.manifest.name: ScriptedEngine("embed" if m.manifest.task is Task.EMBED else "generate") for m in models}
    chosen = ProviderSettings(state=folder, **settings)
    identity: ServerIdentity = await asyncio.to_thread(load_identity, folder)
    journal = Journal(f"sqlite:///{folder}/journal.db", metadata)
    journal.open()
    view = View({CHANNEL: Channel(expires_at=int(time.time()) + 30 * 86_400)}, {SCHEDULER.address: scheduler or Node()})
    announced: list[bytes] = []

    async def announce(offer: bytes) -> None:
        announced.append(offer)

    given = Surroundings(
        signer=PROVIDER,
        domain=DOMAIN,
        channels_domain=CHANNELS,
        identity=identity,
        view=view,
        journal=journal,
        inventory=CPU,
        clock=SystemClock(),
        random=SystemRandom(),
        read_blob=lambda sha256, limit: b"{}\n",
        announce=announce,
        p2p_id="peer",
        on_journal_error=lambda error: None,
    )
    stock = [Stock(m, (folders or {}).get(m.manifest.digest, folder), False) for m in models]
    provider = Provider(chosen, stock, factory or (lambda manifest, path, slots: engines[manifest.name]), given)
    await provider.open()
    endpoint = await provider.listen()
    await provider.advertise()
    channel = await open_channel(endpoint, identity.key_hash)
    running = asyncio.create_task(provider.run()) if run else None
    try:
        yield Running(provider, ProviderStub(channel), journal, view, engines, announced)
    finally:
        await channel.close(None)
        if running is not None:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
        await provider.service.drain(0.5)
        await provider.close()
        await journal.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must become true."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110  conditions of all kinds, without an event of their own
            await asyncio.sleep(0.01)


async def refusal(conversation: Conversation, message: pb.InferOpen | None = None) -> GpumarketError:
    """The error that opening this attempt is answered with."""
    try:
        await conversation.open(message)
    except GpumarketError as error:
        return error
    raise AssertionError("the attempt was taken")

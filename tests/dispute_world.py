"""A chain with Disputes on it, a provider to accuse, and verifiers with real panel roles, each serving `TakeEvidence` over TLS.

Time passes when a test says so. What is scripted: the engine's numbers, whom of a panel a test makes hostile or silent, and the job itself,
which is signed by its parties as if it had run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
from dispute_kit import Deal
from eth_account import Account
from node_fixtures import ScriptedEngine, on_sale
from settlement_chain import account
from web3 import AsyncHTTPProvider, AsyncWeb3

from gpumarket.contracts.deploy import AddressBook, deploy
from gpumarket.core.codec import CallGuard
from gpumarket.core.errors import GpumarketError, Unreachable
from gpumarket.core.ports import SystemClock, SystemRandom
from gpumarket.core.rpc import SERVER_OPTIONS, abort, load_identity
from gpumarket.core.settings import ChainSettings
from gpumarket.core.signing import LocalKey
from gpumarket.core.terms import Task, keccak256
from gpumarket.core.units import Address, Hash
from gpumarket.node.engines import Engines, Seat
from gpumarket.node.panel.enrolment import Enrolment
from gpumarket.node.panel.judging import Judge
from gpumarket.node.panel.member import Panel
from gpumarket.node.panel.records import PanelRecords
from gpumarket.node.tables import metadata as provider_metadata
from gpumarket.sdk.challenging import Challenger
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.dispute_records import StoredDispute, add
from gpumarket.sdk.peers import Peers
from gpumarket.sdk.tables import METADATA as CLIENT_METADATA
from gpumarket.settlement.chain import Actions, Chain, Sender, connect
from gpumarket.settlement.chain.dispute_watch import DisputeWatch
from gpumarket.settlement.chain.disputes import DisputeActions
from gpumarket.settlement.disputes import Dispute, Stakes, nonce_commitment
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.verification import EMBED_FP32
from gpumarket.testnet.anvil import Anvil
from gpumarket.v1 import market_pb2 as mpb
from gpumarket.v1 import provider_pb2 as ppb
from gpumarket.v1 import provider_pb2_grpc as pgrpc
from gpumarket.v1 import terms_pb2 as pb

HOUR = 3_600
UNBONDING_SECONDS = 24 * HOUR
TOKEN = 10**18
STAKE = 1_000 * TOKEN
VERIFIERS = 6
VERIFIER_ROLE, PROVIDER_ROLE = 4, 1
MODEL = on_sale(Task.EMBED)
INPUTS = [[1, 2, 3], [4, 5], [6]]


def honest_rows(inputs: Sequence[Sequence[int]] = INPUTS) -> list[bytes]:
    """What ScriptedEngine computes."""
    return [np.array([len(ids), ids[0], 0.5], dtype="<f4").tobytes() for ids in inputs]


def cheap_rows(inputs: Sequence[Sequence[int]] = INPUTS) -> list[bytes]:
    """What a cheater delivers."""
    return [(np.frombuffer(row, dtype="<f4") + np.float32(0.01)).astype("<f4").tobytes() for row in honest_rows(inputs)]


@dataclass(frozen=True)
class DisputeChain:
    """An anvil that mines each transaction at once."""

    anvil: Anvil
    book: AddressBook
    settings: ChainSettings

    def pass_time(self, seconds: int) -> None:
        self.anvil.rpc("evm_increaseTime", max(0, seconds))
        self.anvil.rpc("evm_mine")

    def rich(self, key: LocalKey) -> LocalKey:
        self.anvil.rpc("anvil_setBalance", "0x" + key.address.hex(), hex(10**20))
        return key

    def now(self) -> int:
        return int(self.anvil.rpc("eth_getBlockByNumber", "latest", False)["timestamp"], 16)


@contextmanager
def dispute_chain(folder: Path) -> Any:
    with Anvil.start(block_time=None) as anvil:
        book = asyncio.run(_deploy(anvil.url))
        book.save(folder / "contracts.json")
        settings = ChainSettings(rpc_url=anvil.url, address_book=folder / "contracts.json", confirmations=0, poll_seconds=0.01)
        yield DisputeChain(anvil, book, settings)


async def _deploy(url: str) -> AddressBook:
    w3 = AsyncWeb3(AsyncHTTPProvider(url))
    try:
        return await deploy(w3, Account.from_key(account(0).secret), unbonding_delay_s=UNBONDING_SECONDS, close_window_s=60)
    finally:
        await w3.provider.disconnect()


class _Numbers(Judge):
    """A judge that a test can bend: `lie(place in the panel)` is revealed instead of what was computed."""

    def __init__(self, *args: Any, world: World, me: Address) -> None:
        super().__init__(*args)
        self.world, self.me = world, me
        self.judged = 0

    async def number(self, dispute: Dispute, evidence: bytes) -> int:
        self.judged += 1
        number = await super().number(dispute, evidence)
        lie = self.world.lies.get(place(dispute, self.me))
        return number if lie is None else lie


def place(dispute: Dispute, member: Address) -> int:
    """Index in the panel."""
    return [m.operator for m in dispute.members].index(member)


@dataclass
class Verifier:
    """A provider daemon's panel role."""

    key: LocalKey
    journal: Journal
    actions: Actions
    panel: Panel
    judge: _Numbers
    records: PanelRecords
    guard: CallGuard
    endpoint: str = ""
    deaf: Callable[[Hash], bool] = lambda _: False


class Server(pgrpc.ProviderServicer):
    """Provider.TakeEvidence of a verifier, and nothing else of the service."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier

    async def TakeEvidence(self, request: pb.SignedCall, context: Any) -> ppb.EvidenceTaken:
        verifier = self.verifier
        try:
            caller, body = verifier.guard.open("Provider/TakeEvidence", request, ppb.PanelEvidence)
            if verifier.deaf(Hash(body.dispute)):
                raise Unreachable("deaf in this test")
            await verifier.panel.take(caller, Hash(body.dispute), body.evidence)
        except GpumarketError as error:
            await abort(context, error)
        return ppb.EvidenceTaken()

    async def _none(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "a panel member only")

    Infer: Any = _none
    GetReceipt: Any = _none
    ProveGpu: Any = _none
    GetManifest: Any = _none
    GetBlob: Any = _none


@dataclass
class World:
    """Everybody."""

    local: DisputeChain
    chain: Chain
    folder: Path
    client: LocalKey
    client_actions: Actions
    client_journal: Journal
    scheduler: LocalKey
    provider: LocalKey
    verifiers: list[Verifier] = field(default_factory=list)
    lies: dict[int, int] = field(default_factory=dict)
    """Number revealed by the member at this place of a panel, whatever it computed."""
    silent: set[int] = field(default_factory=set)
    """Places of members that neither listen nor act."""
    deaf: set[int] = field(default_factory=set)
    """Places of members that evidence does not reach directly."""
    jobs: int = 0
    opening_request: bytes = b""

    def fresh(self) -> None:
        self.lies.clear()
        self.silent.clear()
        self.deaf.clear()

    # --- the challenger ----------------------------------------------------------------------------------------------------

    def opening(self, rows: Sequence[bytes], inputs: Sequence[Sequence[int]] = INPUTS) -> mpb.Opening:
        """A finished job of the accused provider."""
        self.jobs += 1
        deal = Deal(self.client, self.scheduler, self.provider, MODEL.manifest.digest, self.chain.market_domain, issued_at=self.local.now())
        return deal.embed(inputs, rows, name=b"job %d" % self.jobs)

    async def challenge(self, rows: Sequence[bytes], *, evidence: bytes | None = None) -> Challenger:
        """An opened dispute. `evidence`: what the challenger commits to, by default the opening."""
        opening = self.opening(rows)
        self.opening_request = opening.request
        raw = opening.SerializeToString(deterministic=True)
        port = self.port()
        key = _dispute_id(opening)
        stored = StoredDispute(Hash(keccak256(b"job %d" % self.jobs)), key, Hash(SystemRandom().token(32)), evidence or raw, "", 0)
        await self.client_journal.transact(lambda c: add(c, stored))
        commitment = nonce_commitment(key, self.client.address, stored.nonce)
        await port.actions.challenge(opening, EMBED_FP32, commitment, keccak256(stored.evidence))
        self.local.anvil.rpc("anvil_mine", hex(3))
        return self.challenger(stored)

    def challenger(self, stored: StoredDispute) -> Challenger:
        return Challenger(self.desk(), self.port(), stored)

    def port(self) -> Any:
        @dataclass
        class Port:
            actions: DisputeActions
            watch: DisputeWatch

        return Port(DisputeActions(self.chain, self.client_actions.sender), DisputeWatch(self.chain))

    def desk(self) -> Desk:
        @dataclass
        class Entry:
            endpoint: str
            tls_key_hash: Hash

        @dataclass
        class Registry:
            nodes: dict[Address, Any]
            market_domain: Any

        identity = load_identity(self.folder)
        nodes = {v.key.address: Entry(v.endpoint, identity.key_hash) for v in self.verifiers}
        parts: Any = dict.fromkeys(("settings", "account", "schedulers"))
        return Desk(
            **parts,
            signer=self.client,
            chain=Registry(nodes, self.chain.market_domain),  # type: ignore[arg-type]
            journal=self.client_journal,
            peers=Peers(),
            clock=SystemClock(),
            random=SystemRandom(),
        )

    # --- time --------------------------------------------------------------------------------------------------------------

    async def drive(self, challenger: Challenger | None, until: Callable[[Dispute], bool]) -> Dispute:
        """Let everybody act until the dispute is as wanted. Nothing here waits for the clock of this machine."""
        key = challenger.stored.dispute if challenger else None
        watch = DisputeWatch(self.chain)
        running = asyncio.create_task(challenger.run()) if challenger else None
        try:
            async with asyncio.timeout(120):
                while True:
                    await watch.sync()
                    dispute = watch.disputes.get(key) if key else max(watch.disputes.values(), key=lambda d: d.draw_block)
                    if dispute is not None and until(dispute):
                        if running is not None and dispute.state == 3:
                            await running
                        return dispute
                    if running is not None and running.done():
                        running.result()
                    await self.look(dispute)
                    await asyncio.sleep(0.01)
        finally:
            if running is not None:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    async def look(self, dispute: Dispute | None) -> None:
        """One round of every member that is not silent."""
        seats = {m.operator: index for index, m in enumerate(dispute.members)} if dispute is not None else {}
        for verifier in self.verifiers:
            index = seats.get(verifier.key.address, -1)
            verifier.deaf = lambda _, index=index: index in self.silent or index in self.deaf  # type: ignore[misc]
            if index not in self.silent:
                await verifier.panel.look()
        await asyncio.gather(*(v.panel.settled() for v in self.verifiers))

    async def quiet(self) -> None:
        """Until every member has gone home: fees withdrawn, keys erased."""
        async with asyncio.timeout(120):
            while True:
                await self.look(None)
                left = [await DisputeActions(self.chain, v.actions.sender).credited() for v in self.verifiers]
                if not any(left) and not any(v.records.secrets() for v in self.verifiers):
                    return

    async def restart(self, verifier: Verifier) -> None:
        """Throw a member's memory away, as a crash does: its journal and the chain are what is left."""
        await verifier.panel.close()
        again = await panel_role(self, verifier.key, verifier.journal, verifier.actions)
        verifier.panel, verifier.judge, verifier.records = again.panel, again.judge, again.records

    # --- money -------------------------------------------------------------------------------------------------------------

    def stakes(self, dispute: Dispute) -> Stakes:
        return Stakes(
            dispute.provider, dispute.challenger, self.client.address, dispute.amount, dispute.locked, dispute.bond, dispute.slashable
        )

    async def node(self, operator: Address) -> Any:
        return await self.chain.registry.functions.node(self.chain.w3.to_checksum_address(operator)).call()

    async def staked(self, operator: Address) -> int:
        names = [part["name"] for part in _components(self.chain.registry.abi, "node")]
        return int(dict(zip(names, await self.node(operator), strict=True))["stake"])

    async def tokens(self, operator: Address) -> int:
        return int(await self.client_actions.balance(operator))


def _components(abi: Any, function: str) -> Any:
    return next(e for e in abi if e["type"] == "function" and e["name"] == function)["outputs"][0]["components"]


def _dispute_id(opening: mpb.Opening) -> Hash:
    from gpumarket.core.codec import from_proto
    from gpumarket.core.terms import Lease

    return from_proto(Lease, opening.lease.lease).struct_hash


@asynccontextmanager
async def dispute_world(local: DisputeChain, folder: Path) -> AsyncIterator[World]:
    """Everybody registered, staked, enrolled and seasoned."""
    async with AsyncExitStack() as stack:
        chain = await connect(local.settings)
        stack.push_async_callback(chain.close)
        keys = [local.rich(LocalKey(keccak256(b"dispute %d" % n + str(folder).encode()))) for n in range(3 + VERIFIERS)]
        client, scheduler, provider, *verifiers = keys
        journal = _journal(folder / "client.db", CLIENT_METADATA)
        stack.push_async_callback(journal.close)
        actions = Actions(chain, Sender(chain, client, journal))
        await actions.faucet()
        world = World(local, chain, folder, client, actions, journal, scheduler, provider)
        provider_journal = _journal(folder / "accused.db", provider_metadata)
        stack.push_async_callback(provider_journal.close)
        await _register(Actions(chain, Sender(chain, provider, provider_journal)), PROVIDER_ROLE)
        world.verifiers += await asyncio.gather(*(_verifier(world, key, stack) for key in verifiers))
        local.pass_time(HOUR)  # two epochs at least: everybody is seasoned for leases from now on
        yield world


def _journal(path: Path, tables: Any) -> Journal:
    journal = Journal(f"sqlite:///{path}", tables)
    journal.open()
    return journal


async def _register(actions: Actions, roles: int, endpoint: str = "127.0.0.1:1") -> None:
    await actions.faucet()
    await actions.register_and_stake(roles, f"peer-{actions.sender.address.hex()}", Hash(keccak256(b"tls")), endpoint, STAKE)


async def _verifier(world: World, key: LocalKey, stack: AsyncExitStack) -> Verifier:
    journal = _journal(world.folder / f"verifier-{key.address.hex()}.db", provider_metadata)
    stack.push_async_callback(journal.close)
    actions = Actions(world.chain, Sender(world.chain, key, journal))
    await _register(actions, PROVIDER_ROLE | VERIFIER_ROLE)
    verifier = await panel_role(world, key, journal, actions)
    models = [MODEL.manifest.digest]
    await Enrolment(key.address, DisputeActions(world.chain, actions.sender), SystemRandom(), models).reconcile(models)
    identity = load_identity(world.folder)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    pgrpc.add_ProviderServicer_to_server(Server(verifier), server)
    verifier.endpoint = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', identity.credentials())}"
    await server.start()
    stack.push_async_callback(server.stop, 0)
    return verifier


async def panel_role(world: World, key: LocalKey, journal: Journal, actions: Actions) -> Verifier:
    """The role over a journal, as a start of the daemon makes it."""
    seat = Seat(MODEL, lambda: ScriptedEngine("embed"), 16, SystemClock())
    judge = _Numbers(world.chain.market_domain, Engines({MODEL.manifest.digest: seat}), world=world, me=key.address)
    records, chain = PanelRecords(journal), DisputeActions(world.chain, actions.sender)
    rules = (await chain.terms()).rules

    async def home() -> None: ...

    panel = Panel(
        key.address,
        DisputeWatch(world.chain),
        chain,
        judge,
        records,
        rules,
        SystemClock(),
        SystemRandom(),
        on_home=home,
        look_seconds=0.01,
    )
    guard = CallGuard(world.chain.market_domain, key.address, SystemClock())
    return Verifier(key, journal, actions, panel, judge, records, guard)

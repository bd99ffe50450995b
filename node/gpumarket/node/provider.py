"""One provider put together: ledger, engines, service, claims, heartbeats and advert, over a chain view that somebody else keeps.

The daemon gives it a real chain and p2p link; tests give it a view in memory. Invariant: it never signs, serves or claims before `open` has
read the ledger and ended what a crash left open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc.aio
import structlog

from gpumarket.core.errors import JournalError, PortInUse
from gpumarket.core.ports import Clock, Random
from gpumarket.core.rpc import SERVER_OPTIONS, ServerIdentity
from gpumarket.core.signing import Domain, Signer
from gpumarket.core.terms import Task
from gpumarket.core.units import Address, Hash, Money, parse_money, price_ceil
from gpumarket.node.accounts import Accounts
from gpumarket.node.admission import House, OnSale, Spoke
from gpumarket.node.advert import Advert, Announce
from gpumarket.node.claims import Claims
from gpumarket.node.engine.base import Engine
from gpumarket.node.engines import EngineFactory, Engines, Seat
from gpumarket.node.gpu_proof import Prover
from gpumarket.node.heartbeat import Heartbeats
from gpumarket.node.inventory import Inventory
from gpumarket.node.offers import Shop, offer_body, withdrawn_body
from gpumarket.node.peers import Node, Peers
from gpumarket.node.service import SCHEDULER_ROLE, Credit, ProviderService
from gpumarket.node.serving import Desk
from gpumarket.node.settings import ProviderSettings
from gpumarket.node.spans import Spans
from gpumarket.node.tables import LISTEN_PORT
from gpumarket.node.tally import Tally
from gpumarket.settlement.chain import NewWork
from gpumarket.settlement.journal import Journal
from gpumarket.telemetry.spans import OFF, Tracing
from gpumarket.v1 import market_pb2 as market
from gpumarket.v1 import terms_pb2 as terms
from gpumarket.v1.provider_pb2_grpc import add_ProviderServicer_to_server

LEASES_TOLD_MAX = 4_096
"""In one load: 128 KiB of hashes. Places of leases beyond it stay reserved at the scheduler a little longer."""
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Stock:
    """A model of the price list with its files."""

    model: OnSale
    folder: Path
    warm: bool
    """Load at start."""


class View(Protocol):
    """The chain as it is read here."""

    @property
    def channels(self) -> Mapping[Hash, Spoke]: ...
    @property
    def nodes(self) -> Mapping[Address, Node]: ...
    @property
    def trouble(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a provider is given."""

    signer: Signer
    domain: Domain
    channels_domain: Domain
    identity: ServerIdentity
    view: View
    journal: Journal
    inventory: Inventory
    clock: Clock
    random: Random
    read_blob: Callable[[Hash, int], bytes]
    announce: Announce
    p2p_id: str
    on_journal_error: Callable[[JournalError], None]
    tracing: Tracing = OFF


class Provider:
    """`open`, `listen`, then `run` until cancelled; `drain` and `close` at the end."""

    def __init__(self, settings: ProviderSettings, stock: Iterable[Stock], factory: EngineFactory, given: Surroundings) -> None:
        self.settings, self._given = settings, given
        self._stock = {entry.model.manifest.digest: entry for entry in stock}
        models = {digest: entry.model for digest, entry in self._stock.items()}
        self.house = House(
            given.signer.address,
            given.domain,
            models,
            settings.checks,
            settings.window_units_max,
            settings.embed_window_units_max,
            settings.channel_margin_seconds,
            settings.infer_window_units_max,
        )
        self.tally = Tally()
        self.kept_warm = frozenset(digest for digest, entry in self._stock.items() if entry.warm)
        """Models whose engines run from the start on."""
        self.accounts = self._make_accounts()
        self.engines = Engines({d: Seat(e.model, _maker(factory, e), settings.queue_limit, given.clock) for d, e in self._stock.items()})
        self.prover = Prover(given.inventory, given.clock, pause_seconds=settings.gpu_proof_seconds, size_max=settings.gpu_proof_size_max)
        self.spans = Spans(given.tracing)
        self._peers = Peers(given.view.nodes)
        self.claims = self._make_claims()
        self.service = self._make_service()
        self.heartbeats = self._make_heartbeats()
        for seat in self.engines.seats.values():
            seat.on_free = self.heartbeats.beat
        self.endpoint = ""
        self._server: grpc.aio.Server | None = None
        self._advert: Advert | None = None

    def now(self) -> int:
        """Unix seconds, by this provider's clock."""
        return self._given.clock.now()

    async def open(self) -> None:
        """Read the ledger."""
        cut = await self.accounts.load(self._given.signer, self._given.domain, self._given.clock.now())
        if cut:
            _log.warning("attempts cut short by a crash are billed up to their last ack", count=cut)

    async def listen(self, more: Callable[[grpc.aio.Server], None] = lambda server: None) -> str:
        """Serve over TLS; the endpoint that others use. `more` registers further services. Raises PortInUse."""
        host, _, port = self.settings.listen.rpartition(":")
        wanted = int(port) or self.accounts.fact(LISTEN_PORT) or 0
        server, bound = await self._bind(host, wanted, more, keep=int(port) != 0)
        await server.start()
        self._server = server
        if not int(port):
            await self.accounts.keep_fact(LISTEN_PORT, bound)
        self.endpoint = self.settings.advertise or f"{host}:{bound}"
        self._advert = self._make_advert()
        return self.endpoint

    async def warm_up(self) -> None:
        """Start the engines that should be warm: embedding models, and what the price list says."""
        await self.engines.warm_up(list(self.kept_warm))
        await self.prover.start()

    async def advertise(self) -> None:
        """Sign the first offer."""
        assert self._advert is not None, "listen first: the offer names the endpoint"
        await self._advert.refresh()

    async def run(self) -> None:
        """Claims, heartbeats and the advert. Ends only by cancellation or a defect."""
        assert self._advert is not None, "advertise first"
        async with asyncio.TaskGroup() as group:
            group.create_task(self.claims.run())
            group.create_task(self.heartbeats.run())
            group.create_task(self._advert.run())

    async def drain(self) -> None:
        """Withdraw the offer, take nothing more, let running attempts end within the grace."""
        self.service.draining = True
        if self._advert is not None:
            await self._advert.withdraw(withdrawn_body(self._shop()))
        self.heartbeats.beat()
        await self.service.drain(self.settings.drain_seconds)

    async def claim_rest(self, seconds: float) -> None:
        """Give the last bills a chance to be claimed before the process ends; the rest waits in the journal."""
        await self.claims.answered(seconds)

    async def close(self) -> None:
        """Stop serving and end the engines."""
        server, self._server = self._server, None  # let go of it while its loop runs: its finalizer wants the loop
        if server is not None:
            await server.stop(0.5)
        await self._peers.close()
        await self.engines.close()
        await self.prover.close()

    # --- parts -------------------------------------------------------------------------------------------------------------------

    def _make_accounts(self) -> Accounts:
        return Accounts(self._given.journal)

    def _make_claims(self) -> Claims:
        given = self._given
        return Claims(
            self.accounts,
            self._peers,
            given.signer,
            given.domain,
            given.channels_domain,
            given.view.channels,
            given.clock,
            given.random,
            retry_seconds_max=self.settings.claim_retry_seconds_max,
            spans=self.spans,
        )

    def _make_desk(self) -> Desk:
        given, settings = self._given, self.settings
        return Desk(
            given.signer,
            given.domain,
            self.accounts,
            given.clock,
            settings.ack_seconds,
            settings.final_ack_seconds,
            on_bill=lambda bill: self.claims.poke(bill.lease_hash),
            tally=self.tally,
        )

    def _make_service(self) -> ProviderService:
        given, settings = self._given, self.settings
        return ProviderService(
            self.house,
            self._make_desk(),
            self.engines,
            self.prover,
            given.random,
            channels=NewWork(given.view),
            nodes=given.view.nodes,
            credit=Credit(credit_start(settings, self.house), settings.credit_growth),
            read_blob=given.read_blob,
            on_journal_error=given.on_journal_error,
            on_change=self._changed,
            spans=self.spans,
        )

    def _make_heartbeats(self) -> Heartbeats:
        given = self._given
        return Heartbeats(
            self._peers,
            self.claims,
            given.signer,
            given.domain,
            given.clock,
            given.random,
            wanted=self._wanted,
            load=self._load,
            offer=self._current_offer,
            seconds=self.settings.heartbeat_seconds,
        )

    def _make_advert(self) -> Advert:
        given = self._given
        return Advert(
            given.signer,
            given.domain,
            self.accounts,
            given.clock,
            body=self._body,
            announce=given.announce,
            on_new=self.heartbeats.beat,
            offer_seconds=self.settings.offer_seconds,
        )

    async def _bind(self, host: str, port: int, more: Callable[[grpc.aio.Server], None], *, keep: bool) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        add_ProviderServicer_to_server(self.service, server)
        more(server)
        try:
            return server, server.add_secure_port(f"{host}:{port}", self._given.identity.credentials())
        except RuntimeError as error:
            if keep or not port:
                raise PortInUse(f"cannot listen on {host}:{port}", hint="stop what uses it, or set another with --listen") from error
        _log.warning("the port of the last run is taken; taking another", port=port)
        return await self._bind(host, 0, more, keep=True)

    # --- what the parts ask ------------------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        self.heartbeats.beat()
        if self._advert is not None and not self.service.draining:
            self._advert.look()

    def _wanted(self) -> list[Address]:
        chosen = self.settings.scheduler_addresses
        nodes = self._given.view.nodes
        return [a for a, node in nodes.items() if node.roles & SCHEDULER_ROLE and node.endpoint and (not chosen or a in chosen)]

    def _load(self, scheduler: Address) -> market.Load:
        takes = not self.service.draining and self.service.credit_left(scheduler)
        places = self.engines.places if takes else {}
        return market.Load(
            free=sum(places.values()),
            places=[market.ModelPlaces(model=digest, free=free) for digest, free in places.items()],
            running=self.engines.running,
            queued=self.engines.queued,
            warm=self.engines.warm,
            draining=self.service.draining,
            leases=self.service.open_leases(scheduler)[:LEASES_TOLD_MAX],
        )

    def _current_offer(self) -> terms.SignedOffer:
        assert self._advert is not None, "advertise first"
        return self._advert.current

    def _shop(self) -> Shop:
        given = self._given
        return Shop(
            given.signer.address,
            given.p2p_id,
            self.endpoint,
            given.identity.key_hash,
            self.settings.region,
            self.settings.checks,
            self.engines.capacity,
        )

    async def _body(self) -> terms.OfferBody:
        return offer_body(
            self._shop(),
            self._given.inventory.gpus,
            self.prover.measured_mflops,
            self.house.models,
            self.engines.warm,
            await self.engines.sandbox(),
            self.engines.paces,
        )


def credit_start(settings: ProviderSettings, house: House) -> Money:
    """Where a scheduler's limit starts: as set, or one window of every job that can be open at once, of the dearest model."""
    if settings.credit:
        return parse_money(settings.credit)
    start = 0
    for model in house.models.values():
        price = max(model.prompt_price, model.output_price) if model.manifest.task is Task.GENERATE else model.prompt_price
        units = house.window_max(model.manifest.task)
        if model.manifest.task is Task.GENERATE:
            units += model.manifest.max_input_tokens
        start = max(start, price_ceil(units, price) * (model.slots + settings.queue_limit))
    return Money(start)


def _maker(factory: EngineFactory, entry: Stock) -> Callable[[], Engine]:
    return lambda: factory(entry.model.manifest, entry.folder, entry.model.slots)

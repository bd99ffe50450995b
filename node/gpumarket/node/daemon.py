"""The provider daemon: key, journal, chain, service, p2p, registration, and then the market, until a signal.

Invariant: nothing is served before the ledger is read, nothing advertised before the registry confirms where this provider is; `ready.json`
appears after that and goes when draining begins. Never: a key, password or prompt in a log, an argument or the environment.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import grpc.aio
import structlog
from grpc_health.v1 import _async as health
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gpumarket.core import keystore
from gpumarket.core.daemon import READY, StateFolder, configure_logging, run_until_signalled, write_json
from gpumarket.core.errors import GpumarketError, JournalError
from gpumarket.core.ports import SystemClock, SystemRandom
from gpumarket.core.rpc import load_identity
from gpumarket.core.settings import ChainSettings
from gpumarket.core.signing import LocalKey
from gpumarket.core.units import hex0x, parse_address
from gpumarket.node.engines import EngineFactory
from gpumarket.node.inventory import take_inventory
from gpumarket.node.metrics import ProviderMetrics, Watched
from gpumarket.node.models.store import ModelStore
from gpumarket.node.panel.setup import open_panel
from gpumarket.node.provider import Provider, Surroundings
from gpumarket.node.readiness import FRESH_SECONDS, readiness_of
from gpumarket.node.redeeming import journal_url, make_redeemer
from gpumarket.node.settings import ProviderSettings
from gpumarket.node.stock import default_engine_factory, open_stock
from gpumarket.node.tables import metadata
from gpumarket.p2p.link import Link, P2PSettings
from gpumarket.settlement.chain import VIEW_FILE, Actions, Chain, ChainView, Follower, Sender, ViewFile, connect
from gpumarket.settlement.chain.registration import Entry, ensure_registered
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.redeem_request import redeem_on_request
from gpumarket.settlement.redeemer import Redeemer
from gpumarket.telemetry.spans import Tracing
from gpumarket.telemetry.tracing import from_environment
from gpumarket.telemetry.window import Readiness, observed
from gpumarket.v1 import provider_pb2

__all__ = ["default_engine_factory", "main", "serve"]

CLAIM_SECONDS_AT_EXIT = 5.0
SERVICE_NAME = provider_pb2.DESCRIPTOR.services_by_name["Provider"].full_name
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _World:
    """Everything outside the provider itself, open."""

    key: LocalKey
    journal: Journal
    chain: Chain
    view: ChainView
    follower: Follower
    link: Link
    actions: Actions


class _Parts(TypedDict):
    engine_factory: EngineFactory
    provider_class: type[Provider]
    password: str | None


def main(
    settings: ProviderSettings,
    chain_settings: ChainSettings,
    *,
    engine_factory: EngineFactory = default_engine_factory,
    provider_class: type[Provider] = Provider,
    password: str | None = None,
) -> None:
    """Run until SIGTERM or SIGINT, which drains; a second one ends at once. Raises what stops the provider from running."""
    configure_logging("provider")
    parts: _Parts = {"engine_factory": engine_factory, "provider_class": provider_class, "password": password}
    asyncio.run(run_until_signalled(lambda stop: serve(settings, chain_settings, stop, **parts)))


async def serve(
    settings: ProviderSettings,
    chain_settings: ChainSettings,
    stop: asyncio.Event,
    *,
    engine_factory: EngineFactory = default_engine_factory,
    provider_class: type[Provider] = Provider,
    password: str | None = None,
) -> None:
    """Serve until `stop`, then drain. Raises ConfigError, WalletError, ChainError … at start, JournalError when the ledger breaks."""
    broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    with StateFolder(settings.state):
        (settings.state / READY).unlink(missing_ok=True)
        async with AsyncExitStack() as stack:
            world = await stack.enter_async_context(_open_world(settings, chain_settings, password))
            store = ModelStore(settings.model_store)
            stock = await asyncio.to_thread(open_stock, store, settings.models)
            tracing = from_environment("provider")
            stack.push_async_callback(asyncio.to_thread, tracing.close)
            given = await _surroundings(settings, world, store, broken, tracing)
            provider = provider_class(settings, stock, engine_factory, given)
            stack.push_async_callback(provider.close)
            await provider.open()
            servicer = health.HealthServicer()
            endpoint = await provider.listen(lambda server: _add_health(servicer, server))
            vouchers, arrived = provider.accounts.vouchers.values, provider.spans.redeemed
            redeemer = make_redeemer(settings, world.actions, world.journal, vouchers, world.view, SystemClock(), arrived)
            group = await stack.enter_async_context(_tasks(broken))
            group.start(provider.warm_up())
            entry = Entry(
                settings.role_bits, world.link.peer_id, given.identity.key_hash, endpoint, settings.stake_units, settings.owner_address
            )
            await ensure_registered(world.actions, world.follower, world.view, entry, faucet=settings.faucet)
            panel = await open_panel(world.actions, world.journal, provider.engines, given.clock, given.random, wanted=settings.panel)
            provider.service.panel = panel
            await provider.advertise()
            quiet = asyncio.Event()
            for job in (provider.run(), world.follower.run(quiet), redeemer.run(quiet)):
                group.start(job)
            if panel is not None:
                stack.push_async_callback(panel.close)
                group.start(panel.run())
            _listen_for_requests(redeemer, settings, group)
            observe = await stack.enter_async_context(
                observed(settings.observe_listen, lambda: _watching(provider, world, redeemer), FRESH_SECONDS)
            )
            write_json(settings.state / READY, _ready(provider, world, given) | observe)
            await servicer.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
            _log.info("ready", endpoint=endpoint, address=hex0x(world.key.address))
            await _first(stop, broken)
            await servicer.enter_graceful_shutdown()
            await _leave(settings, provider, redeemer)
            quiet.set()


@asynccontextmanager
async def _open_world(settings: ProviderSettings, chain_settings: ChainSettings, password: str | None) -> AsyncIterator[_World]:
    key = await asyncio.to_thread(keystore.unlock, settings.key_file, settings.password_file, password)
    async with AsyncExitStack() as stack:
        journal = Journal(journal_url(settings.state), metadata)
        journal.open()
        stack.push_async_callback(journal.close)
        chain = await connect(chain_settings)
        stack.push_async_callback(chain.close)
        keystore.refuse_test_key(key.address, chain.book.chain_id)
        view = ChainView()
        follower = Follower(chain, view, me=key.address, file=ViewFile(settings.state / VIEW_FILE, chain.book))
        p2p = P2PSettings(
            identity_path=settings.state / "p2p.key",
            chain_id=chain.book.chain_id,
            registry=parse_address(chain.book.registry),
            listen=settings.p2p_listen,
            bootstrap=settings.p2p_bootstrap,
        )
        link = Link(p2p)
        stack.push_async_callback(link.close)
        await asyncio.gather(follower.sync(), link.start())
        yield _World(key, journal, chain, view, follower, link, Actions(chain, Sender(chain, key, journal)))


async def _surroundings(
    settings: ProviderSettings, world: _World, store: ModelStore, broken: asyncio.Future[None], tracing: Tracing
) -> Surroundings:
    inventory = await asyncio.to_thread(take_inventory)
    for note in inventory.notes:
        _log.info("inventory", note=note)

    def fail(error: JournalError) -> None:
        if not broken.done():
            broken.set_exception(error)

    return Surroundings(
        signer=world.key,
        domain=world.chain.market_domain,
        channels_domain=world.chain.channels_domain,
        identity=load_identity(settings.state),
        view=world.view,
        journal=world.journal,
        inventory=inventory,
        clock=SystemClock(),
        random=SystemRandom(),
        read_blob=store.read_blob,
        announce=world.link.announce,
        p2p_id=world.link.peer_id,
        on_journal_error=fail,
        tracing=tracing,
    )


def _watching(provider: Provider, world: _World, redeemer: Redeemer) -> tuple[ProviderMetrics, Readiness]:
    """Metrics and health."""
    watched = Watched(provider, redeemer, world.link, world.view, world.follower, world.actions, world.key.address)
    return ProviderMetrics(watched), readiness_of(provider, world.view, world.journal, world.link)


def _add_health(servicer: health.HealthServicer, server: grpc.aio.Server) -> None:
    """Standard health and reflection."""
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    names = (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)


def _ready(provider: Provider, world: _World, given: Surroundings) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "role": "provider",
        "address": hex0x(world.key.address),
        "endpoint": provider.endpoint,
        "tls_key_hash": hex0x(given.identity.key_hash),
        "p2p": world.link.addresses,
        "models": [{"digest": hex0x(d), "name": m.manifest.name} for d, m in provider.house.models.items()],
    }


def _listen_for_requests(redeemer: Redeemer, settings: ProviderSettings, group: _Group) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, lambda: group.start(redeem_on_request(redeemer, settings.state)))


async def _leave(settings: ProviderSettings, provider: Provider, redeemer: Redeemer) -> None:
    _log.info("draining", open_attempts=provider.service.open_attempts)
    (settings.state / READY).unlink(missing_ok=True)
    await provider.drain()
    await provider.claim_rest(CLAIM_SECONDS_AT_EXIT)
    if settings.redeem_at_exit:
        await redeem_on_request(redeemer, settings.state)


# --- tasks that end the daemon when they fail ------------------------------------------------------------------------------------


class _Group:
    """Background tasks. One that fails ends the daemon with its error."""

    def __init__(self, broken: asyncio.Future[None]) -> None:
        self._broken = broken
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, job: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._broken.done():
            self._broken.set_exception(_root(error))


@asynccontextmanager
async def _tasks(broken: asyncio.Future[None]) -> AsyncIterator[_Group]:
    group = _Group(broken)
    try:
        yield group
    finally:
        await group.close()
        if broken.done() and not broken.cancelled():
            broken.exception()  # seen, where another error is on its way already


async def _first(stop: asyncio.Event, broken: asyncio.Future[None]) -> None:
    """Until `stop`; raises what broke."""
    stopping = asyncio.create_task(stop.wait())
    either: list[asyncio.Future[Any]] = [stopping, broken]
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    if broken.done():
        broken.result()


def _root(error: BaseException) -> BaseException:
    """The market's own error inside task groups, where there is one."""
    while isinstance(error, BaseExceptionGroup):
        ours = error.subgroup(GpumarketError)
        error = (ours or error).exceptions[0]
    return error

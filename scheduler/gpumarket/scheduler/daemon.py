"""The scheduler daemon: key, journal, chain, service, p2p, registration, and then the market, until a signal.

Invariant: nothing is served before the ledger is read and the chain followed; `ready.json` appears once clients can find this scheduler on
chain, and goes when draining begins. Never: a key, password or prompt in a log, an argument or the environment.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import grpc.aio
import structlog
from grpc_health.v1 import _async as health
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gpumarket.core import keystore
from gpumarket.core.daemon import READY, StateFolder, configure_logging, run_until_signalled, settle_memory, write_json
from gpumarket.core.errors import GpumarketError, P2PUnavailable
from gpumarket.core.ports import SystemClock, SystemRandom
from gpumarket.core.rpc import ServerIdentity, load_identity
from gpumarket.core.settings import ChainSettings
from gpumarket.core.signing import LocalKey
from gpumarket.core.units import Money, hex0x, parse_address
from gpumarket.p2p.link import Link, P2PSettings
from gpumarket.scheduler import migrations
from gpumarket.scheduler.market import Market, World
from gpumarket.scheduler.metrics import SchedulerMetrics, Watched
from gpumarket.scheduler.readiness import FRESH_SECONDS, readiness_of
from gpumarket.scheduler.reclaiming import Reclaimer
from gpumarket.scheduler.settings import SchedulerSettings
from gpumarket.scheduler.tables import metadata
from gpumarket.settlement.chain import (
    SCHEDULER,
    VIEW_FILE,
    Actions,
    Chain,
    ChainEvent,
    ChainView,
    ChannelChanged,
    Follower,
    Sender,
    ViewFile,
    connect,
)
from gpumarket.settlement.chain.registration import Entry, ensure_registered
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.redeem import RedeemPolicy
from gpumarket.settlement.redeem_request import redeem_on_request
from gpumarket.settlement.redeemer import Redeemer, Redemption
from gpumarket.telemetry.spans import Tracing
from gpumarket.telemetry.tracing import from_environment
from gpumarket.telemetry.window import Readiness, observed
from gpumarket.v1 import market_pb2

SERVICE_NAME = market_pb2.DESCRIPTOR.services_by_name["Market"].full_name
WORKING_SPOKES = 4
"""Deposits for so many providers are taken from the test faucet, where it may be used at all."""
SNAPSHOT_RETRY_SECONDS = 1.0
"""A p2p process that died is back after a tenth of this, unless it dies again and again."""
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Around:
    """Everything outside the market itself, open."""

    key: LocalKey
    journal: Journal
    chain: Chain
    view: ChainView
    follower: Follower
    link: Link
    actions: Actions
    identity: ServerIdentity


def main(settings: SchedulerSettings, chain_settings: ChainSettings, *, password: str | None = None) -> None:
    """Run until SIGTERM or SIGINT, which drains; a second one ends at once. Raises what stops the scheduler from running."""
    configure_logging("scheduler")
    asyncio.run(run_until_signalled(lambda stop: serve(settings, chain_settings, stop, password=password)))


async def serve(settings: SchedulerSettings, chain_settings: ChainSettings, stop: asyncio.Event, *, password: str | None = None) -> None:
    """Serve until `stop`, then drain. Raises ConfigError, WalletError, ChainError ... at start, JournalError when the ledger breaks."""
    with StateFolder(settings.state):
        (settings.state / READY).unlink(missing_ok=True)
        async with AsyncExitStack() as stack:
            around = await stack.enter_async_context(_open(settings, chain_settings, password))
            tracing = from_environment("scheduler")
            stack.push_async_callback(asyncio.to_thread, tracing.close)
            market = Market(settings, _world(around, tracing))
            market.open()
            market.desk.trouble = lambda: around.view.trouble
            stack.push_async_callback(market.close)
            servicer = health.HealthServicer()
            endpoint = await market.listen(around.identity, lambda server: _add_health(servicer, server))
            entry = Entry(SCHEDULER, around.link.peer_id, around.identity.key_hash, endpoint, settings.stake_amount, settings.owner_address)
            capital = Money(WORKING_SPOKES * settings.spoke_deposit_amount)
            await ensure_registered(around.actions, around.follower, around.view, entry, faucet=settings.faucet, capital=capital)
            await around.actions.approve()
            redeemer = _redeemer(settings, around, market)
            quiet = asyncio.Event()
            reclaimer = Reclaimer(settings, around.actions, market.ledger, market.presence, SystemClock())
            rounds = [around.follower.run(quiet), redeemer.run(quiet), reclaimer.run(quiet)]
            jobs = [market.run(quiet), *rounds, _hear(around.link, market)]
            async with _failing_together(jobs) as broken:
                _redeem_when_asked(redeemer, settings)
                observe = await stack.enter_async_context(
                    observed(settings.observe_listen, lambda: _watching(market, around, redeemer), FRESH_SECONDS)
                )
                settle_memory()
                write_json(settings.state / READY, _ready(around, endpoint) | observe)
                await servicer.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
                _log.info("ready", endpoint=endpoint, address=hex0x(around.key.address))
                await _first(stop, broken)
                _log.info("draining")
                (settings.state / READY).unlink(missing_ok=True)
                await servicer.enter_graceful_shutdown()
                await market.drain()
                quiet.set()


@asynccontextmanager
async def _open(settings: SchedulerSettings, chain_settings: ChainSettings, password: str | None) -> AsyncIterator[_Around]:
    key = await asyncio.to_thread(keystore.unlock, settings.key_file, settings.password_file, password)
    async with AsyncExitStack() as stack:
        await asyncio.to_thread(migrations.upgrade, settings.database_url)
        journal = Journal(settings.database_url, metadata)
        journal.open()
        stack.push_async_callback(journal.close)
        chain = await connect(chain_settings)
        stack.push_async_callback(chain.close)
        keystore.refuse_test_key(key.address, chain.book.chain_id)
        view = ChainView()
        follower = Follower(chain, view, me=key.address, file=ViewFile(settings.state / VIEW_FILE, chain.book))
        link = Link(_p2p(settings, chain))
        stack.push_async_callback(link.close)
        await asyncio.gather(follower.sync(), link.start())
        actions = Actions(chain, Sender(chain, key, journal))
        yield _Around(key, journal, chain, view, follower, link, actions, load_identity(settings.state))


def _p2p(settings: SchedulerSettings, chain: Chain) -> P2PSettings:
    return P2PSettings(
        identity_path=settings.state / "p2p.key",
        chain_id=chain.book.chain_id,
        registry=parse_address(chain.book.registry),
        listen=settings.p2p_listen,
        bootstrap=settings.p2p_bootstrap,
    )


def _world(around: _Around, tracing: Tracing) -> World:
    return World(
        signer=around.key,
        domain=around.chain.market_domain,
        channels_domain=around.chain.channels_domain,
        view=around.view,
        journal=around.journal,
        actions=around.actions,
        clock=SystemClock(),
        random=SystemRandom(),
        token=parse_address(around.chain.book.token),
        version=version("gpumarket"),
        tracing=tracing,
    )


def _redeemer(settings: SchedulerSettings, around: _Around, market: Market) -> Redeemer:

    def redeemed(redemption: Redemption) -> None:
        market.note_redeemed(redemption.channel, redemption.cumulative)
        market.spans.redeemed(redemption)

    policy = RedeemPolicy(gas_share_ppm=int(settings.redeem_gas_share * 1e6), margin_seconds=settings.redeem_margin_seconds)
    redeemer = Redeemer(
        around.actions,
        around.journal,
        market.received_channels,
        SystemClock(),
        payer_of=lambda channel: market.ledger.hubs[channel].payer,
        policy=policy,
        gas_value=settings.gas_value,
        every_seconds=settings.redeem_seconds,
        on_redeemed=redeemed,
    )
    around.view.subscribe(lambda event: redeemer.wake() if _is_closing(market, event) else None)
    return redeemer


def _is_closing(market: Market, event: ChainEvent) -> bool:
    hub = market.ledger.hubs.get(event.id) if isinstance(event, ChannelChanged) else None
    return hub is not None and hub.state.closing > 0 and not hub.state.closed


async def _hear(link: Link, market: Market) -> None:
    """Offers from p2p, first what is known, then what comes. Ends with the link."""
    fresh = link.offers()
    for raw in await _known(link):
        market.take_gossip(raw)
    async for raw in fresh:
        market.take_gossip(raw)


async def _known(link: Link) -> list[bytes]:
    """The snapshot, asked for until it comes: the p2p process may die at any moment, and its supervisor starts it again."""
    while True:
        try:
            return await link.snapshot()
        except P2PUnavailable as error:
            _log.warning("p2p_snapshot_failed", reason=error.message, again_seconds=SNAPSHOT_RETRY_SECONDS)
            await asyncio.sleep(SNAPSHOT_RETRY_SECONDS)


def _watching(market: Market, around: _Around, redeemer: Redeemer) -> tuple[SchedulerMetrics, Readiness]:
    """Metrics and health."""
    watched = Watched(market, redeemer, around.link, around.view, around.follower, around.actions, around.key.address)
    return SchedulerMetrics(watched), readiness_of(market, around.view, around.journal, around.link)


def _add_health(servicer: health.HealthServicer, server: grpc.aio.Server) -> None:
    """Standard health and reflection."""
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    names = (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)


def _ready(around: _Around, endpoint: str) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "role": "scheduler",
        "address": hex0x(around.key.address),
        "endpoint": endpoint,
        "tls_key_hash": hex0x(around.identity.key_hash),
        "p2p": around.link.addresses,
        "chain_id": around.chain.book.chain_id,
    }


def _redeem_when_asked(redeemer: Redeemer, settings: SchedulerSettings) -> None:
    """SIGUSR1: redeem everything now, answer in redeemed.json."""
    running: set[asyncio.Task[None]] = set()

    def asked() -> None:
        task = asyncio.create_task(redeem_on_request(redeemer, settings.state), name="redeem on request")
        running.add(task)
        task.add_done_callback(running.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, asked)


@asynccontextmanager
async def _failing_together(jobs: list[Coroutine[Any, Any, None]]) -> AsyncIterator[asyncio.Future[None]]:
    """Run jobs in the background; the future carries the error of the first that fails."""
    broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    tasks = [asyncio.create_task(job) for job in jobs]

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not broken.done():
            broken.set_exception(error)

    for task in tasks:
        task.add_done_callback(ended)
    try:
        yield broken
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if broken.done() and (error := broken.exception()) is not None and not isinstance(error, GpumarketError):
            _log.error("task_failed", reason=repr(error))


async def _first(stop: asyncio.Event, broken: asyncio.Future[None]) -> None:
    """Until `stop`; raises what broke."""
    stopping = asyncio.create_task(stop.wait())
    waiting: list[asyncio.Future[Any]] = [stopping, broken]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    if broken.done():
        broken.result()

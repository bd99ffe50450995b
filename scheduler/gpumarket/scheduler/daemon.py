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
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]
from grpc_reflection.v1alpha import reflection

from gpumarket.core import keystore
from gpumarket.core.daemon import READY, StateFolder, configure_logging, run_until_signalled, write_json
from gpumarket.core.errors import GpumarketError
from gpumarket.core.ports import SystemClock, SystemRandom
from gpumarket.core.rpc import ServerIdentity, load_identity
from gpumarket.core.settings import ChainSettings
from gpumarket.core.signing import LocalKey
from gpumarket.core.units import Money, hex0x, parse_address
from gpumarket.p2p.link import Link, P2PSettings
from gpumarket.scheduler import migrations
from gpumarket.scheduler.market import Market, World
from gpumarket.scheduler.settings import SchedulerSettings
from gpumarket.scheduler.tables import metadata
from gpumarket.settlement.chain import SCHEDULER, Actions, Chain, ChainView, Follower, Sender, connect
from gpumarket.settlement.chain.registration import Entry, ensure_registered
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.redeem import RedeemPolicy
from gpumarket.settlement.redeem_request import redeem_on_request
from gpumarket.settlement.redeemer import Redeemer
from gpumarket.v1 import market_pb2

WORKING_SPOKES = 4
"""Deposits for so many providers are taken from the test faucet, where it may be used at all."""
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


def main(settings: SchedulerSettings, chain_settings: ChainSettings) -> None:
    """Run until SIGTERM or SIGINT, which drains; a second one ends at once. Raises what stops the scheduler from running."""
    configure_logging("scheduler")
    asyncio.run(run_until_signalled(lambda stop: serve(settings, chain_settings, stop)))


async def serve(settings: SchedulerSettings, chain_settings: ChainSettings, stop: asyncio.Event) -> None:
    """Serve until `stop`, then drain. Raises ConfigError, WalletError, ChainError ... at start, JournalError when the ledger breaks."""
    with StateFolder(settings.state):
        (settings.state / READY).unlink(missing_ok=True)
        async with AsyncExitStack() as stack:
            around = await stack.enter_async_context(_open(settings, chain_settings))
            market = Market(settings, _world(around))
            market.open()
            stack.push_async_callback(market.close)
            endpoint = await market.listen(around.identity, _more_services)
            entry = Entry(SCHEDULER, around.link.peer_id, around.identity.key_hash, endpoint, settings.stake_amount)
            capital = Money(WORKING_SPOKES * settings.spoke_deposit_amount)
            await ensure_registered(around.actions, around.follower, around.view, entry, faucet=settings.faucet, capital=capital)
            await around.actions.approve()
            redeemer = _redeemer(settings, around, market)
            quiet = asyncio.Event()
            jobs = [market.run(quiet), around.follower.run(quiet), redeemer.run(quiet), _hear(around.link, market)]
            async with _failing_together(jobs) as broken:
                _redeem_when_asked(redeemer, settings)
                write_json(settings.state / READY, _ready(around, endpoint))
                _log.info("ready", endpoint=endpoint, address=hex0x(around.key.address))
                await _first(stop, broken)
                _log.info("draining")
                (settings.state / READY).unlink(missing_ok=True)
                await market.drain()
                quiet.set()


@asynccontextmanager
async def _open(settings: SchedulerSettings, chain_settings: ChainSettings) -> AsyncIterator[_Around]:
    key = await asyncio.to_thread(lambda: keystore.load(settings.key_file, keystore.read_password(settings.password_file)))
    async with AsyncExitStack() as stack:
        await asyncio.to_thread(migrations.upgrade, settings.database_url)
        journal = Journal(settings.database_url, metadata)
        journal.open()
        stack.push_async_callback(journal.close)
        chain = await connect(chain_settings)
        stack.push_async_callback(chain.close)
        keystore.refuse_test_key(key.address, chain.book.chain_id)
        view = ChainView()
        follower = Follower(chain, view)
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


def _world(around: _Around) -> World:
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
    )


def _redeemer(settings: SchedulerSettings, around: _Around, market: Market) -> Redeemer:
    policy = RedeemPolicy(gas_share_ppm=int(settings.redeem_gas_share * 1e6), margin_seconds=settings.redeem_margin_seconds)
    return Redeemer(
        around.actions,
        around.journal,
        market.received_channels,
        SystemClock(),
        payer_of=lambda channel: market.ledger.hubs[channel].payer,
        policy=policy,
        gas_value=settings.gas_value,
        every_seconds=settings.redeem_seconds,
        on_redeemed=lambda redemption: market.note_redeemed(redemption.channel, redemption.amount),
    )


async def _hear(link: Link, market: Market) -> None:
    """Offers from p2p, first what is known, then what comes. Ends with the link."""
    fresh = link.offers()
    for raw in await link.snapshot():
        market.take_gossip(raw)
    async for raw in fresh:
        market.take_gossip(raw)


def _more_services(server: grpc.aio.Server) -> None:
    """Standard health and reflection."""
    name = market_pb2.DESCRIPTOR.services_by_name["Market"].full_name
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    reflection.enable_server_reflection((name, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME), server)


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

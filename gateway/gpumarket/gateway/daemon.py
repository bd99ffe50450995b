"""The gateway daemon: a client of the market, its keys and their ledger, the API; until a signal, on which it drains.

Invariant: `ready.json` is there while requests are taken and no longer; after the first signal nothing new is taken, what runs may end, and
what is left after `drain_seconds` is cancelled and billed for what was delivered.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from typing import Any

import structlog

from gpumarket.core.daemon import READY, StateFolder, configure_logging, run_until_signalled, settle_memory, write_json
from gpumarket.core.ports import SystemClock, SystemRandom
from gpumarket.core.settings import ChainSettings
from gpumarket.core.units import hex0x
from gpumarket.gateway.answers import Answers
from gpumarket.gateway.app import App, serving
from gpumarket.gateway.call import Room
from gpumarket.gateway.catalog import Catalog
from gpumarket.gateway.counter import Counter
from gpumarket.gateway.door import Door
from gpumarket.gateway.inference_protocol.service import InferenceService, serving_grpc
from gpumarket.gateway.keys import KeyFile
from gpumarket.gateway.ledger import Ledger
from gpumarket.gateway.metrics import GatewayMetrics
from gpumarket.gateway.readiness import FRESH_SECONDS, readiness_of
from gpumarket.gateway.settings import GatewaySettings
from gpumarket.gateway.sharing import Sharing
from gpumarket.gateway.tables import FILE, METADATA
from gpumarket.gateway.tally import Tally
from gpumarket.sdk import Client, ClientSettings
from gpumarket.settlement.journal import Journal
from gpumarket.telemetry.window import observed

HOUR_SECONDS = 3_600
_log = structlog.get_logger()


def main(settings: GatewaySettings, client: ClientSettings, chain: ChainSettings, *, password: str | None = None) -> None:
    """Run until SIGTERM or SIGINT, which drains; a second one ends at once. Raises what stops the gateway from running."""
    configure_logging("gateway")
    asyncio.run(run_until_signalled(lambda stop: serve(settings, Client(client, chain, password=password), stop)))


async def serve(settings: GatewaySettings, client: Client, stop: asyncio.Event) -> None:
    """Serve with a client that is not open yet until `stop`, then drain. Raises ConfigError, WalletError, NetworkError ... at start."""
    with StateFolder(settings.state):
        (settings.state / READY).unlink(missing_ok=True)
        async with opened(settings, client) as (room, door, journal), AsyncExitStack() as stack:
            watching = observed(settings.observe_listen, lambda: (GatewayMetrics(room), readiness_of(room, journal)), FRESH_SECONDS)
            seen = await stack.enter_async_context(watching)
            url = await stack.enter_async_context(serving(App(room, door, SystemRandom()), settings.listen))
            service = InferenceService(room, door)
            grpc = await stack.enter_async_context(serving_grpc(service, settings.grpc_listen, settings.body_bytes_max))
            settle_memory()
            write_json(settings.state / READY, _ready(client, url, grpc) | seen)
            _log.info("ready", endpoint=url, address=hex0x(client.address))
            await stop.wait()
            _log.info("draining")
            (settings.state / READY).unlink(missing_ok=True)
            room.counter.draining = True
            await drained(room, settings.drain_seconds)


@asynccontextmanager
async def opened(settings: GatewaySettings, client: Client) -> AsyncIterator[tuple[Room, Door, Journal]]:
    """The gateway's parts around a client, which is opened here; jobs that an earlier process left are seen to their end meanwhile."""
    clock, random = SystemClock(), SystemRandom()
    async with AsyncExitStack() as stack:
        market = await stack.enter_async_context(client)
        keys = stack.enter_context(closing(KeyFile(settings.state)))
        journal = Journal(f"sqlite:///{(settings.state / FILE).absolute()}", METADATA)
        journal.open()
        stack.push_async_callback(journal.close)
        counter = Counter(market, Ledger(journal, clock), settings, clock)
        counter.recover()
        stack.push_async_callback(counter.close)
        answers = Answers(journal, clock, random, settings.idempotency_hours * HOUR_SECONDS)
        sharing = Sharing(counter, settings.shared_jobs_max)
        room = Room(settings, counter, answers, Catalog(market.settings.lock_file), sharing, Tally())
        yield room, Door(keys, clock), journal


async def drained(room: Room, seconds: float) -> None:
    """Until no job runs, or the time is over."""
    try:
        async with asyncio.timeout(seconds):
            await room.counter.idle.wait()
    except TimeoutError:
        _log.warning("drain_cut_short", jobs=room.counter.running)


def _ready(client: Client, url: str, grpc: str) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "role": "gateway",
        "address": hex0x(client.address),
        "endpoint": url,
        "api": f"{url}/v1",
        "grpc": grpc,
        "chain_id": client.desk.domain.chain_id,
    }

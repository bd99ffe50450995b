"""Two provider daemons on one key: one of them trades, the other is told; a daemon that was restarted is not kept out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from reliability import record
from scheduler_world import PRICE, SCHEDULER, HandChain, HandClock, ScriptedProvider, running

from gpumarket.core.errors import Busy
from gpumarket.core.rpc import from_rpc
from gpumarket.core.units import money_from_bytes
from gpumarket.scheduler.market import Market
from gpumarket.scheduler.presence import ALIVE_SECONDS, Session


@dataclass
class Floor:
    """A scheduler, and daemons of one provider key."""

    folder: Path
    clock: HandClock
    chain: HandChain
    market: Market
    daemons: list[ScriptedProvider] = field(default_factory=list)

    async def first(self) -> ScriptedProvider:
        daemon = ScriptedProvider("p1", self.folder)
        self.daemons.append(daemon)
        await daemon.start(self.chain)
        await daemon.ready(self.market, self.clock)
        return daemon

    async def another(self, first: ScriptedProvider, **changes: Any) -> ScriptedProvider:
        """A daemon with the same key, from a copy of its folder; it has said hello on a connection of its own."""
        daemon = ScriptedProvider("p1", self.folder)
        self.daemons.append(daemon)
        daemon.endpoint, daemon.sequence = first.endpoint, first.sequence
        await daemon.greet(self.market, self.clock, **changes)
        return daemon

    @property
    def session(self) -> Session | None:
        return self.market.presence.sessions.get(self.daemons[0].address)


@pytest.fixture
async def floor(tmp_path: Path, database: str) -> AsyncIterator[Floor]:
    clock = HandClock()
    chain = HandChain(SCHEDULER.address, clock)
    async with running(tmp_path / "scheduler", chain, clock, database=database) as market:
        made = Floor(tmp_path, clock, chain, market)
        yield made
        for daemon in made.daemons:
            await daemon.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  the state of another task, without an event of its own
            await asyncio.sleep(0.01)


async def test_second_daemon_on_a_providers_key_is_refused_while_the_first_lives(floor: Floor) -> None:
    first = await floor.first()
    held, refused = floor.session, 0
    assert held is not None
    for _ in range(3):
        floor.clock.mono += ALIVE_SECONDS - 0.1
        await first.beat()
        await until(lambda: held.heard == floor.clock.mono)
        floor.clock.mono += ALIVE_SECONDS - 0.1
        twin = await floor.another(first, beats=False, price=2 * PRICE)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await twin.told(lambda _: False)
        error = from_rpc(caught.value, "the scheduler")
        assert isinstance(error, Busy) and error.retryable
        assert "another provider daemon with the key" in error.message and "one daemon per key" in error.hint
        refused += 1
    assert floor.session is held
    listing = floor.market.listings.get(first.address)
    assert listing is not None
    price = money_from_bytes(listing.body.models[0].prompt_price_per_mtok)
    assert price == PRICE, "nor is its offer replaced by the other's"
    record("F05", refused, "two provider daemons on one key: the second is refused and told while the first lives", "one at a time")


async def test_daemon_restarted_is_let_in_once_its_old_stream_is_silent(floor: Floor) -> None:
    first = await floor.first()
    floor.clock.mono += ALIVE_SECONDS  # it was killed, and its connection is still there
    second = await floor.another(first)
    await second.told(lambda down: not down.notice)
    held = floor.session
    await first.beat()
    with pytest.raises(AssertionError, match="ended the heartbeat"):
        await first.told(lambda _: False)
    assert held is not None and floor.session is held, "the old stream takes nothing away from the new one"


async def test_daemon_restarted_is_let_in_at_once_when_its_old_stream_ended(floor: Floor) -> None:
    first = await floor.first()
    first.call.cancel()
    await until(lambda: floor.session is None)
    second = await floor.another(first)
    await second.told(lambda down: not down.notice)


async def test_heartbeat_begun_anew_on_the_same_connection_replaces_the_old_at_once(floor: Floor) -> None:
    first = await floor.first()
    old, held = first.call, floor.session
    await first.say_hello(floor.clock)
    await until(lambda: floor.session is not held)
    assert floor.session is not None
    old.cancel()

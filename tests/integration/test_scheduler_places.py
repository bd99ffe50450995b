"""Places at a provider, over the real Market service: each job is counted once, whether the scheduler reserved it or a load shows it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from scheduler_world import MODEL, SCHEDULER, TOKEN, Bought, HandChain, HandClock, ScriptedClient, ScriptedProvider, key, running

from gpumarket.core.terms import keccak256
from gpumarket.core.units import Hash
from gpumarket.scheduler.market import Market
from gpumarket.scheduler.round_trip import ASK_SECONDS, UNKNOWN_SECONDS
from gpumarket.v1 import market_pb2 as pb

SLOTS = 4
OTHER_MODEL = Hash(keccak256(b"another model"))


class Place:
    """One scheduler, one client, one provider of four slots."""

    def __init__(self, folder: Path) -> None:
        self.clock = HandClock()
        self.chain = HandChain(SCHEDULER.address, self.clock)
        self.client = ScriptedClient("client", self.chain.hub(key("client")), self.clock)
        self.provider = ScriptedProvider("p1", folder)
        self.market: Market
        self.loads = 0

    async def load(self, free: int, leases: list[Hash], by_model: dict[Hash, int] | None = None) -> None:
        """A load that the scheduler has taken when this returns."""
        self.loads += 1
        marker = 1_000 + self.loads
        places = [pb.ModelPlaces(model=model, free=count) for model, count in (by_model or {}).items()]
        load = pb.Load(free=free, warm=[MODEL], leases=leases, running=marker, places=places)
        await self.provider.call.write(pb.HeartbeatUp(load=load))
        await until(lambda: self.market.presence.sessions[self.provider.address].load.running == marker)

    async def order(self) -> Bought | None:
        """A granted order; None when no place was free."""
        job = self.client.job()
        reply = await self.client.match(job, pay=TOKEN)
        if reply.HasField("granted"):
            return job
        assert [(r.filter, r.removed) for r in reply.no_match.removed] == [("capacity", 1)], reply
        return None


@pytest.fixture
async def place(tmp_path: Path, database: str) -> AsyncIterator[Place]:
    made = Place(tmp_path)
    async with running(tmp_path / "scheduler", made.chain, made.clock, database=database) as market:
        made.market = market
        await made.client.connect(market)
        await made.provider.start(made.chain)
        await made.provider.ready(market, made.clock)
        yield made
        await made.provider.stop()
        await made.client.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  the state of another task, without an event of its own
            await asyncio.sleep(0.005)


async def filled(place: Place) -> list[Hash]:
    """All four slots leased; a fifth order finds none."""
    await place.load(SLOTS, [])
    jobs = [await place.order() for _ in range(SLOTS)]
    assert await place.order() is None
    return [job.hash for job in jobs if job is not None]


async def test_places_a_slot_given_back_while_others_run_takes_the_next_order(place: Place) -> None:
    leases = await filled(place)
    await place.load(0, leases)
    assert await place.order() is None
    await place.load(1, leases[1:])
    assert await place.order() is not None
    assert await place.order() is None


async def test_places_that_a_load_does_not_show_yet_stay_reserved(place: Place) -> None:
    leases = await filled(place)
    await place.load(2, leases[:2])  # the other two are on their way to the provider
    assert await place.order() is None
    await place.load(0, leases)
    assert await place.order() is None


async def test_places_of_other_providers_are_not_given_back_by_naming_their_leases(place: Place, tmp_path: Path) -> None:
    leases = await filled(place)
    other = ScriptedProvider("p2", tmp_path)
    await other.start(place.chain)
    await other.ready(place.market, place.clock)
    await other.call.write(pb.HeartbeatUp(load=pb.Load(free=0, running=7, leases=leases)))
    await until(lambda: place.market.presence.sessions[other.address].load.running == 7)
    assert place.market.book.entries[place.provider.address].standing.free == 0
    assert place.market.presence.reserved_on(place.client.channel) == SLOTS
    await other.stop()


async def test_places_reserved_and_never_used_lapse(place: Place) -> None:
    await filled(place)
    place.clock.pass_seconds(6)
    place.market.presence.lapse()
    await place.load(SLOTS, [])
    assert await place.order() is not None


async def test_places_of_another_model_are_of_no_use(place: Place) -> None:
    await place.load(SLOTS, [], {OTHER_MODEL: SLOTS})
    assert await place.order() is None
    await place.load(SLOTS, [], {OTHER_MODEL: SLOTS - 1, MODEL: 1})
    job = await place.order()
    assert job is not None
    assert await place.order() is None
    await place.load(SLOTS - 1, [], {OTHER_MODEL: SLOTS - 1})  # taken by another scheduler's job before ours has come
    assert await place.order() is None
    await place.load(SLOTS - 1, [job.hash], {OTHER_MODEL: SLOTS - 1})  # ours waits for a slot: its reservation frees none
    assert await place.order() is None
    await place.load(SLOTS, [], {OTHER_MODEL: SLOTS - 1, MODEL: 1})
    assert await place.order() is not None


@pytest.mark.parametrize(
    "load", [pb.Load(free=1, leases=[bytes(32)] * 4_097), pb.Load(free=1, places=[pb.ModelPlaces(model=bytes(32), free=1)] * 257)]
)
async def test_places_load_that_names_too_many_ends_the_stream(place: Place, load: pb.Load) -> None:
    await place.provider.call.write(pb.HeartbeatUp(load=load))
    await until(lambda: place.provider.address not in place.market.presence.sessions)


async def test_places_far_away_score_by_the_round_trip_that_was_measured(place: Place) -> None:
    session = place.market.presence.sessions[place.provider.address]
    standing = place.market.book.entries[place.provider.address].standing
    await place.load(SLOTS, [])
    assert standing.round_trip_seconds == UNKNOWN_SECONDS, "nothing came back yet"
    place.clock.mono += ASK_SECONDS
    session.wake.set()
    down = await place.provider.told(lambda down: bool(down.probe) and not session.round_trip.due(place.clock.mono))
    place.clock.mono += 0.05
    await place.provider.call.write(pb.HeartbeatUp(load=pb.Load(free=SLOTS, running=5, warm=[MODEL], probe=down.probe)))
    await until(lambda: session.load.running == 5)
    assert abs(standing.round_trip_seconds - 0.05) < 1e-6

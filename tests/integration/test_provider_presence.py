"""What a provider tells its schedulers every second: its load, and the leases counted out of it. A scripted scheduler and engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from node_fixtures import SCHEDULER, Job, embed_job, generate_job, on_sale
from provider_market import FakeScheduler, provider_at, scheduler_at, until

from gpumarket.core.terms import Task, output_chain
from gpumarket.v1 import market_pb2 as market

TEXT, VECTORS = on_sale(Task.GENERATE), on_sale(Task.EMBED)


def text(**changes: Any) -> Job:
    return generate_job(TEXT, now=int(time.time()), **changes)


async def test_presence_load_names_open_leases_and_frees_the_slot_before_the_last_ack(tmp_path: Path) -> None:
    async with scheduler_at(tmp_path / "s") as (fake, node), provider_at(tmp_path, TEXT, scheduler=node, run=True) as running:
        engine = running.engines["generate"]
        engine.gate.clear()
        job = text(max_tokens=4)
        talk = await running.attempt(job).open()
        await until(lambda: said(fake, job, free=1))
        engine.gate.set()
        await talk.read_finished()
        await until(lambda: said(fake, job, free=2))  # its client has not acknowledged yet: the lease is open, the slot is not taken
        await talk.ack(complete=True)
        await talk.end()
        await until(lambda: not fake.loads[-1].leases and fake.loads[-1].free == 2)


async def test_presence_load_tells_free_places_of_each_model(tmp_path: Path) -> None:
    async with scheduler_at(tmp_path / "s") as (fake, node), provider_at(tmp_path, TEXT, VECTORS, scheduler=node, run=True) as running:
        await until(lambda: places(fake) == {TEXT.manifest.digest: 2, VECTORS.manifest.digest: 2})
        running.engines["generate"].gate.clear()
        talks = [await running.attempt(text(max_tokens=4, name=name)).open() for name in (b"one", b"two")]
        await until(lambda: places(fake) == {VECTORS.manifest.digest: 2})
        assert fake.loads[-1].free == 2
        running.engines["generate"].gate.set()
        for talk in talks:
            await talk.read_finished()
        await until(lambda: places(fake) == {TEXT.manifest.digest: 2, VECTORS.manifest.digest: 2})
        for talk in talks:
            await talk.end()


async def test_presence_offer_tells_the_measured_pace_of_its_jobs(tmp_path: Path) -> None:
    async with scheduler_at(tmp_path / "s") as (fake, node), provider_at(tmp_path, VECTORS, scheduler=node, run=True) as running:
        await until(lambda: bool(fake.hellos))
        assert fake.hellos[0].models[0].measured_tokens_per_ks == 0, "nothing was measured yet"
        job = embed_job(VECTORS, inputs=((1,) * 50, (2,) * 50), now=int(time.time()))
        talk = await running.attempt(job).open()
        await talk.read_finished()
        await talk.ack(100, output_hash=output_chain(talk.items), complete=True)
        await talk.end()
        await until(lambda: bool(fake.offers) and fake.offers[-1].models[0].measured_tokens_per_ks > 0)
        pace = running.provider.engines.paces[VECTORS.manifest.digest]
        assert fake.offers[-1].models[0].measured_tokens_per_ks == pace


async def test_presence_probe_comes_back_with_a_load_at_once(tmp_path: Path) -> None:
    async with scheduler_at(tmp_path / "s") as (fake, node), provider_at(tmp_path, TEXT, scheduler=node, run=True, heartbeat_seconds=600):
        await until(lambda: bool(fake.loads))
        assert fake.loads[-1].probe == 0
        await fake.down.put(market.HeartbeatDown(probe=2**63 + 5))
        await until(lambda: fake.loads[-1].probe == 2**63 + 5)  # not in ten minutes


async def test_presence_notice_is_kept_and_logged_as_one_bounded_line(tmp_path: Path) -> None:
    async with scheduler_at(tmp_path / "s") as (fake, node), provider_at(tmp_path, TEXT, scheduler=node, run=True) as running:
        await fake.down.put(market.HeartbeatDown(notice="stake\n\x1b[2J" + "x" * 10**6))
        presence = running.provider.heartbeats.presence
        await until(lambda: SCHEDULER.address in presence and bool(presence[SCHEDULER.address].notice))
        notice = presence[SCHEDULER.address].notice
        assert notice.startswith("stake\\n\\x1b[2Jxxx")
        assert len(notice) < 600


def places(fake: FakeScheduler) -> dict[bytes, int]:
    return {entry.model: entry.free for entry in fake.loads[-1].places} if fake.loads else {}


def said(fake: FakeScheduler, job: Job, *, free: int) -> bool:
    return bool(fake.loads) and list(fake.loads[-1].leases) == [job.lease.struct_hash] and fake.loads[-1].free == free

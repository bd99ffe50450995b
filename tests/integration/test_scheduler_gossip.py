"""Offers that reach the book by p2p alone: from gossip, from the snapshot at start, and through the death of the p2p process."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from p2p_net import running_link, until
from scheduler_world import DOMAIN, MODEL, SCHEDULER, HandChain, HandClock, ScriptedClient, ScriptedProvider, key, running

from gpumarket.core.units import Address
from gpumarket.p2p.link import Link
from gpumarket.scheduler import daemon
from gpumarket.scheduler.market import Market
from gpumarket.settlement.chain.view import PROVIDER, NodeOnChain
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import terms_pb2 as terms


class Town:
    """A scheduler, and providers that the chain knows and that never send it a heartbeat."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = HandClock(at=int(time.time()))
        self.chain = HandChain(SCHEDULER.address, self.clock)
        self.market: Market

    def provider(self, name: str, *, registered: bool = True) -> ScriptedProvider:
        provider = ScriptedProvider(name, self.folder)
        provider.endpoint = "127.0.0.1:1"
        if registered:
            self.chain.put_node(NodeOnChain(provider.address, provider.owner, PROVIDER, 10**20, tls_key_hash=provider.identity.key_hash))
        return provider

    def listed(self, provider: ScriptedProvider) -> bool:
        return provider.address in self.market.book.entries

    def raw_offer(self, provider: ScriptedProvider) -> bytes:
        return provider.offer(self.clock, seconds=3_600).SerializeToString(deterministic=True)


@asynccontextmanager
async def town(folder: Path) -> AsyncIterator[Town]:
    made = Town(folder)
    async with running(folder / "scheduler", made.chain, made.clock) as market:
        made.market = market
        yield made


@asynccontextmanager
async def hearing(link: Link, market: Market) -> AsyncIterator[asyncio.Task[None]]:
    """The daemon's own loop over a link."""
    task = asyncio.create_task(daemon._hear(link, market))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_gossip_alone_lists_an_offer_and_watchers_hear_of_it(tmp_path: Path) -> None:
    async with town(tmp_path) as made:
        provider = made.provider("p1")
        made.market.take_gossip(made.raw_offer(provider))
        assert made.listed(provider)
        watcher = ScriptedClient("client", made.chain.hub(key("client")), made.clock)
        await watcher.connect(made.market)
        call = watcher.stub.WatchOffers(pb.WatchRequest(model=MODEL))
        event = await call.read()
        assert Address(terms.OfferBody.FromString(event.offer.body).provider) == provider.address
        call.cancel()
        await watcher.close()


async def test_gossip_of_an_unregistered_provider_is_listed_once_the_chain_backs_it(tmp_path: Path) -> None:
    async with town(tmp_path) as made:
        provider = made.provider("p1", registered=False)
        made.market.take_gossip(made.raw_offer(provider))
        assert not made.listed(provider)
        made.provider("p1")
        assert made.listed(provider)


async def test_gossip_that_is_refused_leaves_the_book_as_it_was(tmp_path: Path) -> None:
    async with town(tmp_path) as made:
        provider = made.provider("p1")
        first, second = made.raw_offer(provider), provider.offer(made.clock)
        made.market.take_gossip(first)
        before = made.market.listings.revision
        second.signature = bytes(65)
        for bad in (b"", b"junk", second.SerializeToString(), bytes(10**6)):
            made.market.take_gossip(bad)
        assert made.listed(provider)
        assert made.market.listings.revision == before
        listing = made.market.listings.get(provider.address)
        assert listing is not None
        assert listing.raw == first


async def test_daemon_reads_the_snapshot_at_start_and_then_what_comes(tmp_path: Path) -> None:
    async with town(tmp_path) as made, running_link(tmp_path, "a", registry=DOMAIN.contract) as link:
        early, late = made.provider("early"), made.provider("late")
        await link.announce(made.raw_offer(early))
        bootstrap = tuple(link.addresses)
        async with running_link(tmp_path, "b", registry=DOMAIN.contract, bootstrap=bootstrap) as other, hearing(link, made.market):
            await until(lambda: made.listed(early))
            await other.announce(made.raw_offer(late))
            await until(lambda: made.listed(late))


async def test_daemon_hears_on_when_the_p2p_process_dies_before_the_snapshot(tmp_path: Path) -> None:
    async with town(tmp_path) as made, running_link(tmp_path, "a", registry=DOMAIN.contract) as link:
        provider = made.provider("p1")
        await link.announce(made.raw_offer(provider))
        assert link.pid is not None
        os.kill(link.pid, signal.SIGKILL)
        async with hearing(link, made.market) as task:
            await until(lambda: made.listed(provider) or task.done())
            assert not task.done(), task.exception()
        assert link.restarts == 1

"""What gossip lost or never told, a snapshot brings: whole books, in pages, to whoever joins late."""

from __future__ import annotations

import asyncio
from pathlib import Path

from p2p_net import hears, knows, make_offer, running_link, until, wallet

GOSSIP_MEMORY_SECONDS = 6.0
"""libp2p's message cache is replayed to a new peer for 5 heartbeats of a second."""


async def test_late_joiner_learns_a_book_of_several_pages_that_gossip_no_longer_tells(tmp_path: Path) -> None:
    quiet = {"announce_seconds": 3600.0, "resync_seconds": 3600.0}
    big = [make_offer(wallet(number), 1, endpoint="x" * 60_000) for number in range(1, 31)]  # 1.8 MB; a page is 1 MB
    async with running_link(tmp_path, "hub", **quiet) as hub:
        for offer in big:
            await hub.announce(offer)
        await asyncio.sleep(GOSSIP_MEMORY_SECONDS)
        assert set(await hub.snapshot()) == set(big)
        async with running_link(tmp_path, "late", bootstrap=tuple(hub.addresses), **quiet) as late:
            mine, at_hub = make_offer(wallet(99), 1), hub.offers()
            await late.announce(mine)
            await hears(at_hub, mine)
            await knows(late, *big, mine)
            assert (await late.status())["snapshot_fresh"] == len(big)
            assert int((await hub.status())["snapshots_served"]) >= 2


async def test_offer_that_gossip_lost_arrives_with_the_next_resync(tmp_path: Path) -> None:
    async with (
        running_link(tmp_path, "hub", announce_seconds=3600.0) as hub,
        running_link(tmp_path, "a", bootstrap=tuple(hub.addresses), announce_seconds=3600.0, resync_seconds=1.0) as a,
    ):

        async def first_snapshot_is_over() -> bool:
            return int((await a.status()).get("snapshots_read", 0)) >= 1

        await until(first_snapshot_is_over)
        burst = [make_offer(wallet(number), 1) for number in range(1, 9)]
        await asyncio.gather(*map(hub.announce, burst))  # only the newest is published; the rest is for the resync
        await knows(a, *burst)

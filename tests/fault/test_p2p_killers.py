"""What one hostile peer can do to a p2p process: it must not end it, slow it, or get anything into its book.

The first three attacks each end an unguarded py-libp2p 0.8.1 host with one message (measured).
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from p2p_net import PATIENCE_SECONDS, hears, make_offer, running_link, until, wallet

from gpumarket.p2p.link import Link

ATTACKER = Path(__file__).with_name("p2p_attacker.py")

ATTACKS = {
    "garbage_protobuf": "misconduct",
    "bad_key_random_sender": "bad_message",
    "bad_key_empty_sender": "bad_message",
    "oversize_offer": "gossip_oversize",
    "unsigned_offer": "gossip_invalid",
    "flood": "rate_limited",
    "crowded_rpc": "misconduct",
    "invented_topics": "other_topic",
    "huge_length_prefix": "misconduct",
    "many_streams": "streams_refused",
    "garbage_snapshot_request": "snapshots_rejected",
}
"""Each attack and the victim's counter that proves it arrived and was seen for what it is."""


async def attack(name: str, victim: Link) -> int:
    """Exit status of the attacker."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ATTACKER), name, victim.addresses[0]), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_victim_of_every_attack_lives_and_still_hears_its_friend(tmp_path: Path) -> None:
    async with running_link(tmp_path, "victim") as victim, running_link(tmp_path, "friend", bootstrap=tuple(victim.addresses)) as friend:
        pid, news = victim.pid, victim.offers()
        for sequence, (name, counter) in enumerate(ATTACKS.items(), start=1):
            before = (await victim.status()).get(counter, 0)
            await attack(name, victim)
            await until(lambda: _counted_more(victim, counter, before))  # noqa: B023  awaited at once
            fresh = make_offer(wallet(1), sequence)
            await friend.announce(fresh)
            await hears(news, fresh)
            assert (victim.pid, victim.restarts) == (pid, 0), f"{name} ended the process: {victim.last_error}"
            assert await victim.snapshot() == [fresh], name


async def test_plaintext_peer_is_refused_and_a_noise_peer_is_not(tmp_path: Path) -> None:
    async with running_link(tmp_path, "victim") as victim:
        assert await attack("plaintext", victim) == 3
        assert await attack("nothing", victim) == 0
        assert victim.restarts == 0


async def test_stale_sequence_from_the_network_does_not_replace_a_newer_offer(tmp_path: Path) -> None:
    old, new = make_offer(wallet(1), 1), make_offer(wallet(1), 2)
    async with running_link(tmp_path, "hub") as hub:
        news = hub.offers()
        async with running_link(tmp_path, "a", bootstrap=tuple(hub.addresses)) as a:
            await a.announce(new)
            await hears(news, new)
        async with running_link(tmp_path, "replayer", bootstrap=tuple(hub.addresses)) as replayer:
            await replayer.announce(old)  # it starts from an empty book, so to itself the old offer is fresh
            await until(lambda: _counted_more(hub, "gossip_stale", 0))
            assert await hub.snapshot() == [new]


async def _counted_more(link: Link, counter: str, before: int | str) -> bool:
    return int((await link.status()).get(counter, 0)) > int(before)

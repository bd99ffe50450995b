"""GPU proofs as long as a provider is here: repeated with fresh seeds, told to watchers, and the end of matching when one fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from p2p_net import until
from scheduler_world import SCHEDULER, TOKEN, HandChain, HandClock, ScriptedClient, ScriptedProvider, key, running

from gpumarket.v1 import market_pb2 as pb


async def test_proof_is_repeated_with_a_fresh_seed_and_one_that_fails_ends_matching(tmp_path: Path) -> None:
    clock = HandClock()
    chain = HandChain(SCHEDULER.address, clock)
    provider, client = ScriptedProvider("p1", tmp_path), ScriptedClient("client", chain.hub(key("client")), clock)
    async with running(tmp_path / "s", chain, clock, challenge_repeat_seconds=0.05) as market:
        await client.connect(market)
        await provider.start(chain)
        await provider.ready(market, clock)
        watch = client.stub.WatchOffers(pb.WatchRequest())
        assert await next_rate(watch) > 0
        await until(lambda: len(provider.seeds) >= 3)
        assert len(set(provider.seeds)) == len(provider.seeds)
        assert (await client.match(client.job(), pay=TOKEN)).HasField("granted")

        provider.honest_gpu = False
        await provider.told(lambda down: "GPU proof failed" in down.notice)
        assert await next_rate(watch) == 0, "watchers are told that no proof holds"
        refused = await client.match(client.job(), pay=TOKEN)
        assert [r.filter for r in refused.no_match.removed] == ["gpu_proof"]

        provider.honest_gpu = True
        await provider.told(lambda down: not down.notice)
        assert await next_rate(watch) > 0
        assert (await client.match(client.job(), pay=TOKEN)).HasField("granted")
        watch.cancel()
        await provider.stop()
        await client.close()


async def next_rate(watch: Any) -> int:
    """What the next event of an offer says was proven."""
    while True:
        event = await watch.read()
        if event.HasField("offer"):
            return int(event.proven_mflops)

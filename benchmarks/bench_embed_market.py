"""Embeddings bought on the market against the bare engine process: texts per second, wall clock, batch 64, check probability 0.05.

The same texts and the same kind of engine process, one torch thread each. On the market every batch is a whole job: tokenizing, order,
voucher, lease, rows streamed against signed acks, receipt, claim, and for one in twenty a check that the second provider sells. Every
job is bound to the first provider, so that a second engine does not help, and the same number of jobs is in flight on both sides. Rounds
alternate; medians are compared.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bench_embed_engine import read_paragraphs, row, tokenize

from gpumarket.core.units import parse_address
from gpumarket.node.engine.base import EmbedRequest
from gpumarket.node.engine.process import EngineProcess
from gpumarket.node.models.minilm import minilm_path
from gpumarket.sdk import Client
from gpumarket.sdk.constraints import Constraints
from gpumarket.testnet.network import Network
from gpumarket.testnet.plan import MINILM, ModelPlan, Plan, ProviderPlan

BATCH = 64
JOBS = 15
IN_FLIGHT = 4
ROUNDS = 3


def run() -> list[dict[str, object]]:
    """Rows (name, value, unit, compared_with)."""
    return asyncio.run(_run())


async def _run() -> list[dict[str, object]]:
    texts = read_paragraphs(BATCH * 4)
    batches = [texts[at : at + BATCH] for at in range(0, len(texts), BATCH)]
    requests = [EmbedRequest(tuple(tokenize(batch))) for batch in batches]
    providers = tuple(ProviderPlan(name, (ModelPlan(MINILM, "0.02"),)) for name in ("seller", "checker"))
    with tempfile.TemporaryDirectory() as folder:
        async with Network(Path(folder), Plan(providers, client={"check_probability": 0.05, "exposure": "5"})) as network:
            only = Constraints(require_provider=parse_address(network.ready["seller"]["address"]))
            engine = EngineProcess("embed", minilm_path())
            await engine.start()
            async with Client.from_env(config=network.client_config) as market:

                async def buy(index: int) -> None:
                    result = await market.embed(MINILM, batches[index % len(batches)], constraints=only)
                    assert len(result) == BATCH

                async def compute(index: int) -> None:
                    rows = [part async for part in engine.embed(requests[index % len(requests)])]
                    assert sum(map(len, rows)) == BATCH

                await _rate(buy, IN_FLIGHT)  # opens the channel and fills the caches
                await _rate(compute, IN_FLIGHT)
                bought, computed = [], []
                for _ in range(ROUNDS):
                    computed.append(await _rate(compute, JOBS))
                    bought.append(await _rate(buy, JOBS))
            await engine.close()
    market_rate, engine_rate = statistics.median(bought), statistics.median(computed)
    return [
        row("embed_market_texts_per_s", market_rate, "texts/s", f"batch {BATCH}, {IN_FLIGHT} jobs in flight, p = 0.05"),
        row("embed_market_ratio_to_engine", market_rate / engine_rate, "ratio", f"the bare engine process, {IN_FLIGHT} batches in flight"),
    ]


async def _rate(work: Callable[[int], Awaitable[None]], jobs: int) -> float:
    """Texts per second of `jobs` batches, IN_FLIGHT at a time."""
    started = time.perf_counter()
    queue = iter(range(jobs))

    async def worker() -> None:
        for index in queue:
            await work(index)

    await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
    return jobs * BATCH / (time.perf_counter() - started)


if __name__ == "__main__":
    for line in run():
        print(line)

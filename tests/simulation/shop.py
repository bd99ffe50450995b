"""What the simulated roles share: keys, settings, models and engines, and what a process stands on.

Prices are high and limits low, so that a handful of jobs meets every limit of money.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from simulation.chain_model import SimChain
from simulation.virtual import Process
from simulation.wire import Network

from gpumarket.core.errors import GpumarketError
from gpumarket.core.signing import Domain, LocalKey, channels_domain, market_domain
from gpumarket.core.terms import ManifestFile, ModelManifest, Task, keccak256
from gpumarket.core.units import Address, Hash, Money
from gpumarket.node.admission import OnSale
from gpumarket.node.engine.base import Chunk, EmbedRequest, GenerateRequest, Segment
from gpumarket.node.settings import ProviderSettings
from gpumarket.scheduler.settings import SchedulerSettings
from gpumarket.sdk.settings import ClientSettings
from gpumarket.settlement.redeemer import Redeemer
from gpumarket.settlement.verification.profiles import EMBED_FP32, TEXT_FP32

CHAIN_ID, TOKEN = 31_337, 10**18
DOMAIN: Domain = market_domain(CHAIN_ID, Address(b"\x11" * 20))
CHANNELS: Domain = channels_domain(CHAIN_ID, Address(b"\x22" * 20))
CLIENT, SCHEDULER = LocalKey(keccak256(b"sim client")), LocalKey(keccak256(b"sim scheduler"))
PROVIDERS = [LocalKey(keccak256(b"sim provider %d" % i)) for i in range(3)]
OWNERS = [Address(keccak256(b"sim owner %d" % i)[:20]) for i in range(3)]
NOWHERE = Path("/nonexistent")
TEXT_PRICES, EMBED_PRICE = (20_000 * TOKEN, 60_000 * TOKEN), 50_000 * TOKEN
"""Per million units: a token costs 0.06, an embedded one 0.05, so that deposits and limits bite."""
WINDOW_UNITS, EMBED_WINDOW_UNITS = 4, 8
SCHEDULER_SETTINGS = SchedulerSettings(
    state=NOWHERE,
    check_seconds=12,
    claim_grace_seconds=15,
    max_job_seconds=120,
    channel_margin_seconds=100,
    window_units=WINDOW_UNITS,
    embed_window_units=EMBED_WINDOW_UNITS,
    spoke_deposit="6",
    spoke_refill="2",
    redeem_seconds=30.0,
)
PROVIDER_SETTINGS = ProviderSettings(
    state=NOWHERE,
    window_units_max=WINDOW_UNITS,
    embed_window_units_max=64,
    ack_seconds=6.0,
    final_ack_seconds=4.0,
    channel_margin_seconds=50,
    claim_retry_seconds_max=8.0,
    credit="4",
    redeem_seconds=25.0,
)
CLIENT_SETTINGS = ClientSettings(
    state=NOWHERE,
    deposit="8",
    exposure="4",
    check_probability=0.4,
    check_share=0.5,
    job_seconds=40,
    attempts_max=3,
    stall_seconds=8.0,
    patience_seconds=6.0,
    busy_seconds=3.0,
    failover_seconds=3.0,
    channel_days=1,
)
PRESENCE_SECONDS, TICK_SECONDS = 2.0, 2.0


class SimRandom:
    """`core.ports.Random` of a seed."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def token(self, size: int) -> bytes:
        return self._rng.randbytes(size)


@dataclass
class Common:
    """What every process of a world stands on."""

    net: Network
    chain: SimChain
    rng: random.Random

    def process(self, name: str) -> Process:
        return Process(self.net.timeline, name)


def key_hash(endpoint: str) -> Hash:
    """In place of a TLS key."""
    return Hash(keccak256(endpoint.encode()))


def manifest(task: Task) -> ModelManifest:
    file = ManifestFile("config.json", Hash(keccak256(task.name.encode())), 3)
    return ModelManifest(task.name.lower(), task, "float32", "none", "Apache-2.0", 512, (file,))


MODELS = {
    Task.GENERATE: OnSale(manifest(Task.GENERATE), TEXT_FP32.digest, Money(TEXT_PRICES[0]), Money(TEXT_PRICES[1]), 4),
    Task.EMBED: OnSale(manifest(Task.EMBED), EMBED_FP32.digest, Money(EMBED_PRICE), Money(0), 4),
}


def true_token(prompt: Sequence[int], position: int) -> int:
    """The model: any function of prompt and position."""
    return (sum(prompt) * 31 + position * 7) % 1_000


class SimEngine:
    """An engine that answers a little at a time. A cheat's rows and tokens are wrong, and so are its checks of honest work."""

    def __init__(self, task: Task, *, cheats: bool, rng: random.Random) -> None:
        self.task = task.name.lower()
        self._cheats, self._rng = cheats, rng

    async def start(self) -> None:
        await asyncio.sleep(0.01)

    async def embed(self, request: EmbedRequest) -> AsyncIterator[NDArray[np.float32]]:
        for ids in request.inputs:
            await self._work()
            wrong = 0.5 if self._cheats else 0.0
            yield np.array([[len(ids), ids[0], 0.25 + wrong]], dtype=np.float32)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        at, wanted = len(request.prefix), request.max_tokens
        while at < wanted:
            await self._work()
            size = min(wanted - at, self._rng.randint(1, 3))
            tokens = tuple(true_token(request.prompt, at + i) + (1 if self._cheats else 0) for i in range(size))
            at += size
            yield Chunk(tokens, "length" if at == wanted else "")

    async def replay(self, request: GenerateRequest, output: Sequence[int], segments: Sequence[Segment] = ()) -> NDArray[np.float32]:
        await self._work()
        truth = [true_token(request.prompt, i) for i in range(len(output))]
        return np.array([0.0 if o == t else 3.0 for o, t in zip(output, truth, strict=True)], dtype=np.float32)

    async def stats(self) -> Mapping[str, object]:
        return {"sandbox": "process"}

    async def close(self) -> None:
        """Nothing runs."""

    async def _work(self) -> None:
        await asyncio.sleep(self._rng.choice((0.01, 0.05, 0.3)))


async def keep_redeeming(redeemer: Redeemer, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        await refusable(redeemer.redeem_due())


async def refusable(work: Coroutine[Any, Any, Any]) -> None:
    try:
        await work
    except GpumarketError:
        return

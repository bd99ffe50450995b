"""One market in one process: client, scheduler, providers and chain over a bad network, all in virtual time, from one seed."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import structlog
from simulation.chain_model import SimChain
from simulation.client_role import ClientRole
from simulation.medium import Medium
from simulation.provider_role import ProviderRole
from simulation.scheduler_role import SchedulerRole
from simulation.shop import CHANNELS, OWNERS, PROVIDERS, SCHEDULER, TOKEN, Common, key_hash
from simulation.virtual import Timeline, running_process
from simulation.wire import CALM, Channel, Network

from gpumarket.core.units import Hash
from gpumarket.node.tables import metadata as PROVIDER_TABLES
from gpumarket.scheduler.tables import metadata as SCHEDULER_TABLES
from gpumarket.sdk.tables import METADATA as CLIENT_TABLES
from gpumarket.settlement.chain.view import PROVIDER, NodeOnChain

Role = ClientRole | SchedulerRole | ProviderRole
DIALLERS = ("gpumarket.sdk.hub", "gpumarket.sdk.peers", "gpumarket.node.peers")
STAKE = 1_000 * TOKEN
NETWORKS: dict[int, Network] = {}
"""By timeline: where a process's diallers reach."""


class World:
    """Everything, and the faults that can befall it. `cheats` are the indices of providers whose answers are wrong."""

    def __init__(self, seed: int, *, providers: int = 3, cheats: tuple[int, ...] = ()) -> None:
        self.rng = random.Random(seed)
        self.timeline = Timeline()
        self.net = Network(self.timeline, self.rng)
        NETWORKS[id(self.timeline)] = self.net
        self.chain = SimChain(self.timeline, self.rng, CHANNELS)
        common = Common(self.net, self.chain, self.rng)
        self._register(providers)
        self.providers = [ProviderRole(common, i, media()[2 + i], cheats=i in cheats) for i in range(providers)]
        self.scheduler = SchedulerRole(common, media()[1], self.providers)
        self.client = ClientRole(common, media()[0])
        self.crashes = 0
        self.closed_alone: set[Hash] = set()
        """Channels whose payer's key asked the contract alone, with no daemon's knowledge."""

    @property
    def roles(self) -> list[Role]:
        return [self.client, self.scheduler, *self.providers]

    def run(self, seconds: float) -> None:
        self.timeline.run(seconds)

    def crash(self, role: Role) -> None:
        """Kill the role's process."""
        if role.alive:
            self.crashes += 1
            role.process.kill()

    def crash_at(self, role: Role, commits: int, *, after: bool) -> None:
        """Kill the role's process at its n-th commit from now."""
        role.medium.arm(commits, after=after, on_crash=lambda: self.crash(role))

    def restart(self, role: Role) -> None:
        """Start what is dead; the new process reads the medium."""
        if not role.alive:
            role.medium.disarm()
            role.start()

    def heal(self) -> None:
        """No more faults: everybody up, everybody reachable."""
        self.net.weather = CALM
        self.net.cut.clear()
        self.chain.come_back()
        for role in self.roles:
            role.medium.seconds = 0.004
            role.medium.disarm()
            self.restart(role)

    def slow_disks(self) -> None:
        """Some disks take long from now on."""
        for role in self.roles:
            role.medium.seconds = self.rng.choice((0.004, 0.05, 0.4))

    def close(self) -> None:
        for role in self.roles:
            role.process.kill()
        NETWORKS.pop(id(self.timeline), None)

    def _register(self, providers: int) -> None:
        for i in range(providers):
            node = NodeOnChain(PROVIDERS[i].address, OWNERS[i], PROVIDER, STAKE, tls_key_hash=key_hash(f"provider-{i}:1"))
            self.chain.nodes[node.operator] = node
        self.chain.nodes[SCHEDULER.address] = NodeOnChain(
            SCHEDULER.address, SCHEDULER.address, 2, STAKE, tls_key_hash=key_hash("scheduler:1"), endpoint="scheduler:1"
        )


@cache
def media() -> tuple[Medium, ...]:
    """The disks, made once: client, scheduler, three providers."""
    return tuple(Medium(tables) for tables in (CLIENT_TABLES, SCHEDULER_TABLES, *[PROVIDER_TABLES] * 3))


@contextmanager
def simulated_lines() -> Iterator[None]:
    """The product's diallers reach the simulated network."""

    async def dial(endpoint: str, key_hash: bytes) -> Channel:
        process = running_process()
        return await NETWORKS[id(process.timeline)].dial(endpoint, key_hash)

    with pytest.MonkeyPatch.context() as patch:
        structlog.configure(processors=[_drop])
        for module in DIALLERS:
            patch.setattr(f"{module}.open_channel", dial)
        patch.setattr("gpumarket.sdk.challenging.LOOK_SECONDS", 3.0)  # blocks come every 5 s here: looking more often shows nothing new
        patch.setattr("sys.unraisablehook", lambda _: None)  # what killed processes' coroutines say when they are collected
        gc.collect()
        gc.freeze()
        try:
            yield
        finally:
            structlog.reset_defaults()
            gc.unfreeze()
            gc.collect()


def wiped() -> None:
    """Empty disks for the next world."""
    for medium in media():
        medium.wipe()


def _drop(_logger: Any, _name: str, _event: Any) -> Any:
    """Millions of log lines that nobody reads would cost minutes."""
    raise structlog.DropEvent

"""Chaos on a market of processes: seeded faults under a steady load, then the auditor's word.

FOLDER/faults.jsonl has every fault with its planned and its true times, jobs.jsonl every job, chaos.json what came of it. Detection is the
time from the moment a fault is there to the moment the client has written down that its attempt at that provider is over (it goes
elsewhere then); only attempts that ran when the fault came are counted. Recovery is the time from the end of a fault to the next job that
began after it and ended well.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpumarket.core.errors import GpumarketError
from gpumarket.core.units import Hash
from gpumarket.settlement.chain import Chain, connect
from gpumarket.testnet import audit, chain_facts, chaos_schedule, keys, ledgers, plan, settings_file
from gpumarket.testnet.chaos_faults import Breaker, Watch, until
from gpumarket.testnet.chaos_report import ChaosReport, of_files
from gpumarket.testnet.chaos_schedule import Fault
from gpumarket.testnet.network import Network
from gpumarket.testnet.plan import CLIENT, SCHEDULER
from gpumarket.testnet.ports import free_port
from gpumarket.testnet.relay import Relay

PROVIDERS, CLIENTS = 3, 2
FUNDED_WEI = hex(1_000 * 10**18)
ENDING_SECONDS = 240.0
"""Longest wait for the clients to end what they began."""
REDEEMING_SECONDS = 120.0
AGAIN_SECONDS = 6.0
"""Asked again, for a payee whose view of the chain was some blocks behind."""
JOB_SECONDS = 60
_POLL_SECONDS = 0.1

Tick = Callable[[float, str], None]
"""Told the share of the time that is over, and what happens."""


@dataclass(frozen=True, slots=True)
class ChaosOptions:
    """`seed` fixes faults and load; `folder` is the testnet's, and must be new."""

    folder: Path
    minutes: float
    seed: int
    providers: int = PROVIDERS


async def run(options: ChaosOptions, say: Callable[[str], None], tick: Tick = lambda share, what: None) -> ChaosReport:
    """The whole run. Raises what could not be done; what does not hold is in `ChaosReport.problems`."""
    async with contextlib.AsyncExitStack() as stack:
        ways = await _open_ways(stack, options.providers)
        network = Network(options.folder, _plan(ways), say)
        ways.network = network
        network.environment.update({name: {"GPUMARKET_CHAIN_RPC_URL": f"http://{relay.address}"} for name, relay in ways.chain.items()})
        await stack.enter_async_context(network)
        return await Chaos(options, network, ways, say, tick).run()


@dataclass
class Ways:
    """Relays that stand before the roles, and the ports that these listen on."""

    serving: dict[str, Relay] = field(default_factory=dict)
    """The way to each daemon, the scheduler's too."""
    chain: dict[str, Relay] = field(default_factory=dict)
    """Each provider's way to the chain."""
    ports: dict[str, int] = field(default_factory=dict)
    network: Network | None = None

    def anvil(self) -> tuple[str, int]:
        """Where the chain's node listens. Raises ConnectionError while there is none."""
        if self.network is None:
            raise ConnectionError("no chain runs yet")
        return self.network.anvil.host, self.network.anvil.port


async def _open_ways(stack: contextlib.AsyncExitStack, providers: int) -> Ways:
    ways = Ways()
    for name in (SCHEDULER, *(f"provider-{n + 1}" for n in range(providers))):
        ways.ports[name] = port = free_port()
        ways.serving[name] = Relay(lambda port=port: ("127.0.0.1", port))  # type: ignore[misc]
        if name != SCHEDULER:
            ways.chain[name] = Relay(ways.anvil)
    for relay in (*ways.serving.values(), *ways.chain.values()):
        await relay.open()
        stack.push_async_callback(relay.close)
    return ways


def _plan(ways: Ways) -> plan.Plan:
    """Honest providers with both models; times short enough that everything has its end soon after the last fault."""

    def reached_at(name: str) -> dict[str, Any]:
        return {"listen": f"127.0.0.1:{ways.ports[name]}", "advertise": ways.serving[name].address}

    sellers = tuple(
        plan.ProviderPlan(seller.name, seller.models, settings=reached_at(seller.name))
        for seller in plan.honest(len(ways.serving) - 1, warm=True)
    )
    scheduler = {**reached_at(SCHEDULER), "check_seconds": 10, "claim_grace_seconds": 10}
    client = {"check_probability": 0.1, "job_seconds": JOB_SECONDS, "stall_seconds": 6.0, "patience_seconds": 20.0}
    return plan.Plan(sellers, scheduler=scheduler, client=client)


class Chaos:
    """One run over one network that is up."""

    def __init__(self, options: ChaosOptions, network: Network, ways: Ways, say: Callable[[str], None], tick: Tick) -> None:
        self.options, self.network, self.say, self.tick = options, network, say, tick
        self.root = network.folder.root
        self.clients = [CLIENT, *(f"{CLIENT}-{n}" for n in range(2, CLIENTS + 1))]
        states = [network.folder.state(name) for name in self.clients]
        self._watch = Watch(states)
        self.breaker = Breaker(network, ways.serving, ways.chain, self._watch, self._start_load, self._record)
        self.total_seconds = 60.0 * options.minutes

    async def run(self) -> ChaosReport:
        """Load, faults, healing, the end of every job, audit."""
        providers = [name for name in self.network.names() if name != SCHEDULER]
        faults = chaos_schedule.schedule(self.options.seed, self.total_seconds, providers, self.clients)
        self._add_clients()
        for name in self.clients:
            self._start_load(name)
        await self._until_working(providers)
        started = time.monotonic()
        self.say(f"{len(faults)} faults in {self.options.minutes:g} minutes, seed {self.options.seed}")
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch_roles())
            ticking = group.create_task(self._tick(started))
            lanes = [group.create_task(self._lane(lane, faults, started)) for lane in (chaos_schedule.SELLERS, chaos_schedule.MARKET)]
            await asyncio.wait(lanes)
            await asyncio.sleep(max(0.0, started + self.total_seconds - time.monotonic()))
            watching.cancel()
            ticking.cancel()
        await self._end_load()
        return await self._judge(time.monotonic() - started)

    # --- faults ----------------------------------------------------------------------------------------------------------------

    async def _lane(self, kinds: Sequence[chaos_schedule.Kind], faults: Sequence[Fault], started: float) -> None:
        """One fault after another, each at its time or as soon as the one before it is healed; none that would begin in the quiet end."""
        for fault in faults:
            if fault.kind not in kinds:
                continue
            await asyncio.sleep(max(0.0, started + fault.at_seconds - time.monotonic()))
            late = time.monotonic() - started + fault.seconds > self.total_seconds - chaos_schedule.QUIET_SECONDS
            if late:
                self._record("skipped", fault)
                continue
            self.tick((time.monotonic() - started) / self.total_seconds, f"{fault.kind} {fault.target}".strip())
            await self.breaker.inflict(fault)

    def _record(self, event: str, fault: Fault, **more: Any) -> None:
        planned = {"kind": fault.kind, "target": fault.target, "planned_at": fault.at_seconds, "seconds": fault.seconds}
        with (self.root / "faults.jsonl").open("a") as file:
            file.write(json.dumps({"at": round(time.time(), 3), "event": event, **planned, **more}) + "\n")

    async def _watch_roles(self) -> None:
        """Raises GpumarketError when a process ends that nobody broke."""
        while True:
            for name, role in list(self.network.processes.roles.items()):
                if name not in self.breaker.down and (code := role.process.poll()) is not None:
                    raise GpumarketError(f"{name} ended by itself with exit code {code}", hint=f"its log is {role.log}")
            await asyncio.sleep(_POLL_SECONDS)

    async def _tick(self, started: float) -> None:
        while True:
            self.tick(min(1.0, (time.monotonic() - started) / self.total_seconds), "")
            await asyncio.sleep(1.0)

    # --- load ------------------------------------------------------------------------------------------------------------------

    def _add_clients(self) -> None:
        """Settings and coin of the clients beside the network's own; they take tokens from the faucet."""
        folder = self.network.folder
        for name in self.clients[1:]:
            key, key_file, password_file = keys.wallet(folder.keys, name)
            self.network.wallets[name] = key
            self.network.anvil.rpc("anvil_setBalance", f"0x{key.address.hex()}", FUNDED_WEI)
            own = {"state": folder.state(name), "key_file": key_file, "password_file": password_file}
            section = {"lock_file": folder.lock_file, "faucet": True, **own, **self.network.plan.client}
            where = {"rpc_url": self.network.anvil.url, "address_book": folder.book}
            settings_file.write(folder.config(name), {"client": section, "chain": where})

    def _start_load(self, client: str) -> None:
        config = str(self.network.folder.config(client))
        seed = f"{self.options.seed}{self.clients.index(client)}"
        command = [sys.executable, "-m", "gpumarket.testnet.chaos_load", "--config", config]
        self.network.processes.spawn(load_of(client), [*command, "--log", str(self.root / "jobs.jsonl"), "--seed", seed])

    async def _until_working(self, providers: Sequence[str]) -> None:
        """Until every client has had an answer and every provider has given one: channels take some blocks, and models load for a while."""
        self.say("waiting for the first answers")
        sellers = [self.network.wallets[name].address for name in providers]

        def working() -> bool:
            answered = {line["client"] for line in self._jobs() if line["event"] == "done"}
            return answered == set(self.clients) and all(self._watch.served(seller) for seller in sellers)

        async with asyncio.timeout(ENDING_SECONDS):
            await until(working)

    async def _end_load(self) -> None:
        """Everything healed; every client ends what it began."""
        self.say("healing, and waiting for the clients to end what they began")
        await self.breaker.heal()
        roles = self.network.processes.roles
        for client in self.clients:
            self.network.processes.signal(load_of(client), signal.SIGTERM)
        async with asyncio.timeout(ENDING_SECONDS):
            await until(lambda: all(roles[load_of(client)].process.poll() is not None for client in self.clients))
        for client in self.clients:
            if code := roles.pop(load_of(client)).process.returncode:
                raise GpumarketError(f"the load of {client} ended with exit code {code}", hint=str(self.network.folder.logs))

    def _jobs(self) -> list[dict[str, Any]]:
        file = self.root / "jobs.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []

    # --- the end ---------------------------------------------------------------------------------------------------------------

    async def _judge(self, seconds: float) -> ChaosReport:
        self.say("waiting until everything is settled")
        sources = audit.of_folder(self.root)
        found = await audit.audit(sources, say=self.say)
        if found.holds:
            self.say("redeeming every voucher")
            await self._redeem(sources)
            found = await audit.audit(sources, say=self.say)
        report = of_files(self.root, self.options.seed, seconds, found)
        (self.root / "chaos.json").write_text(json.dumps(report.as_json(), indent=2) + "\n")
        return report

    async def _redeem(self, sources: audit.Sources) -> None:
        """Until the chain has paid every provider's vouchers. Raises TimeoutError where it does not."""
        chain = await connect(sources.chain)
        try:
            async with asyncio.timeout(REDEEMING_SECONDS):
                while await self._unredeemed(chain):
                    for name in self.network.names():
                        self.network.processes.signal(name, signal.SIGUSR1)
                    await asyncio.sleep(AGAIN_SECONDS)
        finally:
            await chain.close()

    async def _unredeemed(self, chain: Chain) -> bool:
        facts = await chain_facts.read_facts(chain)
        books = [ledgers.provider_books(self.network.folder.state(name)) for name in self.network.names() if name != SCHEDULER]
        return any(facts.channels[Hash(row.channel)].claimed < row.cumulative for book in books for row in book.vouchers)


def load_of(client: str) -> str:
    """Name of the process that is a client's load."""
    return f"load-{client}"

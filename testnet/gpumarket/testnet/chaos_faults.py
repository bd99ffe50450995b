"""How each kind of fault is inflicted and healed, and how soon its victims' clients notice.

Invariant: `inflict` returns when what was broken works again; `down` names the processes that are ended or stopped on purpose meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from gpumarket.core.errors import JournalError
from gpumarket.testnet import ledgers
from gpumarket.testnet.chaos_schedule import SELLERS, Fault, Kind
from gpumarket.testnet.network import Network
from gpumarket.testnet.plan import SCHEDULER
from gpumarket.testnet.processes import RoleFailed
from gpumarket.testnet.relay import Relay, State

ENGINE, P2P = "gpumarket.node.engine.worker", "gpumarket.p2p.host"
"""Modules that the children of a daemon run."""
MIDSTREAM_SECONDS = 3.0
"""Wait so long for a job at the victim: a fault in the midst of a stream is the one that matters."""
RESTART_SECONDS = 180.0
_POLL_SECONDS = 0.1
AFTERWARDS_SECONDS = 10.0
"""What a fault did may be noticed so long after it: more than the clients' patience with a silent provider."""
CLIENTS_OWN = "client-restart"
"""Why an attempt ends that was its client's fault."""
Attempt = tuple[Path, bytes, int]
"""The client's state folder, the job, the attempt's number."""
Notice = tuple[float, str]
"""Seconds after the fault began, and the reason that the client wrote down."""


async def until(condition: Callable[[], bool]) -> None:
    """Look every moment: what is waited for are files and processes, which tell nobody."""
    while True:
        if condition():
            return
        await asyncio.sleep(_POLL_SECONDS)


class Watch:
    """What the clients' journals say of attempts at one provider. They are read from outside, in transactions of their own."""

    def __init__(self, clients: Sequence[Path]) -> None:
        self._clients = clients

    def running(self, provider: bytes) -> set[Attempt]:
        """Attempts at it that have not ended."""
        return {attempt for attempt, reason in self._attempts(provider) if not reason}

    def served(self, provider: bytes) -> bool:
        """Whether it has completed an attempt."""
        return any(reason == "completed" for _, reason in self._attempts(provider))

    async def ends(self, provider: bytes, attempts: set[Attempt], began: float, over: asyncio.Event) -> list[Notice]:
        """The attempts that end otherwise than completed, until a moment after the fault is `over`: what ends later has other reasons."""
        left, noticed, until_then = set(attempts), list[Notice](), float("inf")
        while left and time.monotonic() < until_then:
            for attempt, reason in self._attempts(provider):
                if attempt in left and reason:
                    left.discard(attempt)
                    if reason not in ("completed", CLIENTS_OWN):
                        noticed.append((round(time.monotonic() - began, 3), reason))
            if over.is_set():
                until_then = min(until_then, time.monotonic() + AFTERWARDS_SECONDS)
            await asyncio.sleep(_POLL_SECONDS)
        return noticed

    def _attempts(self, provider: bytes) -> Iterator[tuple[Attempt, str]]:
        for state in self._clients:
            try:
                found = ledgers.attempts_at(state, provider)
            except JournalError:  # that client has not begun yet
                continue
            yield from (((state, job, number), reason) for (job, number), reason in found.items())


class Breaker:
    """Breaks and mends a network. `record(event, fault, **more)` writes down what happened."""

    def __init__(
        self,
        network: Network,
        serving: Mapping[str, Relay],
        chain: Mapping[str, Relay],
        watch: Watch,
        start_load: Callable[[str], None],
        record: Callable[..., None],
    ) -> None:
        self.network, self.serving, self.chain = network, serving, chain
        self.down: set[str] = set()
        self._watch, self._start_load, self._record = watch, start_load, record
        self._watching: set[asyncio.Task[None]] = set()
        self._chain_up = asyncio.Event()
        self._chain_up.set()
        self._ways: dict[Kind, Callable[[Fault], Awaitable[None]]] = {
            Kind.PROVIDER_KILLED: self._killed,
            Kind.SCHEDULER_KILLED: self._killed,
            Kind.PROVIDER_ENDED: self._ended,
            Kind.PROVIDER_HUNG: self._hung,
            Kind.ENGINE_HUNG: self._engine_hung,
            Kind.LINK_CUT: lambda fault: self._relayed(self.serving[fault.target], State.CUT, fault.seconds),
            Kind.LINK_SLOW: lambda fault: self._relayed(self.serving[fault.target], State.SLOW, fault.seconds),
            Kind.CHAIN_CUT: lambda fault: self._relayed(self.chain[fault.target], State.SWALLOWING, fault.seconds),
            Kind.SCHEDULER_CUT: lambda fault: self._relayed(self.serving[SCHEDULER], State.SWALLOWING, fault.seconds),
            Kind.P2P_KILLED: self._p2p_killed,
            Kind.CHAIN_KILLED: self._chain_killed,
            Kind.CLIENT_KILLED: self._client_killed,
        }

    async def inflict(self, fault: Fault) -> None:
        """Break, wait, mend; what its victims' clients noticed is recorded when they have."""
        victim = self.network.wallets[fault.target].address if fault.kind in SELLERS else b""
        running = await self._midstream(victim) if victim else set[Attempt]()
        began, over = time.monotonic(), asyncio.Event()
        self._record("began", fault, running=len(running))
        if running:
            watching = asyncio.create_task(self._notice(fault, victim, running, began, over))
            self._watching.add(watching)
            watching.add_done_callback(self._watching.discard)
        try:
            await self._ways[fault.kind](fault)
        finally:
            over.set()
        self._record("healed", fault, lasted_seconds=round(time.monotonic() - began, 3))

    async def heal(self) -> None:
        """Wait for what clients still have to notice. Everything else was mended by `inflict`."""
        await asyncio.gather(*self._watching)

    async def _midstream(self, victim: bytes) -> set[Attempt]:
        deadline = time.monotonic() + MIDSTREAM_SECONDS
        await until(lambda: bool(self._watch.running(victim)) or time.monotonic() > deadline)
        return self._watch.running(victim)

    async def _notice(self, fault: Fault, victim: bytes, running: set[Attempt], began: float, over: asyncio.Event) -> None:
        noticed = await self._watch.ends(victim, running, began, over)
        seconds, reasons = [one for one, _ in noticed], [reason for _, reason in noticed]
        self._record("noticed", fault, running=len(running), noticed_seconds=seconds, reasons=reasons)

    # --- ways to break things ----------------------------------------------------------------------------------------------------

    async def _killed(self, fault: Fault) -> None:
        name = fault.target or SCHEDULER
        with self._broken(name):
            self.network.processes.kill(name)
            await asyncio.sleep(fault.seconds)
            await self._restart(name)

    async def _ended(self, fault: Fault) -> None:
        with self._broken(fault.target):
            role = self.network.processes.roles[fault.target]
            role.process.send_signal(signal.SIGTERM)
            await until(lambda: role.process.poll() is not None)
            await self._restart(fault.target)

    async def _hung(self, fault: Fault) -> None:
        self.network.processes.signal(fault.target, signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            self.network.processes.signal(fault.target, signal.SIGCONT)

    async def _engine_hung(self, fault: Fault) -> None:
        engines = self._children(fault.target, ENGINE)
        for engine in engines:
            engine.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            for engine in engines:
                with contextlib.suppress(psutil.NoSuchProcess):  # its daemon gave it up, and has another
                    engine.send_signal(signal.SIGCONT)

    async def _p2p_killed(self, fault: Fault) -> None:
        before = {child.pid for child in self._children(fault.target, P2P)}
        for child in self._children(fault.target, P2P):
            child.kill()
        await until(lambda: bool({child.pid for child in self._children(fault.target, P2P)} - before))

    async def _chain_killed(self, fault: Fault) -> None:
        self._chain_up.clear()
        try:
            await asyncio.to_thread(self.network.anvil.kill)
            await asyncio.sleep(fault.seconds)
            await asyncio.to_thread(self.network.restart_chain)
        finally:
            self._chain_up.set()

    async def _client_killed(self, fault: Fault) -> None:
        name = f"load-{fault.target}"
        with self._broken(name):
            self.network.processes.kill(name)
            await asyncio.sleep(fault.seconds)
            self._start_load(fault.target)

    @staticmethod
    async def _relayed(relay: Relay, state: State, seconds: float) -> None:
        await relay.set(state)
        try:
            await asyncio.sleep(seconds)
        finally:
            await relay.set(State.OPEN)

    # --- mending -----------------------------------------------------------------------------------------------------------------

    async def _restart(self, name: str) -> None:
        """Until it is ready. A daemon that starts while its chain is away says so and ends: whoever supervises it starts it again."""
        deadline = time.monotonic() + RESTART_SECONDS
        while True:
            await self._chain_up.wait()
            self.network.start_role(name)
            try:
                await self.network.wait_ready(name)
                return
            except RoleFailed:
                if time.monotonic() > deadline:
                    raise
                with contextlib.suppress(KeyError):
                    self.network.processes.kill(name)
            await asyncio.sleep(1.0)

    @contextlib.contextmanager
    def _broken(self, name: str) -> Iterator[None]:
        self.down.add(name)
        try:
            yield
        finally:
            self.down.discard(name)

    def _children(self, name: str, module: str) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.network.processes.roles[name].process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ends just now: not one of them
                if child.status() != psutil.STATUS_ZOMBIE and module in child.cmdline():
                    found.append(child)
        return found

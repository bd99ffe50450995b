"""A market of real processes for the fault tests: one testnet, a client, the books of everybody, and the invariants at the end.

Everything here looks from outside: at the roles' processes, their journals and the chain. It never reaches into a role.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gpumarket.core.codec import from_proto, open_offer, parse
from gpumarket.core.errors import ChainError
from gpumarket.core.settings import ChainSettings, load
from gpumarket.core.terms import Ack, Lease, output_chain
from gpumarket.core.units import Address, Hash, Money, parse_address
from gpumarket.node.tables import OPEN, SETTLED
from gpumarket.p2p.link import Link, P2PSettings
from gpumarket.scheduler.lifecycle import AttemptState, JobState
from gpumarket.scheduler.tables import FOREVER
from gpumarket.sdk import Client
from gpumarket.sdk.settings import ClientSettings
from gpumarket.sdk.streaming import ChatStream
from gpumarket.settlement.chain import Chain, connect
from gpumarket.testnet import chain_facts, invariants, keys, ledgers, settings_file
from gpumarket.testnet.evidence import Evidence
from gpumarket.testnet.network import Network
from gpumarket.testnet.plan import CLIENT, SCHEDULER, TINY_LLAMA, ModelPlan, Plan, ProviderPlan
from gpumarket.testnet.processes import clean_environment
from gpumarket.v1 import terms_pb2 as pb

PATIENCE_SECONDS = 240.0
"""Longest wait for anything: generous, since nothing here measures time."""
POLL_SECONDS = 0.1
JOB_SECONDS = 180
"""Long enough for a model that is loaded on a busy machine; only a job that nobody takes up again waits for it."""
SLOTS, QUEUE = 2, 1
PROMPTS = [f"Count the ways in which a market of machines can fail, number {n}, and what each of them costs." for n in range(12)]
MAX_TOKENS = 192
WINDOW = 32
"""How far a provider streams ahead of the acks."""

UNENDED = (JobState.LEASED, JobState.DELIVERED, JobState.CHECKING)


def plan(providers: int = 2) -> Plan:
    """Providers that sell the small Llama only; times short enough that everything is decided while a test waits."""
    sellers = tuple(
        ProviderPlan(
            f"provider-{n + 1}",
            (ModelPlan(TINY_LLAMA, f"0.05{n}", f"0.20{n}"),),
            settings={
                "models": [{"model": TINY_LLAMA, "prompt_price": f"0.05{n}", "output_price": f"0.20{n}", "warm": True, "slots": SLOTS}],
                "queue_limit": QUEUE,
                "ack_seconds": PATIENCE_SECONDS,  # tests let streams rest
            },
        )
        for n in range(providers)
    )
    scheduler = {"check_seconds": 2, "claim_grace_seconds": 5, "window_units": WINDOW}
    client = {"check_probability": 0.0, "job_seconds": JOB_SECONDS}
    return Plan(sellers, scheduler=scheduler, client=client)


NO_CLIENT = ledgers.ClientBooks((), (), (), ())
"""Books of a client that has not begun any: the first test of a market may never open one."""


@dataclass(frozen=True, slots=True)
class Books:
    """What everybody has written down, at one moment."""

    scheduler: ledgers.SchedulerBooks
    providers: Mapping[str, ledgers.ProviderBooks]
    client: ledgers.ClientBooks


class FaultMarket:
    """The testnet under test, and what tests ask of it."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._prompt = ""

    # --- who is who ----------------------------------------------------------------------------------------------------------

    @property
    def providers(self) -> list[str]:
        return [name for name in self.network.names() if name != SCHEDULER]

    def name_of(self, address: bytes) -> str:
        """The role with this wallet."""
        return next(name for name, key in self.network.wallets.items() if key.address == address)

    def address(self, name: str) -> Address:
        return self.network.wallets[name].address

    def pid(self, name: str) -> int:
        return self.network.processes.roles[name].process.pid

    def children(self, name: str, module: str) -> list[psutil.Process]:
        """The child processes of a role that run a module."""
        found = []
        for child in psutil.Process(self.pid(name)).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ends just now: not one of them
                if child.status() != psutil.STATUS_ZOMBIE and module in child.cmdline():
                    found.append(child)
        return found

    def child(self, name: str, module: str) -> psutil.Process:
        """The one child process of a role that runs a module."""
        (found,) = self.children(name, module)
        return found

    # --- client --------------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def client(self, **changes: Any) -> AsyncIterator[Client]:
        """The testnet's client in this process."""
        file = self.network.client_config
        async with Client(load(ClientSettings, file=file, flags=changes, env={}), load(ChainSettings, file=file, env={})) as client:
            yield client

    async def long_prompt(self, client: Client) -> str:
        """A prompt whose greedy answer fills MAX_TOKENS, so that a job with it can be caught in the middle."""
        if not self._prompt:
            for prompt in PROMPTS:
                answer = await client.chat(TINY_LLAMA, prompt, max_tokens=MAX_TOKENS, temperature=0.0)
                if answer.finish_reason == "length":
                    self._prompt = prompt
                    break
        assert self._prompt, "no prompt gives a long answer"
        return self._prompt

    def chat(self, client: Client, prompt: str) -> ChatStream:
        """A long answer, not begun yet."""
        return client.chat(TINY_LLAMA, prompt, stream=True, max_tokens=MAX_TOKENS, temperature=0.0)

    async def begin(self, client: Client) -> tuple[ChatStream, list[str], str]:
        """A chat in the middle of its answer: (stream, pieces so far, the provider that serves it). It rests until it is read on.

        A provider goes one window (32 tokens) ahead of the acks, and acks are sent while the stream is read: it cannot end meanwhile.
        """
        prompt = await self.long_prompt(client)
        stream = self.chat(client, prompt)
        pieces = [await anext(stream.__aiter__())]
        (running,) = self.running_attempts()
        return stream, pieces, self.name_of(running.provider)

    def spawn_client(self, name: str, prompt: str) -> None:
        """A client in a process of its own, on the testnet client's state, that begins a chat and rests in the middle."""
        file = self.network.folder.root / "prompt"
        file.write_text(prompt)
        program = Path(__file__).with_name("fault_client.py")
        argv = [sys.executable, str(program), str(file), TINY_LLAMA, str(MAX_TOKENS)]
        self.network.processes.spawn(name, argv, env={"GPUMARKET_CONFIG": str(self.network.client_config)})

    def running_attempts(self) -> list[Any]:
        """The client's attempts that have not ended, by its journal."""
        return [row for row in self.books().client.attempts if not row.reason]

    async def acknowledged(self) -> bool:
        """Whether a provider has written down an ack of an attempt that runs."""
        return any(row.state == OPEN and row.signed_ack for book in self.books().providers.values() for row in book.attempts)

    # --- books ---------------------------------------------------------------------------------------------------------------

    def books(self) -> Books:
        state = self.network.folder.state
        return Books(
            ledgers.scheduler_books(state(SCHEDULER), self.network.plan.scheduler.get("database", "")),
            {name: ledgers.provider_books(state(name)) for name in self.providers},
            ledgers.client_books(state(CLIENT)) if (state(CLIENT) / ledgers.JOURNAL).exists() else NO_CLIENT,
        )

    async def unpaid(self, name: str) -> int:
        """What a provider holds in vouchers and the chain has not paid yet."""
        async with self.chain() as chain:
            facts = await chain_facts.read_facts(chain)
        return sum(row.cumulative - facts.channels[Hash(row.channel)].claimed for row in self.books().providers[name].vouchers)

    # --- restarts ------------------------------------------------------------------------------------------------------------

    async def restart(self, name: str) -> None:
        """Start a role that was ended, and wait until it is ready."""
        self.network.start_role(name)
        await self.network.wait_ready(name)

    async def heal(self) -> None:
        """Start what does not run."""
        try:
            self.network.anvil.rpc("eth_chainId")
        except ChainError:
            self.network.restart_chain()
        roles = self.network.processes.roles
        for name in self.network.names():
            if name not in roles or roles[name].process.poll() is not None:
                await self.restart(name)

    async def draining(self, name: str) -> bool:
        """Whether a role has begun to drain: its ready file goes first."""
        return not (self.network.folder.state(name) / "ready.json").exists()

    async def matchable(self) -> None:
        """Wait until the scheduler can match every provider again."""
        async with self.chain() as chain:
            await self.network.wait_matchable(chain.book)

    # --- chain ---------------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def chain(self) -> AsyncIterator[Chain]:
        chain = await connect(load(ChainSettings, file=self.network.client_config, env={}))
        try:
            yield chain
        finally:
            await chain.close()

    async def balance(self, name: str) -> Money:
        """Tokens in a role's wallet."""
        async with self.chain() as chain:
            return await chain_facts.balance(chain, self.address(name))

    # --- p2p -----------------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def newcomer(self) -> AsyncIterator[Callable[[], Awaitable[set[str]]]]:
        """A node that joins the p2p network now; calling it tells whose offers it has got."""
        async with self.chain() as chain:
            settings = P2PSettings(
                identity_path=self.network.folder.root / "newcomer.key",
                chain_id=chain.book.chain_id,
                registry=parse_address(chain.book.registry),
                bootstrap=tuple(self.network.ready[SCHEDULER]["p2p"]),
            )
            link = Link(settings)
            await link.start()

            async def known() -> set[str]:
                offers = [open_offer(chain.market_domain, parse(pb.SignedOffer, raw)) for raw in await link.snapshot()]
                return {self.name_of(offer.provider) for offer in offers}

            try:
                yield known
            finally:
                await link.close()

    # --- the end of a test ---------------------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Wait until every claim and every job is decided, and every provider's voucher redeemed."""
        await until(self._decided, "claims or jobs are still open")
        for name in self.network.names():
            self.network.processes.signal(name, signal.SIGUSR1)
        await until(self._redeemed, "vouchers are not redeemed")

    async def check_invariants(self) -> None:
        """Settle, then I1 .. I10 from outside."""
        await self.settle()
        async with self.chain() as chain:
            found = invariants.check_all(await self._scene(chain, await chain_facts.read_facts(chain)))
        broken = {name: seen for name, (holds, seen) in found.items() if not holds}
        assert not broken, broken

    async def _decided(self) -> bool:
        books = self.books()
        claims = all(row.state in SETTLED for book in books.providers.values() for row in book.attempts)
        ledger = books.scheduler
        quiet = not any(row.reserved for row in ledger.spokes) and not any(row.open or row.held for row in ledger.client_channels)
        return claims and quiet and not any(row.live_until == FOREVER for row in ledger.jobs)

    async def _redeemed(self) -> bool:
        books = self.books()
        async with self.chain() as chain:
            facts = await chain_facts.read_facts(chain)
        vouchers = [row for book in books.providers.values() for row in book.vouchers]
        return all(facts.channels[Hash(row.channel)].claimed >= row.cumulative for row in vouchers)

    async def _scene(self, chain: Chain, facts: chain_facts.ChainFacts) -> invariants.Scene:
        books = self.books()
        network = self.network
        pids = [role.process.pid for role in network.processes.roles.values()]
        family = [child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True)]
        secrets = [prompt[:48].encode() for prompt in PROMPTS]
        secrets += [file.read_bytes().strip() for file in network.folder.keys.glob("*.password")]
        secrets += [key.secret.hex().encode() for key in network.wallets.values()]
        evidence = Evidence(
            domain=chain.market_domain,
            channels_domain=chain.channels_domain,
            chain=facts,
            schedulers={SCHEDULER: books.scheduler},
            providers=books.providers,
            clients={CLIENT: books.client},
            exposure={CLIENT: load(ClientSettings, file=network.client_config, env={}).exposure_limit},
        )
        return invariants.Scene(
            books=evidence,
            secrets=secrets,
            places=invariants.log_places(network.folder.logs) + invariants.process_places([*pids, *family]),
            processes=len(pids) + len(family),
            refusals={"a forged voucher": await self._refuses_forged_voucher(chain, facts)},
        )

    async def _refuses_forged_voucher(self, chain: Chain, facts: chain_facts.ChainFacts) -> bool:
        from web3.exceptions import ContractLogicError

        channel = next(iter(facts.channels.values()))
        signature = self.network.wallets[self.providers[0]].sign_digest(bytes(32))
        try:
            await chain.channels.functions.redeem(channel.id, channel.deposit, signature).call()
        except ContractLogicError:
            return True
        return False

    # --- other parties -------------------------------------------------------------------------------------------------------

    def other_client(self, name: str, *, client: Mapping[str, Any] | None = None, chain: Mapping[str, Any] | None = None) -> Path:
        """Settings of a client with a wallet of its own, in which there is nothing."""
        return self._settings(name, CLIENT, {"lock_file": self.network.folder.lock_file, "faucet": False, **(client or {})}, chain)

    def other_daemon(self, role: str) -> Path:
        """Settings of a daemon that was never started, with an empty wallet."""
        section: dict[str, Any] = {}
        if role == "provider":
            section = {"model_store": self.network.folder.store, "models": [{"model": TINY_LLAMA}]}
        return self._settings(f"other-{role}", role, section, None)

    def _settings(self, name: str, section: str, values: Mapping[str, Any], chain: Mapping[str, Any] | None) -> Path:
        folder = self.network.folder
        _, key_file, password_file = keys.wallet(folder.root / "strangers", name)
        paths = {"state": folder.root / f"state of {name}", "key_file": key_file, "password_file": password_file}
        where = {"rpc_url": self.network.anvil.url, "address_book": folder.book, **(chain or {})}
        return settings_file.write(folder.root / f"{name}.toml", {section: {**paths, **values}, "chain": where})

    # --- what the scheduler sees ---------------------------------------------------------------------------------------------

    async def struck_out(self, client: Client, by: str) -> bool:
        """Whether one filter of the scheduler's removes every provider now."""
        found = await client.explain(TINY_LLAMA, "hello")
        return [rejected.filter for rejected in found.rejected] == [by] * len(self.providers)

    # --- command line --------------------------------------------------------------------------------------------------------

    async def cli(self, *argv: str, config: Path | None = None, env: Mapping[str, str] | None = None) -> CliAnswer:
        """Run `gpumarket ... -o json` as a user would, with the client's settings."""
        command = [sys.executable, "-m", "gpumarket.cli.main", *argv, "-o", "json", "--config", str(config or self.network.client_config)]
        return await run_cli(command, env or {})


@dataclass(frozen=True, slots=True)
class CliAnswer:
    """How a command ended."""

    code: int
    document: Any
    stderr: str

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.document["error"]
        return found


async def run_cli(command: Sequence[str], env: Mapping[str, str]) -> CliAnswer:
    """Run a command line to its end; it is killed with the test."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**clean_environment(), **env},
    )
    try:
        stdout, stderr = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    assert stdout, f"no document on stdout; stderr: {stderr.decode()}"
    return CliAnswer(process.returncode, json.loads(stdout), stderr.decode())


async def until(condition: Callable[[], Awaitable[bool]], otherwise: str) -> None:
    """Wait for a condition. Raises AssertionError after PATIENCE_SECONDS."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not await condition():
        assert time.monotonic() < deadline, otherwise
        await asyncio.sleep(POLL_SECONDS)


async def ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process that is about to end."""

    async def gone() -> bool:
        return process.poll() is not None

    await until(gone, "the process does not end")
    return int(process.returncode)


def attempts_of(books: Books, job: bytes) -> list[Any]:
    """The scheduler's attempts of a job, first to last."""
    return sorted((row for row in books.scheduler.attempts if row.job == job), key=lambda row: row.number)


def tokens_of(market: FaultMarket, job: bytes) -> list[bytes]:
    """The output of a job as the client journaled it. Asserts that no item is there twice and none is missing."""
    from sqlalchemy import create_engine, select

    from gpumarket.sdk.tables import OUTPUTS

    engine = create_engine(f"sqlite:///file:{market.network.folder.state(CLIENT) / 'journal.db'}?mode=ro&uri=true")
    try:
        with engine.connect() as connection:
            rows = connection.execute(select(OUTPUTS).where(OUTPUTS.c.job == job).order_by(OUTPUTS.c.first)).all()
    finally:
        engine.dispose()
    items: list[bytes] = []
    for row in rows:
        assert row.first == len(items), f"output {row.first} follows {len(items)} items"
        items += [row.data[i : i + 4] for i in range(0, len(row.data), 4)]
    return items


def last_ack(market: FaultMarket, job: bytes) -> tuple[Ack, Lease]:
    """The client's last ack of a job and the lease that it is of."""
    rows = [row for row in market.books().client.attempts if row.job == job and row.ack]
    newest = max(rows, key=lambda row: row.number)
    ack = from_proto(Ack, parse(pb.SignedAck, newest.ack).ack)
    return ack, from_proto(Lease, parse(pb.SignedLease, newest.lease).lease)


def assert_delivered_once(market: FaultMarket, job: bytes) -> list[bytes]:
    """Every token was delivered exactly once, and the client acked just these: the chain hash of the journal is that of the last ack."""
    tokens = tokens_of(market, job)
    ack, lease = last_ack(market, job)
    assert lease.prefix_units + ack.units == len(tokens)
    assert ack.output_hash == output_chain(tokens)
    return tokens


def assert_paid_once(market: FaultMarket, job: bytes, units: int, *, unacked_max: int = 0) -> None:
    """The attempts of a finished job earned exactly the units delivered, each at its own lease's prices, within the maximum.

    `unacked_max`: what may be missing, where a client died between receiving and acknowledging: that is the provider's exposure.
    """
    from gpumarket.core.terms import JobSpec
    from gpumarket.settlement.pricing import attempt_amount

    books = market.books()
    (row,) = [row for row in books.scheduler.jobs if row.key == job]
    spec = from_proto(JobSpec, parse(pb.JobOrder, row.job_order).spec)
    attempts = attempts_of(books, job)
    assert units - unacked_max <= sum(a.units for a in attempts) <= units
    assert [a.complete for a in attempts] == [False] * (len(attempts) - 1) + [True]
    for attempt in attempts:
        lease = from_proto(Lease, parse(pb.SignedLease, attempt.signed_lease).lease)
        earned = attempt_amount(lease, prompt_units=spec.prompt_units, units=attempt.units, complete=attempt.complete)
        assert attempt.amount == earned
        # one that was never claimed, since its provider was never reached, expires
        ends = (AttemptState.OWED,) if earned else (AttemptState.CLOSED, AttemptState.EXPIRED)
        assert attempt.state in ends, (attempt.number, AttemptState(attempt.state), attempt.units, attempt.reason, len(attempts))
    assert sum(a.amount for a in attempts) <= spec.max_amount

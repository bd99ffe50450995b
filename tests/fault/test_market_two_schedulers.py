"""Two schedulers on one chain, each with its own key, channels and PostgreSQL database. One is killed: the client's next order goes through
the other one, what was begun comes to its end, and the money of both adds up."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fault_market import FaultMarket, plan, until
from postgres_server import Server
from reliability import record

from gpumarket.core.signing import market_domain
from gpumarket.core.units import Hash, hex0x, parse_address, parse_hash
from gpumarket.node.tables import SETTLED
from gpumarket.scheduler.lifecycle import AttemptState
from gpumarket.testnet import chain_facts, keys, ledgers, readiness, settings_file
from gpumarket.testnet.network import READY_SECONDS, Network
from gpumarket.testnet.plan import CLIENT, SCHEDULER, TINY_LLAMA

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SECOND = "second-scheduler"


@dataclass
class TwoSchedulers:
    """A testnet, and a second scheduler beside it."""

    market: FaultMarket
    databases: dict[str, str]

    @property
    def network(self) -> Network:
        return self.market.network

    def configure_second(self) -> None:
        """Its key, with coin for gas, and settings as the first one's."""
        folder = self.network.folder
        self.network.wallets[SECOND], key_file, password_file = keys.wallet(folder.keys, SECOND)
        self.network.anvil.rpc("anvil_setBalance", hex0x(self.market.address(SECOND)), hex(10**21))
        section: dict[str, Any] = {"state": folder.state(SECOND), "key_file": key_file, "password_file": password_file}
        section |= {**self.network.plan.scheduler, "database": self.databases[SECOND]}
        settings_file.write(folder.config(SECOND), {"scheduler": section, "chain": self._chain()})

    async def start(self, name: str) -> None:
        """Start one of the two (again), and wait until every provider trades with it."""
        if name == SCHEDULER:
            await self.market.restart(name)
        else:
            (self.network.folder.state(name) / "ready.json").unlink(missing_ok=True)
            argv = [sys.executable, "-m", "gpumarket.cli.main", "scheduler", "start", "--config", str(self.network.folder.config(name))]
            self.network.processes.spawn(name, argv)
            ready = self.network.folder.state(name) / "ready.json"
            self.network.ready[name] = await self.network.processes.ready(name, ready, seconds=READY_SECONDS)
        async with self.market.chain() as chain:
            await readiness.wait_matchable(
                endpoint=self.network.ready[name]["endpoint"],
                tls_key_hash=parse_hash(self.network.ready[name]["tls_key_hash"]),
                scheduler=self.market.address(name),
                models=self.network.models.values(),
                providers=len(self.market.providers),
                key=self.network.wallets[CLIENT],
                domain=market_domain(chain.book.chain_id, parse_address(chain.book.registry)),
            )

    def ledger(self, name: str) -> ledgers.SchedulerBooks:
        return ledgers.scheduler_books(Path(), self.databases[name])

    def jobs(self, name: str) -> set[bytes]:
        return {row.key for row in self.ledger(name).jobs}

    async def settled(self) -> bool:
        """Nothing is open at either, and the chain has paid every voucher that providers hold."""
        books = self.market.books()
        quiet = all(row.state in SETTLED for book in books.providers.values() for row in book.attempts)
        for name in self.databases:
            ledger = self.ledger(name)
            quiet = quiet and not any(row.open or row.held for row in ledger.client_channels) and not any(r.reserved for r in ledger.spokes)
        async with self.market.chain() as chain:
            facts = await chain_facts.read_facts(chain)
        held = [row for book in books.providers.values() for row in book.vouchers]
        return quiet and all(facts.channels[Hash(row.channel)].claimed >= row.cumulative for row in held)

    async def check_money(self) -> None:
        """Each ledger by itself, and both against what the client and the providers have written down."""
        books = self.market.books()
        guards = {row.channel: row.cumulative for row in books.client.guard}
        billed = {row.id: row.billed for row in books.client.channels}
        vouchers = {row.channel: row.cumulative for book in books.providers.values() for row in book.vouchers}
        for name in self.databases:
            ledger = self.ledger(name)
            (hub,) = ledger.client_channels
            owed = [row for row in ledger.attempts if row.state == AttemptState.OWED]
            assert hub.used == billed[hub.id] <= hub.voucher == guards[hub.id], name
            assert sum(row.vouchered for row in ledger.spokes) == sum(row.amount for row in owed) > 0, name
            for spoke in ledger.spokes:
                assert vouchers.get(spoke.id, 0) == spoke.vouchered == {g.channel: g.cumulative for g in ledger.guard}[spoke.id], name
        assert set(billed) == {hub.id for name in self.databases for hub in self.ledger(name).client_channels}, "a channel to each"

    def _chain(self) -> dict[str, Any]:
        return {"rpc_url": self.network.anvil.url, "address_book": self.network.folder.book, **self.network.plan.chain}


@pytest.fixture(scope="module")
def town(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoSchedulers]:
    usual = plan()
    with postgres.database() as first, postgres.database() as second:
        scheduler = {**usual.scheduler, "database": first}
        network = Network(
            tmp_path_factory.mktemp("town"), replace(usual, scheduler=scheduler, client={**usual.client, "patience_seconds": 3.0})
        )
        made = TwoSchedulers(FaultMarket(network), {SCHEDULER: first, SECOND: second})

        async def up() -> None:
            await network.up()
            made.configure_second()
            await made.start(SECOND)

        try:
            asyncio.run(up())
            yield made
        finally:
            asyncio.run(network.down())


async def test_client_goes_on_through_the_other_scheduler_and_both_are_paid_out_right(town: TwoSchedulers) -> None:
    market = town.market
    async with market.client() as client:
        stream, pieces, _ = await market.begin(client)
        dead = market.name_of((await client.account()).scheduler)
        alive = next(name for name in town.databases if name != dead)
        before = town.jobs(alive)
        town.network.processes.kill(dead)
        pieces += [piece async for piece in stream]
        assert "".join(pieces) == stream.result.text, "what a provider has begun needs no scheduler"
        elsewhere = [await client.chat(TINY_LLAMA, f"And number {n}?", max_tokens=8) for n in range(3)]
        assert market.name_of((await client.account()).scheduler) == alive
        assert {result.job for result in elsewhere} <= town.jobs(alive) - before
    async with market.client() as client:  # one that finds it dead
        opened = await client.chat(TINY_LLAMA, "Who is there?", max_tokens=8)
        assert opened.job in town.jobs(alive)
    await town.start(dead)
    async with market.client() as client:
        assert await client.resume_all() == []
        assert stream.result.job in town.jobs(dead)
    for name in (*market.providers, *town.databases):
        town.network.processes.signal(name, signal.SIGUSR1)

    async def redeemed() -> bool:
        if await town.settled():
            return True
        for name in market.providers:
            town.network.processes.signal(name, signal.SIGUSR1)
        return False

    await until(redeemed, "claims, jobs or vouchers are still open")
    await town.check_money()
    figure = f"killed under a stream: that ended whole, {len(elsewhere) + 1} further jobs went through the other one, money of both right"
    record("one of two schedulers dies", 1, figure, "jobs lost 0; paid twice 0")

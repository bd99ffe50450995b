"""One provider for each way of cheating, in a real market with two honest ones: who finds it, what it is paid, what its client gets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from reliability import record

from gpumarket.core.errors import GpumarketError
from gpumarket.core.settings import ChainSettings, load
from gpumarket.core.units import hex0x
from gpumarket.sdk import Client
from gpumarket.sdk.results import EmbedResult
from gpumarket.sdk.settings import ClientSettings
from gpumarket.testnet import audit, cheaters, ledgers, plan
from gpumarket.testnet.network import Network
from gpumarket.testnet.plan import CLIENT, SCHEDULER

HONEST = 2
JOBS_MAX = 80
STALL_SECONDS = 4.0
CHECKED = ("lower-precision", "cheaper-model", "cut-prompt")
"""Found because results are computed again."""
FALSE_RECEIPT = ("inflated-count", "forged-receipt")
MATCHED = (*CHECKED, *FALSE_RECEIPT, "silence")
TEXTS = [f"The harbour of the town number {n} is deep, and ships of every size have come to it since it was dug." for n in range(8)]


@dataclass
class Market:
    network: Network
    results: list[EmbedResult]
    errors: list[GpumarketError]

    def attempts_at(self, kind: str) -> list[Any]:
        """The client's attempts at a cheater."""
        address = self.network.wallets[kind].address
        return [row for row in ledgers.client_books(self.network.folder.state(CLIENT)).attempts if row.provider == address]

    def caught(self, kind: str) -> list[Any]:
        """The attempts at a cheater that ended as they should. On a busy machine its engine may start late: such a one ended otherwise."""
        if kind in CHECKED:
            rejected = {row.job for row in ledgers.client_books(self.network.folder.state(CLIENT)).jobs if row.state == "rejected"}
            return [row for row in self.attempts_at(kind) if row.job in rejected and row.reason == "completed"]
        reason = "lost" if kind == "silence" else "bad-output"
        return [row for row in self.attempts_at(kind) if row.reason == reason]

    def paid(self, kind: str) -> int:
        """All that a cheater was ever promised: its spoke's cumulative amount."""
        address = self.network.wallets[kind].address
        books = ledgers.scheduler_books(self.network.folder.state(SCHEDULER))
        return sum(row.vouchered for row in books.spokes if row.provider == address)

    def log(self, name: str) -> str:
        return self.network.folder.log(name).read_text()


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    """All kinds at once; jobs of one text each, every one checked, until each cheater that can be matched had one."""
    sellers = (*plan.honest(HONEST, text=0), *plan.cheaters(list(cheaters.KINDS)))
    client = {"check_probability": 1.0, "stall_seconds": STALL_SECONDS, "job_seconds": 60, "reruns_max": len(CHECKED), "attempts_max": 8}
    scheduler = {"check_seconds": 15, "claim_grace_seconds": 5}
    network = Network(tmp_path_factory.mktemp("cheaters"), plan.Plan(sellers, scheduler, client))
    market = Market(network, [], [])
    try:
        asyncio.run(network.up())
        asyncio.run(buy(market))
        yield market
    finally:
        asyncio.run(network.down())


@asynccontextmanager
async def client_of(network: Network) -> AsyncIterator[Client]:
    file = network.client_config
    async with Client(load(ClientSettings, file=file, env={}), load(ChainSettings, file=file, env={})) as client:
        yield client


async def buy(market: Market) -> None:
    async with client_of(market.network) as client:
        for number in range(JOBS_MAX):
            try:
                market.results.append(await client.embed(plan.MINILM, [TEXTS[number % len(TEXTS)]], max_cost="0.001"))
            except GpumarketError as error:
                market.errors.append(error)
            if all(market.caught(kind) for kind in MATCHED):
                return


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("kind", CHECKED)
def test_cheater_whose_numbers_differ_is_rejected_by_checks_unpaid_and_jailed(market: Market, kind: str) -> None:
    address = market.network.wallets[kind].address
    rejected = market.caught(kind)
    assert rejected
    assert market.paid(kind) == 0
    books = ledgers.scheduler_books(market.network.folder.state(SCHEDULER))
    (reputation,) = [row for row in books.reputations if row.provider == address]
    assert reputation.rejections > 0 and reputation.jailed_until > 0
    record("I7", len(rejected), f"cheater {kind}: rejected by two checkers, paid 0, jailed", "caught or unpaid")


@pytest.mark.parametrize("kind", FALSE_RECEIPT)
def test_cheater_with_a_false_receipt_is_refused_by_its_client_and_unpaid(market: Market, kind: str) -> None:
    attempts = market.caught(kind)
    assert attempts
    told = "prompt_units" if kind == "inflated-count" else "the receipt is signed by"
    assert all(told in row.detail for row in attempts), [row.detail for row in attempts]
    assert market.paid(kind) == 0
    record("I7", len(attempts), f"cheater {kind}: its receipt refused by the client, paid 0", "caught or unpaid")


def test_cheater_that_says_nothing_is_left_and_unpaid(market: Market) -> None:
    attempts = market.caught("silence")
    assert attempts
    assert all("no sign of life" in row.detail for row in attempts)
    assert market.paid("silence") == 0
    record("F42", len(attempts), f"a silent cheater: left after {STALL_SECONDS:.0f} s, the job done elsewhere, paid 0", "1 window")


def test_cheater_with_anothers_offer_is_never_listed_and_told_why(market: Market) -> None:
    assert market.attempts_at(plan.COPIED_OFFER) == []
    assert market.paid(plan.COPIED_OFFER) == 0
    assert "TLS key" in market.log(plan.COPIED_OFFER)
    offered = asyncio.run(offers(market))
    assert hex0x(market.network.wallets[plan.COPIED_OFFER].address) not in offered
    assert len(offered) == HONEST + len(MATCHED)
    record("I7", 1, "cheater copied-offer: its offer is never listed, no job, paid 0", "caught or unpaid")


async def offers(market: Market) -> set[str]:
    async with client_of(market.network) as client:
        return {hex0x(view.provider) for view in await client.offers(plan.MINILM)}


def test_clients_among_cheaters_get_honest_vectors_and_pay_honest_providers(market: Market) -> None:
    assert market.errors == []
    honest = {market.network.wallets[f"provider-{n + 1}"].address for n in range(HONEST)}
    assert {result.provider for result in market.results} <= honest
    first: dict[int, Any] = {}
    for number, result in enumerate(market.results):
        expected = first.setdefault(number % len(TEXTS), result.vectors[0])
        np.testing.assert_allclose(result.vectors[0], expected, atol=1e-4)


def test_market_among_cheaters_holds_every_invariant(market: Market) -> None:
    report = asyncio.run(audit.audit(audit.of_folder(market.network.folder.root)))
    assert report.holds, report.as_json()
    assert report.figures["overpaid"] == report.figures["lost"] == 0
    assert set(report.sources.left_out) == set(cheaters.KINDS)

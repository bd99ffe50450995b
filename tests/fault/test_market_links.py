"""F15: links between a client, the scheduler and a provider break at every message of a job, one message at a time.

A job ends well or with a retryable error; whatever happened, each token is delivered once and each attempt paid once. How many messages a
job has on a link is counted first; a provider's link to the scheduler carries its heartbeats and claims.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from fault_market import WINDOW, FaultMarket, assert_delivered_once, assert_paid_once, plan, until
from reliability import record
from wire_cutter import Mode, Order, WireCutter

from gpumarket.core.errors import GpumarketError
from gpumarket.sdk.results import ChatResult
from gpumarket.testnet.network import Network
from gpumarket.testnet.plan import SCHEDULER, TINY_LLAMA, Plan
from gpumarket.testnet.ports import free_port

pytestmark = pytest.mark.timeout(3_000)
TOKENS = 48
NEVER = 10**9


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a link: to the scheduler or to providers; by the client (`ours`) or by providers."""

    server: str
    ours: bool
    up: bool

    def __str__(self) -> str:
        who = ("client" if self.ours else "provider", self.server)
        return " to ".join(who if self.up else reversed(who))


WAYS = ((SCHEDULER, True), ("provider", True), (SCHEDULER, False))
LINKS = tuple(Link(server, ours, up) for (server, ours), up in itertools.product(WAYS, (True, False)))
ACKS = Link("provider", ours=True, up=True)
"""The link on which an answer's last ack is lost when its message is the one: up to a window is then delivered and not paid, which is what
a provider risks for each lease. On every other link all that was delivered is paid."""


class Links:
    """A market in which everybody reaches everybody through relays."""

    def __init__(self, market: FaultMarket, cutters: dict[str, WireCutter]) -> None:
        self.market, self.cutters = market, cutters

    def arm(self, link: Link, mode: Mode, at: int) -> Order:
        """Break the link at a message from now on; of providers whichever carries it."""
        order = Order(mode, link.up, at, link.ours)
        for name, cutter in self.cutters.items():
            cutter.order = order if (name == SCHEDULER) == (link.server == SCHEDULER) else None
        return order

    def disarm(self) -> None:
        for cutter in self.cutters.values():
            cutter.order = None

    async def messages(self, link: Link) -> int:
        """How many messages of one job and its payment go over a link."""
        order = self.arm(link, Mode.CUT, NEVER)
        await self.job("Say how many words this takes.")
        if not link.ours:
            await self.market.settle()
        self.disarm()
        return order.seen

    async def job(self, prompt: str) -> ChatResult:
        """One job on new connections."""
        async with self.market.client() as client:
            return await client.chat(TINY_LLAMA, prompt, max_tokens=TOKENS, temperature=0.0)


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Links]:
    whole, folder = plan(), tmp_path_factory.mktemp("links")
    names = (SCHEDULER, *(provider.name for provider in whole.providers))
    listen = {name: f"127.0.0.1:{free_port()}" for name in names}
    cutters = {name: WireCutter(listen[name], folder / name) for name in names}
    network = Network(folder, _through(whole, listen, cutters))
    for cutter in cutters.values():
        cutter.__enter__()
    try:
        asyncio.run(network.up())
        yield Links(FaultMarket(network), cutters)
    finally:
        asyncio.run(network.down())
        for cutter in cutters.values():
            cutter.__exit__(None, None, None)


def _through(whole: Plan, listen: dict[str, str], cutters: dict[str, WireCutter]) -> Plan:
    where = {name: {"listen": listen[name], "advertise": cutters[name].address} for name in listen}
    sellers = tuple(replace(p, settings={**p.settings, **where[p.name]}) for p in whole.providers)
    return replace(whole, providers=sellers, scheduler={**whole.scheduler, **where[SCHEDULER]})


async def test_link_cut_at_sampled_messages_delivers_and_pays_once(links: Links) -> None:
    await sweep(links, Mode.CUT, [(link, at) for link, at in itertools.product(LINKS, (1, 3))])


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
async def test_link_broken_at_every_message_delivers_and_pays_once(links: Links, mode: Mode) -> None:
    places = [(link, at) for link in LINKS for at in range(1, await links.messages(link) + 1)]
    if mode is Mode.SWALLOW:
        places = places[:: max(1, len(places) // 36)]  # each costs the seconds until keepalive notices
    await sweep(links, mode, places)


async def sweep(links: Links, mode: Mode, places: list[tuple[Link, int]]) -> None:
    failed, broken = 0, dict.fromkeys(map(str, LINKS), 0)
    results: list[tuple[ChatResult, int]] = []
    for link, at in places:
        if not link.ours:
            await links.market.matchable()
        order = links.arm(link, mode, at)
        try:
            result = await links.job(f"Say what breaks at {at}.")
        except GpumarketError as error:
            assert error.retryable, (str(link), at, error)
            failed += 1
        else:
            assert_delivered_once(links.market, result.job)
            results.append((result, WINDOW if link == ACKS else 0))
        if not link.ours:
            await until(lambda order=order: _done(order), f"no message {at} on {link}")  # type: ignore[misc]
        links.disarm()
        broken[str(link)] += order.done
    await links.market.check_invariants()
    for result, unacked_max in results:
        assert_paid_once(links.market, result.job, result.usage.output_tokens, unacked_max=unacked_max)
    assert sum(broken.values()) > 3 * len(places) // 4, f"most links were never broken: {broken}"
    figure = f"{mode.value}: {len(results)} jobs ended well, {failed} with a retryable error, doubled tokens 0, doubled payments 0"
    told = ", ".join(f"{link} {count}" for link, count in broken.items())
    record("F15", sum(broken.values()), f"{figure}; messages lost on {told}", "every step resumable")


async def _done(order: Order) -> bool:
    return order.done

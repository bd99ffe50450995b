"""F39: one client, one deposit, fifty providers, and more orders at once than the deposit can pay. Over the real Market service.

Who works is always covered twice: by the client's deposit at the scheduler, and by the scheduler's deposit behind that very provider.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from reliability import record
from scheduler_world import DOMAIN, MODEL, PRICE, PROFILE, SCHEDULER, TOKEN, Bought, HandChain, HandClock, ScriptedClient, key, running

from gpumarket.core.codec import signed_offer
from gpumarket.core.terms import keccak256
from gpumarket.core.units import Hash, money_bytes
from gpumarket.scheduler.market import Market
from gpumarket.settlement.chain.view import PROVIDER, NodeOnChain
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import terms_pb2 as terms

PROVIDERS, ORDERS, MOST = 50, 150, 1
"""Providers; orders at once; what one order may cost, in tokens."""
SPOKE_JOBS = 2
"""Orders that a provider's own channel covers."""


class Shop:
    """A scheduler with its book filled, and a client whose whole deposit is vouchered."""

    def __init__(self, deposit: int) -> None:
        self.deposit = deposit * TOKEN
        self.clock = HandClock()
        self.chain = HandChain(SCHEDULER.address, self.clock)
        self.client = ScriptedClient("client", self.chain.hub(key("client"), deposit=self.deposit), self.clock)
        self.market: Market

    def order(self) -> Bought:
        return self.client.job(inputs=[[1] * 100_000], max_amount=MOST * TOKEN)

    async def fill(self) -> None:
        """Providers as a running network has them: registered, offering, proven, each with a channel of its own."""
        market, clock = self.market, self.clock
        for number in range(PROVIDERS):
            seller = key(f"seller {number}")
            node = NodeOnChain(seller.address, seller.address, PROVIDER, 10**6 * TOKEN, tls_key_hash=Hash(b"t" * 32))
            self.chain.put_node(node)
            sale = terms.ModelOffer(model=MODEL, name="m", task=terms.TASK_EMBED, profile=PROFILE, max_input_tokens=2**17, warm=True)
            sale.prompt_price_per_mtok = money_bytes(PRICE * 9 // 10)
            body = terms.OfferBody(provider=seller.address, endpoint="127.0.0.1:1", tls_key_hash=b"t" * 32, models=[sale], sequence=1)
            body.gpus.append(terms.GpuClaim(gpu_class="CPU", vram_bytes=2**33))
            body.expires_at, body.capacity = clock.now() + 10**6, 100
            market.listings.take(signed_offer(seller, DOMAIN, body), clock.now())
            market.channels.adopt(Hash(keccak256(seller.address)), seller.address, SPOKE_JOBS * MOST * TOKEN, 2**40)
            market.presence.restand(seller.address)
            standing = market.book.entries[seller.address].standing
            standing.heartbeat, standing.proven, standing.free = 1e12, True, 100
            market.book.refresh(seller.address)
        await market.ledger.commit()


@pytest.fixture(params=[60, 300], ids=["client's deposit short", "channels short"])
async def shop(request: pytest.FixtureRequest, tmp_path: Path, database: str) -> AsyncIterator[Shop]:
    """With 60 tokens the client's deposit ends first, with 300 the providers' channels do: 100 leases fit into them."""
    made = Shop(request.param)
    async with running(tmp_path, made.chain, made.clock, database=database, reservations_per_channel=10**6) as market:
        made.market = market
        await made.fill()
        await made.client.connect(market)
        yield made
        await made.client.close()


def covered(shop: Shop, granted: list[Bought]) -> None:
    """Every lease is within the client's voucher and, maximum by maximum, within its own provider's channel."""
    ledger = shop.market.ledger
    (hub,) = ledger.hubs.values()
    assert hub.state.open == len(granted) * MOST * TOKEN <= hub.state.voucher <= hub.state.deposit == shop.deposit
    assert len({job.spec.key for job in granted}) == len(granted)
    for spoke in ledger.spokes.values():
        leases = [job.lease.maximum for job in granted if job.lease and job.lease.provider == spoke.provider]
        assert spoke.state.reserved == sum(leases) <= spoke.state.deposit


async def test_deposit_behind_fifty_providers_is_promised_once_however_many_orders_come_at_once(shop: Shop) -> None:
    orders = [shop.order() for _ in range(ORDERS)]
    replies = [await shop.client.match(orders[0], pay=shop.deposit)]
    replies += await asyncio.gather(*(shop.client.match(order) for order in orders[1:]))
    granted = [order for order, reply in zip(orders, replies, strict=True) if reply.HasField("granted")]
    refused = [reply for reply in replies if not reply.HasField("granted")]
    if shop.deposit < PROVIDERS * SPOKE_JOBS * MOST * TOKEN:
        assert len(granted) == shop.deposit // (MOST * TOKEN)
        assert {(reply.problem.code, reply.problem.retryable) for reply in refused} == {("out_of_funds", False)}
    else:
        assert 0 < len(granted) <= PROVIDERS * SPOKE_JOBS
        assert {item.filter for reply in refused for item in reply.no_match.removed} == {"spoke"}
    covered(shop, granted)
    assert len({order.lease.provider for order in granted if order.lease}) > PROVIDERS // 2
    figure = f"a deposit for {shop.deposit // TOKEN} orders, {PROVIDERS} providers: {len(granted)} leased, 0 beyond a deposit"
    record("F39", ORDERS, figure, "unpaid work 0")


async def test_voucher_above_the_deposit_and_a_channel_to_somebody_else_cover_nothing(shop: Shop) -> None:
    above = await shop.client.match(shop.order(), pay=shop.deposit + TOKEN)
    assert above.problem.code == "out_of_funds" or "deposit" in above.problem.message, above
    elsewhere = Hash(keccak256(b"to another scheduler"))
    shop.chain.put_channel(replace(shop.chain.view.channels[shop.client.channel], id=elsewhere, payee=key("another scheduler").address))
    other = ScriptedClient("client", elsewhere, shop.clock)
    await other.connect(shop.market)
    answer: pb.MatchReply = await other.match(shop.order(), pay=TOKEN)
    await other.close()
    assert "pays somebody else" in answer.problem.message
    covered(shop, [])

"""Two keys on one gateway: neither sees the other's models and answers, nor spends its money; and budgets outlive whatever happens."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from gateway_market import Gateway, gateway, on_market, until
from sdk_market import FakeProvider, fake_market

from gpumarket.core.terms import keccak256
from gpumarket.core.units import Hash, Money
from gpumarket.gateway.daemon import serve
from gpumarket.gateway.settings import GatewaySettings
from gpumarket.sdk import Client, ClientSettings

TALK: Any = [{"role": "user", "content": "hi"}]
HEADER = "Idempotency-Key"


async def ask(g: Gateway, key: str, name: str | None = None, **more: Any) -> Any:
    async with g.openai(key) as client:
        headers = {HEADER: name} if name else {}
        options: dict[str, Any] = {"model": "chat", "messages": TALK, "max_tokens": 8} | more
        return await client.chat.completions.with_raw_response.create(**options, extra_headers=headers)


async def streamed(g: Gateway, key: str, name: str) -> str:
    async with g.openai(key) as client:
        stream = await client.chat.completions.create(model="chat", messages=TALK, max_tokens=8, stream=True, extra_headers={HEADER: name})
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def status(work: Any) -> tuple[int, str]:
    with pytest.raises(openai.APIStatusError) as caught:
        await work
    assert isinstance(caught.value.body, dict)
    return caught.value.status_code, str(caught.value.body["code"])


async def fetched(url: str) -> str:
    async with aiohttp.ClientSession() as http, http.get(url) as answer:
        return await answer.text()


# --- idempotency ---------------------------------------------------------------------------------------------------------------


async def test_same_key_and_request_give_the_same_answer_and_are_paid_once(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        first, second = await ask(g, g.key, "one"), await ask(g, g.key, "one")
        assert first.content == second.content
        assert first.headers["x-gpumarket-job"] == second.headers["x-gpumarket-job"]
        assert len(g.room.counter.client.jobs()) == 1
        owner = g.keys.all()[0].id
        await until(lambda: g.room.counter.ledger.account(owner).reserved == 0)
        assert g.room.counter.ledger.account(owner).total_spent == g.room.counter.client.jobs()[0].cost


async def test_same_key_and_another_request_are_refused(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await ask(g, g.key, "one")
        assert await status(ask(g, g.key, "one", max_tokens=9)) == (422, "idempotency_key_reused")
        assert (await ask(g, g.key, "one")).headers["x-gpumarket-job"]
        assert await status(ask(g, g.key, "x" * 256)) == (400, "invalid_idempotency_key")
        assert await status(ask(g, g.key, "two", logprobs=True)) == (400, "invalid_value")


async def test_same_key_while_its_request_runs_is_refused(tmp_path: Path) -> None:
    hold = asyncio.Event()
    async with gateway(tmp_path, FakeProvider("a", hold=hold)) as g:
        first = asyncio.create_task(ask(g, g.key, "one", max_tokens=20))
        await until(lambda: g.room.counter.running == 1)
        assert await status(ask(g, g.key, "one", max_tokens=20)) == (409, "idempotency_key_in_use")
        hold.set()
        assert (await first).parse().choices


async def test_answer_is_the_same_after_a_restart_and_as_a_stream(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market:
        async with on_market(market, tmp_path) as g:
            key = g.another_key("mine")
            first = (await ask(g, key, "one")).parse()
            text = await streamed(g, key, "stream")
        async with on_market(market, tmp_path) as g:
            assert (await ask(g, key, "one")).parse() == first
            assert await streamed(g, key, "stream") == text
            assert len(g.room.counter.client.jobs()) == 2


async def test_request_that_failed_may_be_repeated_under_its_key(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        providers, g.market.scheduler.providers = g.market.scheduler.providers, []
        assert (await status(ask(g, g.key, "one")))[0] == 503
        g.market.scheduler.providers = providers
        assert (await ask(g, g.key, "one")).parse().choices


async def test_embeddings_are_answered_once_under_one_key(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g, g.openai() as client:
        made = [await client.embeddings.create(model="mini", input="w1 w2", extra_headers={HEADER: "e"}) for _ in range(2)]
        assert made[0] == made[1]
        assert len(g.room.counter.client.jobs()) == 1


# --- two tenants ---------------------------------------------------------------------------------------------------------------


async def test_no_key_finds_another_keys_answer_under_the_same_name(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        one, other = g.another_key("one"), g.another_key("other")
        first, second = await ask(g, one, "same"), await ask(g, other, "same")
        assert first.headers["x-gpumarket-job"] != second.headers["x-gpumarket-job"]
        assert first.parse().id != second.parse().id
        assert await status(ask(g, one, "same", max_tokens=9)) == (422, "idempotency_key_reused")
        assert (await ask(g, other, "new", max_tokens=9)).parse().choices


async def test_no_key_sees_or_uses_a_model_that_it_may_not(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        texts, vectors = g.another_key("texts", models=frozenset({"chat"})), g.another_key("vectors", models=frozenset({"mini"}))
        for key, mine, others in ((texts, "chat", "mini"), (vectors, "mini", "chat")):
            async with g.openai(key) as client:
                assert [model.id async for model in client.models.list()] == [mine]
                assert await status(client.models.retrieve(others)) == (404, "model_not_found")
        assert await status(ask(g, vectors)) == (404, "model_not_found")
        async with g.openai(texts) as client:
            assert await status(client.embeddings.create(model="mini", input="w1")) == (404, "model_not_found")
            unknown = await status(client.embeddings.create(model="there-is-none", input="w1"))
            assert unknown == (404, "model_not_found")


async def test_no_key_spends_another_keys_budget(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        poor, rich = g.another_key("poor", total="0.000000001"), g.another_key("rich", day="1")
        assert await status(ask(g, poor)) == (429, "insufficient_quota")
        assert (await ask(g, rich)).parse().choices
        assert await status(ask(g, poor)) == (429, "insufficient_quota")
        spent = {key.name: g.room.counter.ledger.account(key.id) for key in g.keys.all()}
        await until(lambda: spent["rich"].reserved == 0)
        assert spent["poor"].total_spent == spent["owner"].total_spent == 0 < spent["rich"].total_spent


async def test_no_key_is_slowed_by_another_keys_rate(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        slow, other = g.another_key("slow", per_minute=2), g.another_key("other", per_minute=2)
        for key in (slow, slow, other):
            assert (await ask(g, key)).parse().choices
        assert await status(ask(g, slow)) == (429, "rate_limit_exceeded")
        assert (await ask(g, other)).parse().choices


async def test_budget_is_never_passed_by_requests_made_at_once(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        first = await ask(g, g.key)
        cost = g.room.counter.client.jobs()[0].cost
        assert first.parse().choices
        key = g.another_key("mine", total=f"{cost * 5 / 10**18:.18f}")
        done = await asyncio.gather(*(ask(g, key) for _ in range(12)), return_exceptions=True)
        mine = next(k.id for k in g.keys.all() if k.name == "mine")
        await until(lambda: g.room.counter.ledger.account(mine).reserved == 0)
        answered = sum(not isinstance(one, BaseException) for one in done)
        assert 1 <= answered <= 5
        assert g.room.counter.ledger.account(mine).total_spent <= cost * 5


async def test_revoked_key_is_refused(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        key = g.another_key("mine")
        assert (await ask(g, key)).parse().choices
        g.keys.revoke("mine")
        assert await status(ask(g, key)) == (401, "invalid_api_key")


# --- restarts ------------------------------------------------------------------------------------------------------------------


async def test_reservations_of_an_earlier_process_are_settled_by_the_clients_journal(tmp_path: Path) -> None:
    """As a crash leaves them: one job that never was ordered, one that was bought and not booked."""
    async with fake_market(tmp_path, FakeProvider("a")) as market:
        async with on_market(market, tmp_path) as g:
            mine = g.keys.all()[0]
            bought = await g.room.counter.client.chat("chat", "hi", max_tokens=5)
            never = Hash(keccak256(b"never ordered"))
            for job in (never, bought.job):
                await g.room.counter.ledger.reserve(mine, job, Money(10**15), Money(10**15))
            assert g.room.counter.ledger.account(mine.id).reserved == 2 * 10**15
        async with on_market(market, tmp_path) as g:
            account = g.room.counter.ledger.account(mine.id)
            await until(lambda: account.reserved == 0)
            assert account.total_spent == bought.total_cost


async def test_gateway_drains_on_stop_and_cuts_off_what_stays(tmp_path: Path) -> None:
    provider = FakeProvider("a", hold=asyncio.Event())
    async with fake_market(tmp_path, provider) as market:
        async with on_market(market, tmp_path) as g:
            key = g.another_key("mine")
        client = Client(
            ClientSettings(state=tmp_path / "client", lock_file=tmp_path / "models.lock", check_probability=0),
            key=g.room.counter.client._key,
            chain=market.chain,
        )
        settings = GatewaySettings(state=tmp_path / "gateway", listen="127.0.0.1:0", grpc_listen="", drain_seconds=0.5)
        stop = asyncio.Event()
        serving = asyncio.create_task(serve(settings, client, stop))
        ready = tmp_path / "gateway" / "ready.json"
        await until(ready.is_file)
        url = json.loads(ready.read_text())["api"]
        caller = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0)
        running = asyncio.create_task(caller.chat.completions.create(model="chat", messages=TALK, max_tokens=50))
        await until(lambda: provider.acks)
        observe = json.loads(ready.read_text())["observe"]
        assert "gpumarket_gateway_jobs 1.0" in await fetched(f"{observe}/metrics")
        assert json.loads(await fetched(f"{observe}/readyz")) == {"ready": True, "reasons": []}
        stop.set()
        await until(lambda: not ready.exists())
        assert await status(caller.chat.completions.create(model="chat", messages=TALK)) == (503, "draining")
        with pytest.raises(openai.APIConnectionError):
            await running
        await asyncio.wait_for(serving, 20)
        await caller.close()

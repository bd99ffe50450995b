"""Embedding requests that share a job: who rides with whom, what each pays, and that nobody's trouble is another's."""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_market import Gateway, gateway, until
from sdk_market import FakeProvider, vector

from gpumarket.core.errors import Unreachable
from gpumarket.core.units import format_money, parse_money
from gpumarket.gateway.sharing import INPUTS_MAX, INPUTS_OF_REQUEST_MAX

MODEL = "mini"
LIMIT = 16
"""Tokens that the model takes."""


def holding() -> tuple[FakeProvider, asyncio.Event]:
    """A provider that stops after the first vector of each job until the event is set."""
    go = asyncio.Event()
    return FakeProvider("a", hold=go, hold_after_items=1), go


async def embed(client: openai.AsyncOpenAI, given: Any, **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.embeddings.with_raw_response.create(model=MODEL, input=given, extra_headers=named)


def ids(number: int, length: int = 4) -> list[int]:
    return [2 + number] * length


def rows(raw: Any) -> list[bytes]:
    return [base64.b64decode(row["embedding"]) for row in raw.http_response.json()["data"]]


def job_of(raw: Any) -> str:
    return str(raw.headers["x-gpumarket-job"])


async def waiting(g: Gateway, count: int) -> None:
    await until(lambda: sum(len(line.waiting) for line in g.room.sharing._lines.values()) == count)


async def test_requests_that_come_together_share_a_job_and_its_cost(tmp_path: Path) -> None:
    seller, go = holding()
    async with gateway(tmp_path, seller, shared_jobs_max=1) as g, g.openai() as client:
        first = asyncio.create_task(embed(client, ids(0)))
        await until(lambda: len(seller.jobs) == 1)
        more = [asyncio.create_task(embed(client, [ids(n, n), ids(n)])) for n in range(1, 8)]
        await waiting(g, 7)
        go.set()
        alone, *shared = await asyncio.gather(first, *more)
        assert rows(alone) == [vector(ids(0))]
        for n, raw in enumerate(shared, start=1):
            assert rows(raw) == [vector(ids(n, n)), vector(ids(n))]
            assert raw.parse().usage.prompt_tokens == n + 4
        assert len({job_of(raw) for raw in shared}) == 1 and job_of(alone) != job_of(shared[0])
        assert len({raw.headers["x-gpumarket-receipt"] for raw in shared}) == 1
        assert len(seller.jobs) == 2
        cost = {f"0x{job.job.hex()}": job.cost for job in g.room.counter.client.jobs()}
        assert parse_money(alone.headers["x-gpumarket-cost"]) == cost[job_of(alone)]
        parts = [parse_money(raw.headers["x-gpumarket-cost"]) for raw in shared]
        assert sum(parts) == cost[job_of(shared[0])]
        assert parts == sorted(parts) and 0 < parts[0] < parts[-1]
        owner = g.keys.all()[0].id
        await until(lambda: not g.room.counter.ledger.account(owner).reserved)
        assert g.room.counter.ledger.account(owner).total_spent == sum(cost.values())
        assert g.room.sharing.shared == 7
        await until(lambda: not g.room.sharing._lines)


async def test_neither_two_keys_nor_texts_and_ids_share(tmp_path: Path) -> None:
    seller, go = holding()
    async with gateway(tmp_path, seller, shared_jobs_max=1) as g, g.openai() as one, g.openai(g.another_key("other")) as two:
        tasks = [asyncio.create_task(embed(*given)) for given in ((one, "red"), (one, ids(1)), (two, "red"), (two, ids(1)))]
        await until(lambda: len(seller.jobs) == 4)
        assert not any(line.waiting for line in g.room.sharing._lines.values())
        go.set()
        assert len({job_of(raw) for raw in await asyncio.gather(*tasks)}) == 4


async def test_one_input_that_is_too_long_is_refused_alone(tmp_path: Path) -> None:
    seller, go = holding()
    async with gateway(tmp_path, seller, shared_jobs_max=1) as g, g.openai() as client:
        first = asyncio.create_task(embed(client, "red"))
        await until(lambda: len(seller.jobs) == 1)
        texts = ["fox", " ".join(["long"] * (LIMIT + 1)), "hen"]
        more = [asyncio.create_task(embed(client, text)) for text in texts]
        await waiting(g, 3)
        go.set()
        answers = await asyncio.gather(first, *more, return_exceptions=True)
        assert isinstance(answers[2], openai.BadRequestError) and answers[2].code == "context_length_exceeded"
        good = [answers[0], answers[1], answers[3]]
        assert all(len(rows(raw)) == 1 for raw in good)
        assert len({job_of(raw) for raw in good}) == 3


async def test_a_budget_that_covers_some_buys_for_some(tmp_path: Path) -> None:
    seller, go = holding()
    async with gateway(tmp_path, seller, shared_jobs_max=1) as g, g.openai() as owner:
        go.set()
        await embed(owner, ids(0, 8))
        price = g.room.counter.client.jobs()[0].cost
        go.clear()
        key = g.another_key("small", total=format_money(2 * price))  # one that runs, and one more
        async with g.openai(key) as client:
            first = asyncio.create_task(embed(client, ids(0, 8)))
            await until(lambda: len(seller.jobs) == 2)
            more = [asyncio.create_task(embed(client, ids(n, 8))) for n in (1, 2, 3)]
            await waiting(g, 3)
            go.set()
            answers = await asyncio.gather(first, *more, return_exceptions=True)
            broke = [a for a in answers if isinstance(a, openai.RateLimitError)]
            assert len(broke) == 2 and {a.code for a in broke} == {"insufficient_quota"}
            small = next(k.id for k in g.keys.all() if k.name == "small")
            await until(lambda: not g.room.counter.ledger.account(small).reserved)
            assert g.room.counter.ledger.account(small).total_spent <= 2 * price


async def test_who_leaves_takes_nobody_along_and_the_last_stops_the_job(tmp_path: Path) -> None:
    seller, go = holding()
    async with gateway(tmp_path, seller, shared_jobs_max=1) as g, g.openai() as client:
        first = asyncio.create_task(embed(client, ids(0)))
        await until(lambda: len(seller.jobs) == 1)
        stays, goes, early = (asyncio.create_task(embed(client, ids(n))) for n in (1, 2, 3))
        await waiting(g, 3)
        early.cancel()
        await until(lambda: g.room.counter.running == 3)
        go.set()
        await first
        go.clear()
        await until(lambda: len(seller.jobs) == 2)
        goes.cancel()
        await until(lambda: g.room.counter.running == 1)
        assert not seller.cancelled
        go.set()
        assert rows(await stays) == [vector(ids(1))]
        go.clear()
        last = asyncio.create_task(embed(client, [ids(4), ids(5)]))
        await until(lambda: len(seller.jobs) == 3)
        last.cancel()
        await until(lambda: seller.cancelled)
        go.set()
        await until(lambda: not g.room.sharing._lines and not g.room.counter.ledger._open)


async def test_a_provider_that_fails_fails_all_of_the_job_and_nothing_after(tmp_path: Path) -> None:
    seller, go = holding()
    async with gateway(tmp_path, seller, shared_jobs_max=1) as g, g.openai() as client:
        first = asyncio.create_task(embed(client, ids(0)))
        await until(lambda: len(seller.jobs) == 1)
        more = [asyncio.create_task(embed(client, ids(n))) for n in (1, 2)]
        await waiting(g, 2)
        seller.busy = True
        go.set()
        await first
        answers = await asyncio.gather(*more, return_exceptions=True)
        assert [type(a) for a in answers] == [openai.InternalServerError] * 2
        seller.busy = False
        assert rows(await embed(client, ids(3))) == [vector(ids(3))]


async def test_a_market_that_does_not_answer_is_not_asked_again_for_each(tmp_path: Path) -> None:
    seller, go = holding()
    async with gateway(tmp_path, seller, shared_jobs_max=1) as g, g.openai() as client:
        first = asyncio.create_task(embed(client, ids(0)))
        await until(lambda: len(seller.jobs) == 1)
        more = [asyncio.create_task(embed(client, ids(n))) for n in (1, 2, 3)]
        await waiting(g, 3)
        asked = 0

        async def away(*_: Any, **__: Any) -> Any:
            nonlocal asked
            asked += 1
            raise Unreachable("the scheduler does not answer")

        g.room.counter.client.embed = away  # type: ignore[method-assign]
        go.set()
        await first
        answers = await asyncio.gather(*more, return_exceptions=True)
        assert [getattr(a, "status_code", 0) for a in answers] == [503] * 3
        assert asked == 1


@pytest.mark.parametrize(("jobs", "headers"), [(0, {}), (1, {"Idempotency_Key": "one"})])
async def test_no_job_is_shared_where_none_may_be(tmp_path: Path, jobs: int, headers: dict[str, str]) -> None:
    seller, go = holding()
    async with gateway(tmp_path, seller, shared_jobs_max=jobs) as g, g.openai() as client:
        named = [{name: f"{value}{n}" for name, value in headers.items()} for n in range(3)]
        tasks = [asyncio.create_task(embed(client, ids(n), **named[n])) for n in range(3)]
        await until(lambda: len(seller.jobs) == 3)
        go.set()
        assert len({job_of(raw) for raw in await asyncio.gather(*tasks)}) == 3


async def test_large_requests_have_their_own_job_and_a_full_one_waits_for_nobody(tmp_path: Path) -> None:
    seller, go = holding()
    async with gateway(tmp_path, seller) as g, g.openai() as client:
        first = asyncio.create_task(embed(client, ids(0)))
        await until(lambda: len(seller.jobs) == 1)
        large = asyncio.create_task(embed(client, [ids(1)] * (INPUTS_OF_REQUEST_MAX + 1)))
        await until(lambda: len(seller.jobs) == 2)
        many = INPUTS_MAX // INPUTS_OF_REQUEST_MAX
        small = [asyncio.create_task(embed(client, [ids(n)] * INPUTS_OF_REQUEST_MAX)) for n in range(many + 1)]
        await until(lambda: len(seller.jobs) == 3)
        await waiting(g, 1)
        go.set()
        alone, own, *shared = [job_of(raw) for raw in await asyncio.gather(first, large, *small)]
        assert sorted(Counter(shared).values()) == [1, many]  # whichever came last
        assert len({alone, own, *shared}) == 4

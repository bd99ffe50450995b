"""Reports against a result, judged beside the event loop: bounded, few of a client, and time does not overtake them."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from scheduler_world import (
    SCHEDULER,
    TOKEN,
    Bought,
    HandChain,
    HandClock,
    ScriptedClient,
    ScriptedProvider,
    claim_call,
    deliver,
    key,
    running,
)

from gpumarket.core.errors import Busy, ProtocolError
from gpumarket.core.rpc import from_rpc
from gpumarket.core.units import money_from_bytes
from gpumarket.scheduler import judging
from gpumarket.scheduler.market import Market
from gpumarket.scheduler.reports import ITEMS_MAX, judge_report
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import terms_pb2 as terms

ROWS = [struct.pack("<2f", i, 1.0) for i in range(3)]
WRONG = [struct.pack("<2f", i + 5, 1.0) for i in range(3)]


class Court:
    """One scheduler, three providers, a client with a checked job; `gate` holds the judge back in its thread."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = HandClock()
        self.chain = HandChain(SCHEDULER.address, self.clock)
        self.client = ScriptedClient("client", self.chain.hub(key("client")), self.clock)
        self.providers = {p.address: p for p in (ScriptedProvider(f"p{i}", folder) for i in range(3))}
        self.market: Market
        self.gate, self.entered = threading.Event(), 0
        real: Callable[..., Any] = judge_report

        def held_back(*what: Any) -> Any:
            self.entered += 1
            assert self.gate.wait(20), "the test never opened the gate"
            return real(*what)

        monkeypatch.setattr(judging, "judge_report", held_back)

    async def delivered(self, rows: list[bytes]) -> tuple[Bought, list[Bought]]:
        """A claimed job, held for its check, and checks of it by the two other providers, who computed `ROWS`."""
        job = await self.bought()
        assert job.lease is not None
        subject = self.providers[job.lease.provider]
        deliver(subject.key, job, rows)
        reply = await self.client.stub.Claim(
            claim_call(subject.key, self.clock, job, self.client.ack(job, 6, complete=True, will_check=True))
        )
        assert reply.state == pb.CLAIM_STATE_HELD
        checks = []
        for checker in self.providers.values():
            if checker is not subject:
                only = terms.Constraints(require_provider=checker.address)
                check = await self.bought(check_of=terms.EmbedRequest.FromString(job.request), constraints=only)
                deliver(checker.key, check, ROWS)
                checks.append(check)
        return job, checks

    async def bought(self, **changes: Any) -> Bought:
        job = self.client.job(**changes)
        reply = await self.client.match(job, pay=TOKEN)
        assert reply.HasField("granted"), reply
        return job

    def reporting(self, job: Bought, checks: list[Bought]) -> asyncio.Task[pb.JobStatus]:
        return asyncio.create_task(self.client.report(job, pb.VERDICT_REJECTED, checks))

    async def judging(self, count: int = 1) -> None:
        async with asyncio.timeout(20):
            while self.entered < count:  # noqa: ASYNC110  counted in a thread
                await asyncio.sleep(0.005)


@pytest.fixture
async def court(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Court]:
    made = Court(tmp_path, monkeypatch)
    async with running(tmp_path / "scheduler", made.chain, made.clock, database=database) as market:
        made.market = market
        await made.client.connect(market)
        for provider in made.providers.values():
            await provider.start(made.chain)
            await provider.ready(market, made.clock)
        yield made
        made.gate.set()
        for provider in made.providers.values():
            await provider.stop()
        await made.client.close()


async def test_judging_holds_up_neither_the_scheduler_nor_is_it_overtaken_by_time(court: Court) -> None:
    job, checks = await court.delivered(WRONG)
    report = court.reporting(job, checks)
    await court.judging()
    court.clock.pass_seconds(61)
    await court.market.billing.tick()
    account = await court.client.account()  # answered while the judge is at work
    assert money_from_bytes(account.held) > 0
    assert money_from_bytes(account.used) == 0, "not owed by time: the report came before its end"
    court.gate.set()
    assert (await report).state == "rejected"


async def test_judging_a_report_that_proves_nothing_delays_nothing_further(court: Court) -> None:
    job, checks = await court.delivered(ROWS)
    report = court.reporting(job, checks)
    await court.judging()
    court.clock.pass_seconds(61)
    await court.market.billing.tick()
    court.gate.set()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await report
    assert "does not reject" in from_rpc(caught.value, "the scheduler").message
    account = await court.client.account()
    assert money_from_bytes(account.used) > 0, "owed with the verdict, without waiting for a timer"


async def test_judging_takes_few_reports_of_a_client_and_one_of_a_job(court: Court) -> None:
    job, checks = await court.delivered(WRONG)
    first = court.reporting(job, checks)
    await court.judging()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await court.client.report(job, pb.VERDICT_REJECTED, checks)
    assert isinstance(from_rpc(caught.value, "the scheduler"), Busy)
    others = [await court.delivered(WRONG) for _ in range(4)]
    waiting = [court.reporting(*other) for other in others[:3]]
    await asyncio.sleep(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.gather(*waiting, court.reporting(*others[3]))
    assert isinstance(from_rpc(caught.value, "the scheduler"), Busy)
    assert court.entered == 1, "one at a time"
    court.gate.set()
    assert (await first).state == "rejected"


async def test_judging_goes_on_when_its_client_hangs_up(court: Court) -> None:
    job, checks = await court.delivered(WRONG)
    report = court.reporting(job, checks)
    await court.judging()
    report.cancel()
    await asyncio.gather(report, return_exceptions=True)
    court.gate.set()
    async with asyncio.timeout(20):
        while court.market.ledger.jobs[job.spec.key].state.name != "REJECTED":  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_judging_refuses_an_opening_of_too_many_items(court: Court) -> None:
    job, checks = await court.delivered(WRONG)
    court.gate.set()
    checks[0].output = [b"1234"] * (ITEMS_MAX + 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await court.client.report(job, pb.VERDICT_REJECTED, checks)
    error = from_rpc(caught.value, "the scheduler")
    assert isinstance(error, ProtocolError)
    assert str(ITEMS_MAX) in error.message

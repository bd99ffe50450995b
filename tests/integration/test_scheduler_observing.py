"""What a scheduler counts while it matches, and how it finds out whether it could: real calls over TLS, a chain filled in by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scheduler_world import SCHEDULER, TOKEN, HandChain, HandClock, ScriptedClient, ScriptedProvider, key, running

from gpumarket.core.errors import JournalError
from gpumarket.core.units import Address
from gpumarket.scheduler.filters import NAMES
from gpumarket.scheduler.market import Market
from gpumarket.scheduler.match import NOBODY, NoMatch, Removed, stopped_by
from gpumarket.scheduler.metrics import SchedulerMetrics, Watched
from gpumarket.scheduler.readiness import _own_trouble
from gpumarket.settlement.chain.gas_tally import GasTally
from gpumarket.settlement.readiness import chain_trouble, journal_trouble
from gpumarket.v1 import market_pb2 as pb


@dataclass
class Floor:
    market: Market
    chain: HandChain
    clock: HandClock
    client: ScriptedClient
    provider: ScriptedProvider

    def read(self) -> dict[str, Any]:
        """The scheduler's readings, the world around it being still."""
        still: Any = SimpleNamespace(count=0, failures=0, head=7, confirmations=2, silent_seconds=0.0, rewinds=0, rereads=0)
        actions: Any = SimpleNamespace(sender=SimpleNamespace(tally=GasTally(), watched=0))
        watched = Watched(self.market, still, still, self.chain.view, still, actions, Address(SCHEDULER.address))
        return dict(SchedulerMetrics(watched).read())


@pytest.fixture
async def floor(tmp_path: Path) -> AsyncIterator[Floor]:
    clock = HandClock()
    chain = HandChain(SCHEDULER.address, clock)
    client = ScriptedClient("client", chain.hub(key("client")), clock)
    provider = ScriptedProvider("p1", tmp_path)
    async with running(tmp_path / "scheduler", chain, clock) as market:
        await client.connect(market)
        yield Floor(market, chain, clock, client, provider)
        await provider.stop()
        await client.close()


async def test_scheduler_counts_an_order_that_nobody_is_there_for(floor: Floor) -> None:
    assert (await floor.client.match(floor.client.job(), pay=TOKEN)).HasField("no_match")
    found = floor.read()
    assert (found["orders_total"], found["no_match_total"]) == (1, {NOBODY: 1})


async def test_scheduler_counts_leases_by_task_and_money_by_state(floor: Floor) -> None:
    await floor.provider.start(floor.chain)
    await floor.provider.ready(floor.market, floor.clock)
    assert (await floor.client.match(floor.client.job(), pay=TOKEN)).HasField("granted")
    found = floor.read()
    assert found["leases_total"] == {"embed": 1}
    assert found["clients_money_tokens"]["voucher"] == 1.0
    assert found["clients_money_tokens"]["open"] == 1.0
    assert found["providers_money_tokens"]["reserved"] > 0
    assert found["providers"] == {"listed": 1, "connected": 1, "proven": 1, "jailed": 0}
    assert found["places_reserved"] == 1
    assert not any(found["providers_waiting"].values())


async def test_scheduler_counts_quotes_that_fail_by_what_stopped_the_nearest(floor: Floor) -> None:
    await floor.provider.start(floor.chain)
    await floor.provider.ready(floor.market, floor.clock)
    floor.clock.pass_seconds(60)  # no heartbeat since
    assert (await floor.client.match(floor.client.job(), quote=True)).HasField("no_match")
    assert floor.read()["no_match_total"] == {"heartbeat": 1}
    assert floor.read()["quotes_total"] == 1


async def test_scheduler_counts_refusals_by_code(floor: Floor) -> None:
    reply = await floor.client.match(floor.client.job(max_amount=50 * TOKEN), pay=TOKEN)
    assert reply.problem.code == "out_of_funds"
    assert floor.read()["refusals_total"] == {"out_of_funds": 1}


async def test_scheduler_says_what_stands_in_a_providers_way(floor: Floor) -> None:
    presence, who = floor.market.presence, floor.provider.address
    assert presence.notice(who)[0] == "unlisted"
    await floor.provider.start(floor.chain)
    await floor.provider.ready(floor.market, floor.clock)
    assert presence.notice(who) == ("", "")
    presence.proofs[who].holds, presence.proofs[who].reason = False, "GPU proof failed"
    assert presence.notice(who) == ("gpu_proof", "GPU proof failed")
    presence.sessions[who].obstacle = presence.notice(who)[0]
    assert floor.read()["providers_waiting"]["gpu_proof"] == 1


def test_reason_of_no_match_is_the_filter_that_stopped_whoever_came_farthest() -> None:
    removed = (Removed("capacity", 1, ""), Removed("model", 90, ""), Removed("vram", 9, ""))
    assert stopped_by(NoMatch(100, removed)) == "capacity"
    assert stopped_by(NoMatch(0, ())) == NOBODY
    assert len(set(NAMES)) == len(NAMES)


# --- readiness -----------------------------------------------------------------------------------------------------------------


async def test_readiness_is_refused_while_the_chain_view_is_in_doubt_without_naming_the_endpoint(floor: Floor) -> None:
    assert await chain_trouble(floor.chain.view) == ""
    floor.chain.view.trouble = "the chain at http://user:secret@host has made no new block"
    told = await chain_trouble(floor.chain.view)
    assert told and "secret" not in told


async def test_readiness_asks_the_database_with_a_real_query(floor: Floor) -> None:
    journal = floor.market.world.journal
    assert await journal_trouble(journal) == ""
    floor_tables = journal.metadata.sorted_tables[0].name
    await journal.transact(lambda c: c.exec_driver_sql(f"ALTER TABLE {floor_tables} RENAME TO gone"))
    assert "cannot be read" in await journal_trouble(journal)
    await journal.transact(lambda c: c.exec_driver_sql(f"ALTER TABLE gone RENAME TO {floor_tables}"))


async def test_readiness_is_refused_while_the_scheduler_drains_or_its_ledger_is_broken(floor: Floor) -> None:
    assert await _own_trouble(floor.market) == ""
    floor.market.desk.closed = True
    assert "draining" in await _own_trouble(floor.market)
    floor.market.ledger.failure = JournalError("disk full")
    assert "ledger" in await _own_trouble(floor.market)
    floor.market.ledger.failure = None


async def test_order_with_a_hostile_context_is_matched_all_the_same(floor: Floor) -> None:
    await floor.provider.start(floor.chain)
    await floor.provider.ready(floor.market, floor.clock)
    for text in ("00-evil", "x" * 1_000_000, "00-" + "0" * 32 + "-" + "0" * 16 + "-00"):
        reply: pb.MatchReply = await floor.client.match(floor.client.job(), pay=TOKEN, traceparent=text)
        assert reply.HasField("granted")

"""The ledger: nothing is answered or signed before it is committed, and a failed commit stops everything."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from scheduler_jobs import CLIENT, MOST, NOW, PROVIDER, UNITS, ack_of, claim, next_attempt, spec_of
from scheduler_world import CHANNELS, SCHEDULER, TOKEN
from sqlalchemy import create_engine, inspect, select

from gpumarket.core.codec import to_proto
from gpumarket.core.errors import JournalError, OutOfFunds
from gpumarket.core.units import Hash
from gpumarket.scheduler import lifecycle, migrations, tables
from gpumarket.scheduler.ledger import HubChannel, Ledger
from gpumarket.scheduler.lifecycle import Attempt, AttemptState, Job
from gpumarket.scheduler.records import offer_digest
from gpumarket.scheduler.reputation import Deed
from gpumarket.settlement.channel import PaidChannel, ReceivedChannel, ReceiveVoucher, handle
from gpumarket.settlement.journal import Journal
from gpumarket.v1 import terms_pb2

HUB, SPOKE = Hash(b"c" * 32), Hash(b"s" * 32)


@pytest.fixture
def url(database: str) -> str:
    """The ledger's database: SQLite, and PostgreSQL."""
    return database


def ledger_of(url: str) -> tuple[Ledger, Journal]:
    journal = Journal(url, tables.metadata)
    journal.open()
    ledger = Ledger(journal, SCHEDULER, CHANNELS)
    ledger.load(NOW)
    ledger.start()
    return ledger, journal


def filled(url: str) -> tuple[Ledger, Journal]:
    """A ledger with one client's channel, vouchered, and one spoke."""
    ledger, journal = ledger_of(url)
    hub = ReceivedChannel(HUB, CLIENT, TOKEN, 10**10)
    ledger.hubs[HUB] = HubChannel(hub, CLIENT)
    ledger.put_hub(handle(hub, ReceiveVoucher(MOST, b"v" * 65)))
    ledger.add_spoke(PaidChannel(SPOKE, PROVIDER, TOKEN, 10**10), PROVIDER)
    return ledger, journal


def order(ledger: Ledger) -> Job:
    spec = spec_of()
    job = Job(spec.key, spec, order_bytes(), HUB, NOW)
    attempt = next_attempt(job)
    signed = signed_lease(attempt)
    ledger.keep_offer(OFFER_DIGEST, OFFER)
    return ledger.apply(lifecycle.grant(job, replace(attempt, signed=signed, offer=OFFER), until=0), NOW)


def order_bytes() -> bytes:
    return terms_pb2.JobOrder(spec=to_proto(spec_of(), terms_pb2.JobSpec())).SerializeToString(deterministic=True)


def signed_lease(attempt: Attempt) -> bytes:
    return terms_pb2.SignedLease(lease=to_proto(attempt.lease, terms_pb2.Lease())).SerializeToString()


OFFER = b"an offer"
OFFER_DIGEST = offer_digest(OFFER)


async def test_ledger_read_back_is_what_was_committed(url: str) -> None:
    ledger, journal = filled(url)
    job = order(ledger)
    ledger.judge(lifecycle.Judge(PROVIDER, Deed.CHECKED), NOW)
    await ledger.commit()
    await ledger.close()
    await journal.close()
    again, second = ledger_of(url)
    assert again.jobs == {job.key: job}
    assert again.find_lease(job.newest.hash) == (job, 1)
    assert again.hubs[HUB].state == ledger.hubs[HUB].state
    assert again.spokes[SPOKE].state == ledger.spokes[SPOKE].state
    assert again.reputations == ledger.reputations
    await again.close()
    await second.close()


async def test_voucher_is_signed_only_after_its_guard_is_committed(url: str) -> None:
    ledger, journal = filled(url)
    job = order(ledger)
    await ledger.commit()
    ledger.apply(claim(job, ack_of(job, UNITS, complete=True)), NOW)
    assert ledger.spokes[SPOKE].state.vouchered == 1_000
    assert ledger.voucher(SPOKE) == (0, b""), "not before the commit"
    await ledger.commit()
    cumulative, signature = ledger.voucher(SPOKE)
    assert (cumulative, len(signature)) == (1_000, 65)
    assert journal.read(lambda c: c.execute(select(tables.guard.c.cumulative)).scalar_one()) == 1_000
    await ledger.close()
    await journal.close()
    again, second = ledger_of(url)
    assert again.voucher(SPOKE) == (1_000, signature), "the same bytes after a restart"
    await again.close()
    await second.close()


async def test_failed_commit_reaches_every_waiter_and_refuses_what_follows(url: str) -> None:
    ledger, journal = filled(url)
    job = order(ledger)
    await ledger.commit()

    async def broken(_: Any) -> None:
        raise JournalError("the disk is full")

    journal.transact = broken  # type: ignore[method-assign,assignment]
    ledger.apply(claim(job, ack_of(job, UNITS, complete=True)), NOW)
    with pytest.raises(JournalError, match="disk is full"):
        await ledger.commit()
    assert ledger.voucher(SPOKE) == (0, b"")
    with pytest.raises(JournalError):
        await ledger.commit()
    await ledger.close()
    await journal.close()


async def test_order_that_the_spoke_cannot_cover_changes_nothing(url: str) -> None:
    ledger, journal = filled(url)
    ledger.spokes[SPOKE].state = PaidChannel(SPOKE, PROVIDER, 10, 10**10)
    before = ledger.hubs[HUB].state
    with pytest.raises(OutOfFunds):
        order(ledger)
    assert ledger.hubs[HUB].state == before
    assert not ledger.jobs
    await ledger.close()
    await journal.close()


async def test_ledger_whose_channel_disagrees_with_its_jobs_is_refused(url: str) -> None:
    ledger, journal = filled(url)
    order(ledger)
    await ledger.commit()
    await journal.transact(lambda c: c.execute(tables.client_channels.update().values(open=0)))
    await ledger.close()
    await journal.close()
    with pytest.raises(JournalError, match="the channel says"):
        ledger_of(url)


async def test_finished_jobs_leave_memory_and_are_still_found(url: str) -> None:
    ledger, journal = filled(url)
    job = order(ledger)
    await ledger.commit()
    job = ledger.apply(claim(job, ack_of(job, UNITS, complete=True)), NOW)
    await ledger.commit()
    ledger.forget(job.spec.deadline + 1)
    assert not ledger.jobs
    found, number = ledger.find_lease(job.newest.hash)
    assert (found, number, found.newest.state) == (job, 1, AttemptState.OWED)
    await ledger.close()
    await journal.close()


async def test_finished_job_that_left_memory_takes_one_more_event_and_the_ledger_goes_on(url: str) -> None:
    """A claim, report or retry may come again at any time after: written as new it would end the scheduler."""
    ledger, journal = filled(url)
    job = order(ledger)
    ledger.apply(claim(job, ack_of(job, UNITS, complete=True)), NOW)
    await ledger.commit()
    ledger.forget(job.spec.deadline + 1)
    assert job.key not in ledger.jobs
    found, number = ledger.find_lease(job.newest.hash)
    ledger.apply(lifecycle.accept(found, number), NOW)
    ledger.apply((replace(found), []), NOW)  # an equal one that is another object
    await ledger.commit()
    assert ledger.failure is None
    ledger.forget(job.spec.deadline + 1)
    again = ledger.find(job.key)
    assert again is not None and again.state is found.state
    await ledger.close()
    await journal.close()


async def test_job_that_is_being_written_is_not_forgotten(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, journal = filled(url)
    job = order(ledger)
    await ledger.commit()
    begun, go, transact = asyncio.Event(), asyncio.Event(), journal.transact

    async def late(work: Any) -> Any:
        begun.set()
        await go.wait()
        return await transact(work)

    monkeypatch.setattr(journal, "transact", late)
    ledger.apply(claim(job, ack_of(job, UNITS, complete=True)), NOW)
    committing = asyncio.ensure_future(ledger.commit())
    await begun.wait()
    ledger.forget(job.spec.deadline + 1)
    assert job.key in ledger.jobs
    go.set()
    await committing
    ledger.forget(job.spec.deadline + 1)
    assert job.key not in ledger.jobs
    await ledger.close()
    await journal.close()


@pytest.mark.parametrize("restarted", [True, False])
async def test_change_of_a_job_that_left_memory_is_written_over_its_row(url: str, restarted: bool) -> None:
    """A late ack, or a claim that comes again: written as a new row it would end the ledger, and the scheduler with it."""
    ledger, journal = filled(url)
    job = order(ledger)
    await ledger.commit()
    job = ledger.apply(claim(job, ack_of(job, UNITS, complete=True)), NOW)
    await ledger.commit()
    late = job.spec.deadline + 1
    if restarted:
        await ledger.close()
        ledger = Ledger(journal, SCHEDULER, CHANNELS)
        ledger.load(late)
        ledger.start()
    else:
        ledger.forget(late)
    assert not ledger.jobs
    found, _ = ledger.find_lease(job.newest.hash)
    ledger.apply((found, []), late)
    await ledger.commit()
    assert ledger.failure is None
    assert ledger.jobs == {job.key: job}
    ledger.forget(late)
    assert not ledger._stored_jobs and not ledger._stored_attempts
    await ledger.close()
    await journal.close()


def shape(url: str) -> dict[str, Any]:
    """Every table of a database: columns, keys, indexes."""
    engine = create_engine(url)
    look = inspect(engine)
    found = {
        name: (
            [(c["name"], str(c["type"]), c["nullable"]) for c in look.get_columns(name)],
            look.get_pk_constraint(name)["constrained_columns"],
            sorted((str(i["name"]), tuple(i["column_names"]), bool(i["unique"])) for i in look.get_indexes(name)),
            sorted(tuple(u["column_names"]) for u in look.get_unique_constraints(name)),
        )
        for name in set(look.get_table_names()) - {"alembic_version"}
    }
    engine.dispose()
    return found


def test_migrations_make_exactly_the_tables_that_the_code_describes(url: str) -> None:
    engine = create_engine(url)
    tables.metadata.create_all(engine)
    described = shape(url)
    tables.metadata.drop_all(engine)
    engine.dispose()
    migrations.upgrade(url)
    assert shape(url) == described
    assert described.keys() == tables.metadata.tables.keys()


async def test_migrated_database_opens_as_a_journal(url: str) -> None:
    migrations.upgrade(url)
    migrations.upgrade(url)
    journal = Journal(url, tables.metadata)
    journal.open()
    await journal.close()

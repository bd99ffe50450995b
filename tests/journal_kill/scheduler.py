"""The scheduler's ledger under a killer: orders, claims, a check, a retry, a rejection, and the vouchers that pay them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from journal_kill.facts import Fact, Lost, Say, WrongBalance, of_kind, require_one_signature, voucher_signed
from scheduler_jobs import CLIENT, NOW, PROVIDER, UNITS, ack_of, claim, next_attempt, spec_of
from scheduler_world import CHANNELS, SCHEDULER, TOKEN
from sqlalchemy import select

from gpumarket.core.codec import signed_lease, signed_order, voucher_proto
from gpumarket.core.terms import JobSpec, Voucher, keccak256
from gpumarket.core.units import Hash, Money
from gpumarket.scheduler import lifecycle, migrations, tables
from gpumarket.scheduler.holdings import Holdings
from gpumarket.scheduler.ledger import HubChannel, Ledger
from gpumarket.scheduler.lifecycle import Attempt, AttemptState, Job
from gpumarket.scheduler.records import offer_digest
from gpumarket.scheduler.reputation import Deed
from gpumarket.settlement.channel import PaidChannel, ReceivedChannel, ReceiveVoucher, handle
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.vouchers import sign_voucher

FILE = "ledger.db"
HUB, SPOKE = Hash(b"c" * 32), Hash(b"s" * 32)
OFFER = b"an offer"
JOBS = 4
STEP = 10_000
CHECK_SECONDS = 60


async def work(folder: Path, say: Say, turn: int = 0) -> None:
    ledger, journal = await opened(folder)
    try:
        await live(ledger, say, turn)
        await ledger.close()
    finally:
        await journal.close()


async def opened(place: Path | str) -> tuple[Ledger, Journal]:
    """As the daemon opens them, in a folder or at a URL: migrations, journal, ledger."""
    url = place if isinstance(place, str) else f"sqlite:///{place / FILE}"
    migrations.upgrade(url)
    journal = Journal(url, tables.metadata)
    journal.open()
    ledger = Ledger(journal, SCHEDULER, CHANNELS)
    try:
        ledger.load(NOW)
    except BaseException:
        await journal.close()
        raise
    ledger.start()
    return ledger, journal


async def live(ledger: Ledger, say: Say, turn: int) -> None:
    if HUB not in ledger.hubs:
        ledger.hubs[HUB] = HubChannel(ReceivedChannel(HUB, CLIENT, TOKEN, 10**10), CLIENT)
        ledger.put_hub(ledger.hubs[HUB].state)
    if SPOKE not in ledger.spokes:
        ledger.add_spoke(PaidChannel(SPOKE, PROVIDER, TOKEN, 10**10), PROVIDER)
    await ledger.commit()
    say({"kind": "channels"})
    await asyncio.gather(*(one_order(ledger, say, turn * JOBS + n) for n in range(JOBS)))
    paid, checked, retried, rejected = (ledger.jobs[spec_number(turn * JOBS + n).key] for n in range(JOBS))
    await told(ledger, say, claim(paid, ack_of(paid, UNITS, complete=True)))
    ledger.apply(claim(checked, ack_of(checked, UNITS, complete=True, will_check=True)), NOW)
    await told(ledger, say, lifecycle.accept(ledger.jobs[checked.key], 1))
    await told(ledger, say, lifecycle.close(retried, 1, ack_of(retried, 16), b"ack", "lost", NOW, CHECK_SECONDS))
    await grant(ledger, say, ledger.jobs[retried.key], prefix=16)
    await told(
        ledger, say, claim(ledger.jobs[retried.key], ack_of(ledger.jobs[retried.key], UNITS - 16, complete=True), UNITS - 16, number=2)
    )
    await told(ledger, say, lifecycle.due(ledger.jobs[retried.key], NOW + 2 * CHECK_SECONDS, 120))
    ledger.apply(claim(rejected, ack_of(rejected, UNITS, complete=True, will_check=True)), NOW)
    await told(ledger, say, lifecycle.reject(ledger.jobs[rejected.key], 1, "wrong numbers"))
    ledger.judge(lifecycle.Judge(PROVIDER, Deed.CHECKED), NOW)
    await ledger.commit()
    say({"kind": "reputation", "kept": ledger.reputations[PROVIDER].kept})


async def one_order(ledger: Ledger, say: Say, number: int) -> None:
    """A higher voucher, an order, its lease."""
    raised = ReceiveVoucher(ledger.hubs[HUB].state.voucher + STEP, b"%065d" % (ledger.hubs[HUB].state.voucher + STEP))
    ledger.put_hub(handle(ledger.hubs[HUB].state, raised))
    spec = spec_number(number)
    order = signed_order(SCHEDULER, CHANNELS, spec, b"").SerializeToString(deterministic=True)
    await grant(ledger, say, Job(spec.key, spec, order, HUB, NOW))
    say({"kind": "received", "voucher": raised.cumulative})


def spec_number(number: int) -> JobSpec:
    return replace(spec_of(), job_id=Hash(keccak256(b"sweep %d" % number)))


async def grant(ledger: Ledger, say: Say, job: Job, prefix: int = 0) -> None:
    attempt: Attempt = next_attempt(job, prefix)
    lease = signed_lease(SCHEDULER, CHANNELS, attempt.lease)
    ledger.keep_offer(offer_digest(OFFER), OFFER)
    ledger.apply(lifecycle.grant(job, replace(attempt, signed=lease.SerializeToString(), offer=OFFER), until=0), NOW)
    await ledger.commit()
    at = f"{job.key.hex()} {attempt.lease.attempt}"
    say({"kind": "signed", "what": "lease", "at": at, "signature": lease.signature.hex(), "lease": attempt.hash.hex()})


async def told(ledger: Ledger, say: Say, change: lifecycle.Change) -> None:
    """Carry a change out, and tell what its claimant would be answered."""
    job = ledger.apply(change, NOW)
    await ledger.commit()
    states = [int(a.state) for a in job.attempts]
    say({"kind": "answered", "job": job.key.hex(), "states": states, "amounts": [a.amount for a in job.attempts]})
    cumulative, signature = ledger.voucher(SPOKE)
    if cumulative:
        say(voucher_signed(SPOKE, cumulative, signature))


async def verify(place: Path | str, said: Sequence[Fact], turn: int = 1) -> None:
    ledger, journal = await opened(place)
    later = list(said)
    try:
        require_kept(said, ledger)
        require_books(ledger, journal)
        cumulative, signature = ledger.voucher(SPOKE) if SPOKE in ledger.spokes else (0, b"")
        if cumulative:
            later.append(voucher_signed(SPOKE, cumulative, signature))
        provider_shows(ledger, said)
        await live(ledger, later.append, turn)
        await ledger.close()
        require_books(ledger, journal)
        require_one_signature(later)
    finally:
        await journal.close()


def provider_shows(ledger: Ledger, said: Sequence[Fact]) -> None:
    """What a provider says after its hello: the newest voucher that it got."""
    got = [fact for fact in of_kind(said, "signed") if fact["what"] == "voucher"]
    held = []
    for fact in got[-1:]:
        voucher = Voucher(SPOKE, Money(int(fact["at"].split()[1])))
        held = [voucher_proto(voucher, bytes.fromhex(fact["signature"]))]
    Holdings(ledger, SCHEDULER.address, CHANNELS).told(PROVIDER, held)


def require_kept(said: Sequence[Fact], ledger: Ledger) -> None:
    """Everything that the scenario was told to be durable is there."""
    for fact in said:
        match fact["kind"]:
            case "channels":
                if HUB not in ledger.hubs or SPOKE not in ledger.spokes:
                    raise Lost("a channel")
            case "received":
                if ledger.hubs[HUB].state.voucher < fact["voucher"]:
                    raise Lost(f"a client's voucher: {fact}")
            case "signed" if fact["what"] == "lease":
                job, number = ledger.find_lease(Hash(bytes.fromhex(fact["lease"])))
                if job.attempt(number).hash.hex() != fact["lease"]:
                    raise Lost(f"a lease: {fact}")
            case "signed" if fact["what"] == "voucher":
                if ledger.voucher(SPOKE)[0] < int(fact["at"].split()[1]):
                    raise Lost(f"a voucher: {fact}")
            case "reputation":
                if ledger.reputations[PROVIDER].kept < fact["kept"]:
                    raise Lost("a deed")
    for fact in {fact["job"]: fact for fact in of_kind(said, "answered")}.values():
        found = ledger.find(Hash(bytes.fromhex(fact["job"])))
        if found is None or any(a.state < s for a, s in zip(found.attempts, fact["states"], strict=False)):
            raise Lost(f"an answer: {fact}")


def require_books(ledger: Ledger, journal: Journal) -> None:
    """Channels against jobs (I1), and the guard against what was paid."""
    ledger.check()
    jobs = list(ledger.jobs.values())
    paid = sum(a.amount for job in jobs for a in job.attempts if a.state is AttemptState.OWED)
    if SPOKE not in ledger.spokes:
        return
    spoke, hub = ledger.spokes[SPOKE].state, ledger.hubs[HUB].state
    guarded = journal.read(lambda c: c.execute(select(tables.guard.c.cumulative)).scalar_one())
    if not spoke.vouchered == paid == guarded == ledger.spokes[SPOKE].released:
        raise WrongBalance(f"owed {paid}, vouchered {spoke.vouchered}, guarded {guarded}")
    if paid and ledger.voucher(SPOKE)[1] != sign_voucher(SCHEDULER, CHANNELS, SPOKE, paid):
        raise WrongBalance("a voucher of something else")
    used = sum(lifecycle.charged(a) for job in jobs for a in job.attempts if a.state is AttemptState.OWED)
    if hub.used != used:
        raise WrongBalance(f"the client used {used}, its channel says {hub.used}")
    kept = sum(a.amount for j in jobs for a in j.attempts if a.state is AttemptState.HELD)
    kept += sum(a.lease.maximum for j in jobs for a in j.attempts if a.state is AttemptState.OPEN)
    if spoke.reserved != kept:
        raise WrongBalance(f"attempts reserve {kept}, the channel says {spoke.reserved}")

"""The client's journal under a killer: a channel, orders with their vouchers, output with its acks, a retry, what was billed, disputes, and
the guard of another machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from journal_kill.facts import NOW, Fact, FixedClock, Lost, Say, SeededRandom, WrongBalance, of_kind, require_one_signature, voucher_signed
from journal_kill.owed import ELSEWHERE, disputes_turn, import_turn, require_disputes_kept, require_import_kept
from sdk_market import CLIENT, DOMAIN, Channel, MemoryChain
from sdk_terms import TOKEN, lease, receipt, spec
from sqlalchemy import select

from gpumarket.core.codec import open_ack, parse, signed_lease, signed_order, signed_receipt
from gpumarket.core.signing import LocalKey
from gpumarket.core.terms import Lease, Task, keccak256, output_chain, token_item
from gpumarket.core.units import Address, Hash, Money, money_from_bytes
from gpumarket.sdk import store
from gpumarket.sdk.account import Account, PaidChannelState
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.ordering import plan_of
from gpumarket.sdk.running import JobRun, _Wire
from gpumarket.sdk.session import AttemptFailed, Event, FinishedReceived, FrameReceived, LeaseReceived, Progress, StartedReceived, handle
from gpumarket.sdk.settings import ClientSettings
from gpumarket.sdk.tables import ATTEMPTS, CHANNELS, GUARD, JOBS, METADATA
from gpumarket.settlement.journal import Journal
from gpumarket.v1 import terms_pb2 as pb

FILE = "journal.db"
SCHEDULER = Address(b"\x5c" * 20)
PROVIDER = LocalKey(keccak256(b"a provider"))
COUNT, TOKENS, FIRST = 3, 8, 4
MAXIMUM = Money(TOKEN // 100)


async def work(folder: Path, say: Say, turn: int = 0) -> None:
    journal = journal_of(folder)
    try:
        await live(journal, MemoryChain(), say, turn)
    finally:
        await journal.close()


def journal_of(folder: Path) -> Journal:
    """As the client opens it."""
    journal = Journal(f"sqlite:///{folder / FILE}", METADATA)
    journal.open()
    return journal


async def live(journal: Journal, chain: MemoryChain, say: Say, turn: int) -> None:
    settings, clock, random = ClientSettings(exposure="10", deposit="10"), FixedClock(), SeededRandom(f"client {turn}")
    account = Account(journal, chain, CLIENT, settings, clock, random)
    for intent in journal.read(lambda c: list(c.execute(select(METADATA.tables["client_channel_intents"].c.label)))):
        say({"kind": "intent", "label": intent.label})
    desk: Any = SimpleNamespace(settings=settings, signer=CLIENT, chain=chain, journal=journal, account=account, clock=clock, random=random)
    desk.domain = DOMAIN
    channel = await account.channel(SCHEDULER, 60)
    say({"kind": "channel", "id": channel.id.hex(), "deposit": channel.deposit, "expires_at": channel.expires_at})
    for number in range(COUNT):
        await one_job(desk, channel, say, turn * COUNT + number, fails=number == 1)
    await disputes_turn(journal, say, turn)
    await import_turn(journal, say, turn)


async def one_job(desk: Desk, channel: PaidChannelState, say: Say, number: int, *, fails: bool) -> None:
    """Order with voucher; half the answer; then the rest, or (fails) the rest from another provider."""
    job = job_number(desk, channel.id, number)
    voucher = await desk.account.cover(channel, MAXIMUM, lambda c: store.add_job(c, job))
    say({"kind": "ordered", "job": job.job.hex()})
    if voucher is not None:
        say(voucher_signed(channel.id, money_from_bytes(voucher.voucher.cumulative), voucher.signature))
    plan = plan_of(job.spec, job.request, 5)
    run = JobRun(desk, job, channel, Progress(plan), probability=0.0)
    tokens = [token_item(t) for t in range(TOKENS)]
    await lease_comes(desk, run, say)
    await apply(run, say, [StartedReceived(1, nonce_of(run))])
    await apply(run, say, [FrameReceived(1, tuple(tokens[:FIRST]), FIRST)])
    if fails:
        await apply(run, say, [AttemptFailed(1, "lost", "gone", NOW)])
        await lease_comes(desk, run, say)
        await apply(run, say, [StartedReceived(2, nonce_of(run))])
    attempt = run.progress.attempt
    done = TOKENS - FIRST if fails else TOKENS
    await apply(run, say, [FrameReceived(attempt, tuple(tokens[FIRST:]), done)])
    said = receipt(run.progress, units=done, output_hash=output_chain(tokens))
    assert run._wire is not None
    run._wire.receipt = signed_receipt(PROVIDER, DOMAIN, said)
    await apply(run, say, [FinishedReceived(attempt, said, "length", False, NOW)])
    say({"kind": "billed", "job": job.job.hex(), "amount": run.billed, "receipt": run.signed_receipt.signature.hex()})


async def lease_comes(desk: Desk, run: JobRun, say: Say) -> None:
    progress = run.progress
    terms = lease(
        run.job.spec,
        attempt=progress.attempt + 1,
        prefix_units=progress.units,
        prefix_hash=progress.output_hash,
        client_channel=run.job.channel,
        provider=PROVIDER.address,
        maximum=MAXIMUM,
    )
    signed = signed_lease(PROVIDER, DOMAIN, terms)
    progress, _ = handle(progress, LeaseReceived(terms))
    await desk.journal.transact(lambda c: store.add_attempt(c, run.job.job, signed, pb.SignedOffer()))
    run.progress, run._wire = progress, _Wire(signed, pb.SignedOffer(), pb.OfferBody())
    say({"kind": "leased", "job": run.job.job.hex(), "attempt": terms.attempt})


def nonce_of(run: JobRun) -> Hash:
    assert run.progress.lease is not None
    return Hash(keccak256(b"nonce" + run.progress.lease.struct_hash))


async def apply(run: JobRun, say: Say, events: list[Event]) -> None:
    """What the stream's reader does: durable first, then the items go to the caller and the ack to the provider."""
    items, ack = await run._apply(events)
    if items:
        say({"kind": "delivered", "job": run.job.job.hex(), "items": run.progress.items})
    if ack is not None:
        at = f"{ack.ack.lease.hex()} {ack.ack.units} {ack.ack.complete}"
        say(
            {
                "kind": "signed",
                "what": "ack",
                "at": at,
                "signature": ack.signature.hex(),
                "units": ack.ack.units,
                "lease": ack.ack.lease.hex(),
            }
        )


def job_number(desk: Desk, channel: Hash, number: int) -> store.StoredJob:
    request = pb.GenerateRequest(prompt=range(10), max_tokens=TOKENS, temperature_milli=0, top_p_ppm=1_000_000).SerializeToString()
    terms = spec(
        Task.GENERATE,
        output=TOKENS,
        client=CLIENT.address,
        scheduler=SCHEDULER,
        job_id=Hash(keccak256(b"job %d" % number)),
        max_amount=MAXIMUM,
    )
    return store.StoredJob(
        job=terms.key,
        alias="m",
        purpose="user",
        parent=None,
        state="ordered",
        channel=channel,
        order=signed_order(CLIENT, DOMAIN, terms, b""),
        request=request,
        salt=Hash(bytes(32)),
        options={},
        attempt=0,
        billed=Money(0),
        will_check=False,
        verdict="",
        verdict_facts={},
        finish_reason="",
        created_at=NOW,
        spec=terms,
    )


async def verify(folder: Path, said: Sequence[Fact]) -> None:
    journal = journal_of(folder)
    later = list(said)
    try:
        require_kept(said, journal)
        require_disputes_kept(said, journal)
        require_import_kept(said, journal)
        require_books(journal)
        chain = MemoryChain()
        for fact in of_kind(said, "channel"):  # the chain has not forgotten it
            found = Hash(bytes.fromhex(fact["id"]))
            chain.channels[found] = Channel(found, CLIENT.address, SCHEDULER, fact["deposit"], fact["expires_at"])
        await live(journal, chain, later.append, turn=1)
        if len({fact["id"] for fact in of_kind(later, "channel")}) != 1:
            raise WrongBalance("a second channel was opened")
        require_books(journal)
        require_import_kept(later, journal)
        require_one_signature(later)
    finally:
        await journal.close()


def require_kept(said: Sequence[Fact], journal: Journal) -> None:
    """Everything that the scenario was told to be durable is there."""
    rows = journal.read(lambda c: {r.job: r for r in c.execute(select(JOBS))})
    tries = journal.read(lambda c: {(r.job, r.number): r for r in c.execute(select(ATTEMPTS))})
    acked = {bytes(pb_lease(r).struct_hash): parse(pb.SignedAck, r.ack).ack.units for r in tries.values() if r.ack is not None}
    channels = journal.read(lambda c: {r.id: r for r in c.execute(select(CHANNELS))})
    for fact in said:
        job = bytes.fromhex(fact["job"]) if "job" in fact else b""
        match fact["kind"]:
            case "channel" if bytes.fromhex(fact["id"]) not in channels:
                raise Lost("a channel")
            case "ordered" if job not in rows:
                raise Lost("an order that was sent")
            case "leased" if (job, fact["attempt"]) not in tries:
                raise Lost("a lease that was accepted")
            case "delivered" if len(journal.read(partial(store.load_output, job=Hash(job)))) < fact["items"]:
                raise Lost("output that was handed out")
            case "billed" if rows[job].state != "done" or rows[job].billed != fact["amount"]:
                raise Lost("the end of a job")
            case "signed" if fact["what"] == "ack" and acked.get(bytes.fromhex(fact["lease"]), 0) < fact["units"]:
                raise Lost("an ack that was sent")
            case "signed" if fact["what"] == "voucher" and channels[bytes.fromhex(fact["at"][:64])].voucher < int(fact["at"][65:]):
                raise Lost("a voucher that was sent")


def pb_lease(row: Any) -> Lease:
    return store._attempt(row._mapping).lease


def require_books(journal: Journal) -> None:
    """Per channel: the guard is the voucher, what is billed is the sum of the jobs, and the voucher covers billed and open."""
    rows = journal.read(lambda c: list(c.execute(select(JOBS))))
    guards = journal.read(lambda c: {r.channel: r.cumulative for r in c.execute(select(GUARD))})
    for channel in journal.read(lambda c: list(c.execute(select(CHANNELS).where(CHANNELS.c.scheduler != ELSEWHERE)))):
        mine = [r for r in rows if r.channel == channel.id]
        billed, running = sum(r.billed for r in mine), sum(r.max_amount for r in mine if r.state in store.RUNNING)
        if guards.get(channel.id) != channel.voucher or channel.billed != billed or channel.voucher < billed + running:
            raise WrongBalance(f"guard {guards.get(channel.id)}, voucher {channel.voucher}, billed {channel.billed} of {billed}")
    for row in rows:
        tried = journal.read(partial(store.load_attempts, job=Hash(row.job)))
        for attempt in tried:
            if attempt.signed_ack is not None:
                open_ack(DOMAIN, attempt.signed_ack, CLIENT.address)
        if row.state == "done" and row.billed != sum(attempt.amount for attempt in tried):
            raise WrongBalance("a job's attempts add up to something else than its bill")

"""The Provider service over real TLS, with a scripted client, scheduler and engine."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from node_fixtures import CHANNEL, CLIENT, DOMAIN, PROVIDER, SCHEDULER, STRANGER, Job, embed_job, generate_job, on_sale, text_hash
from provider_market import Conversation, Running, provider_at, refusal, scheduler_at, until, voucher
from reliability import record

from gpumarket.core.codec import open_offer, open_receipt, parse, signed_call
from gpumarket.core.errors import (
    BadSignature,
    Busy,
    EngineFailed,
    GpumarketError,
    JobFailed,
    JournalError,
    OutOfFunds,
    ProtocolError,
    UnknownModel,
)
from gpumarket.core.rpc import from_rpc
from gpumarket.core.terms import Outcome, Task, keccak256, output_chain
from gpumarket.core.units import Hash, Money
from gpumarket.node.tables import DUE, HELD, OWED, SHORT, attempts
from gpumarket.settlement import gpu_proof
from gpumarket.v1 import market_pb2 as market
from gpumarket.v1 import provider_pb2 as pb
from gpumarket.v1 import terms_pb2 as terms

TEXT, VECTORS = on_sale(Task.GENERATE), on_sale(Task.EMBED)
BIG_CREDIT = "1"


def text(**changes: Any) -> Job:
    return generate_job(TEXT, now=int(time.time()), **changes)


def vectors(**changes: Any) -> Job:
    return embed_job(VECTORS, now=int(time.time()), **changes)


def row(running: Running, job: Job) -> Any:
    query = attempts.select().where(attempts.c.lease == job.lease.struct_hash)
    return running.journal.read(lambda c: c.execute(query).mappings().one_or_none())


async def test_service_embeds_and_signs_a_receipt_for_what_it_sent(tmp_path: Path) -> None:
    async with provider_at(tmp_path, VECTORS) as running:
        job = vectors()
        talk = await running.attempt(job).open()
        receipt = await talk.read_finished()
        assert [len(item) for item in talk.items] == [12, 12]
        assert np.frombuffer(talk.items[1], "<f4")[0] == 3
        assert (receipt.output_units, receipt.output_hash, receipt.outcome) == (5, output_chain(talk.items), Outcome.COMPLETED)
        assert receipt.nonce == talk.nonce
        await talk.ack(5, receipt.output_hash, complete=True)
        assert await talk.read() is None
        await until(lambda: row(running, job)["state"] == DUE)
        assert row(running, job)["amount"] == 5 * VECTORS.prompt_price // 1_000_000


async def test_service_streams_a_text_window_by_window(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        job = text(max_tokens=20)
        talk = await running.attempt(job).open()
        while talk.finished is None:
            assert await talk.read() is not None
            if talk.finished is None and talk.units % 8 == 0:
                await talk.ack()
        assert talk.tokens == list(range(20))
        receipt = await talk.read_finished()
        assert receipt.output_hash == text_hash(range(20))
        assert talk.finished.finish_reason == "length"
        await talk.ack(complete=True, will_check=True)
        assert await talk.read() is None
        await until(lambda: row(running, job)["state"] == DUE)
        kept = parse(terms.SignedAck, row(running, job)["signed_ack"]).ack
        assert (kept.units, kept.complete, kept.will_check) == (20, True, True)


@pytest.mark.parametrize("stops_at", [0, 3, 8, 19])
async def test_service_without_acks_sends_exactly_one_window_and_then_gives_up(tmp_path: Path, stops_at: int) -> None:
    """F41: a client that acknowledges up to here and then no more, while it goes on reading."""
    async with provider_at(tmp_path, TEXT, ack_seconds=1.0) as running:
        job = text()
        talk = await running.attempt(job).open()
        while talk.units < stops_at:
            await talk.read_units(min(talk.units + 1, stops_at))
            await talk.ack(min(talk.units, stops_at))
        receipt = await talk.read_finished()
        assert talk.units == stops_at + 8
        assert (receipt.output_units, receipt.outcome) == (stops_at + 8, Outcome.CANCELLED)
        assert running.engines["generate"].jobs == 0
        await until(lambda: row(running, job)["state"] == DUE)
        assert row(running, job)["amount"] == stops_at * TEXT.output_price // 1_000_000
    record("F41", 1, f"client stops after {stops_at} units: 8 more are sent unpaid, billed {stops_at}", "one window, 8 units")


async def test_service_client_that_hangs_up_while_its_ack_is_written_down_is_billed_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        accounts, writing, go_on = running.provider.accounts, asyncio.Event(), asyncio.Event()
        keep = accounts.keep_ack

        async def keep_slowly(lease: Hash, evidence: bytes) -> None:
            writing.set()
            await go_on.wait()
            await keep(lease, evidence)

        monkeypatch.setattr(accounts, "keep_ack", keep_slowly)
        job = text()
        talk = await running.attempt(job).open()
        await talk.read_units(8)
        await talk.ack()
        await writing.wait()
        (session,) = running.provider.service._sessions.values()
        talk.call.cancel()
        await until(lambda: not session._inbox.empty())  # the handler has seen that the client is gone
        go_on.set()
        await until(lambda: row(running, job)["state"] == DUE)
        assert row(running, job)["amount"] == 8 * TEXT.output_price // 1_000_000


async def test_service_continues_a_text_after_the_delivered_prefix(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        job = text(max_tokens=9, attempt=2, prefix=(0, 1, 2), prefix_units=3, prefix_hash=text_hash((0, 1, 2)))
        talk = await running.attempt(job).open()
        receipt = await talk.read_finished()
        assert talk.tokens == [3, 4, 5, 6, 7, 8]
        assert (receipt.output_units, receipt.prefix_units, receipt.output_hash) == (6, 3, text_hash(range(9)))


async def test_service_checks_a_text_in_one_item(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        body = terms.CheckRequest(
            generate=terms.GenerateRequest(prompt=[1, 2, 3], max_tokens=40, top_p_ppm=1_000_000),
            output=[4, 5],
            segments=[terms.SeedSegment(start=0, seed=b"\x01" * 32), terms.SeedSegment(start=1, seed=b"\x02" * 32)],
        )
        job = Job(TEXT, Task.CHECK, body.SerializeToString(), 5, 5, 1_000, now=int(time.time()))
        talk = await running.attempt(job).open()
        receipt = await talk.read_finished()
        assert receipt.output_units == 5
        assert np.frombuffer(talk.items[0], "<f4").shape == (2,)
        assert len(running.engines["generate"].replayed[0][1]) == 2


@pytest.mark.parametrize(
    ("units", "output_hash", "error"),
    [(8, Hash(b"\x01" * 32), "hash"), (9, text_hash(range(9)), "were sent")],
)
async def test_service_false_ack_ends_the_attempt_and_keeps_the_last_good_one(
    tmp_path: Path, units: int, output_hash: Hash, error: str
) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        job = text()
        talk = await running.attempt(job).open()
        await talk.read_units(8)
        await talk.ack(4)
        await talk.read_units(12)
        await talk.ack(units if units == 8 else 13, output_hash)
        with pytest.raises(ProtocolError, match=error):
            while await talk.read() is not None:
                pass
        await until(lambda: row(running, job)["state"] == DUE)
        assert parse(terms.SignedAck, row(running, job)["signed_ack"]).ack.units == 4
        assert parse(terms.SignedReceipt, row(running, job)["signed_receipt"]).receipt.outcome == terms.OUTCOME_CANCELLED


async def test_service_ack_by_a_stranger_ends_the_attempt(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        talk = await running.attempt(text()).open()
        await talk.read_units(8)
        await talk.ack(8, key=STRANGER)
        with pytest.raises(BadSignature):
            while await talk.read() is not None:
                pass


async def test_service_refuses_an_attempt_twice_and_any_lower_one(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT, credit=BIG_CREDIT) as running:
        second = text(max_tokens=4, attempt=2)
        talk = await running.attempt(second).open()
        await talk.read_finished()
        await talk.end()
        assert "attempt 2" in (await refusal(running.attempt(second))).message
        first = replace(second, attempt=1)
        error = await refusal(running.attempt(first))
        assert isinstance(error, ProtocolError)
        assert "is over" in error.message
        third = await running.attempt(replace(second, attempt=3)).open()
        await third.read_finished()
        await third.end()


async def test_service_refuses_a_lease_by_an_unknown_scheduler(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        changes = {"scheduler": STRANGER.address}
        job = text(lease_changes=changes, spec_changes=changes)
        error = await refusal(running.attempt(job), job.open(lease_signer=STRANGER))
        assert isinstance(error, ProtocolError)
        assert "no confirmed channel" in error.message
        assert row(running, job) is None


async def test_service_refuses_what_the_channel_or_the_credit_does_not_cover(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT, credit="0.0000011") as running:
        running.engines["generate"].gate.clear()
        job = text(max_tokens=16, lease_changes={"maximum": Money(2 * 10**12)})
        await running.attempt(job).open()
        error = await refusal(running.attempt(replace(job, name=b"another")))
        assert isinstance(error, Busy)
        assert "credit" in error.message
        running.view.channels[CHANNEL] = replace(running.view.channels[CHANNEL], deposit=3 * 10**12)
        cheap = replace(job, name=b"third", lease_changes={"maximum": Money(17 * 10**11), "window_units": 1})
        assert isinstance(await refusal(running.attempt(cheap)), OutOfFunds)
        running.engines["generate"].gate.set()


async def test_service_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    model = replace(TEXT, slots=1)
    async with provider_at(tmp_path, model, queue_limit=1, credit=BIG_CREDIT) as running:
        running.engines["generate"].gate.clear()
        jobs = [replace(text(max_tokens=4), name=bytes([i])) for i in range(4)]
        first = await running.attempt(jobs[0]).open()
        await until(lambda: running.provider.engines.running == 1)
        second = await running.attempt(jobs[1]).open()
        error = await refusal(running.attempt(jobs[2]))
        assert isinstance(error, Busy)
        assert error.retry_after_seconds > 0
        assert row(running, jobs[2]) is None
        running.engines["generate"].gate.set()
        for talk in (first, second):
            assert (await talk.read_finished()).outcome is Outcome.COMPLETED
        assert (await (await running.attempt(jobs[2]).open()).read_finished()).outcome is Outcome.COMPLETED


async def test_service_client_that_leaves_stops_the_engine_and_is_billed_for_its_acks(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        engine = running.engines["generate"]
        job = text(max_tokens=400, prompt=[1])
        talk = await running.attempt(job).open()
        await talk.read_units(8)
        await talk.ack(8)
        await talk.read_units(16)
        engine.gate.clear()
        await talk.ack(12)
        await talk.read_units(20)
        talk.call.cancel()
        started = time.monotonic()
        await until(lambda: engine.jobs == 0)
        assert time.monotonic() - started < 5
        await until(lambda: row(running, job)["state"] == DUE)
        receipt = parse(terms.SignedReceipt, row(running, job)["signed_receipt"]).receipt
        assert receipt.outcome == terms.OUTCOME_CANCELLED
        assert row(running, job)["amount"] == 12 * TEXT.output_price // 1_000_000
        engine.gate.set()


async def test_service_cancel_message_gets_its_receipt(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        talk = await running.attempt(text()).open()
        await talk.read_units(8)
        await talk.call.write(pb.InferRequest(cancel=True))
        assert (await talk.read_finished()).outcome is Outcome.CANCELLED


async def test_service_deadline_ends_an_attempt_as_expired(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        running.engines["generate"].gate.clear()
        job = text(lease_changes={"deadline": int(time.time()) + 2})
        talk = await running.attempt(job).open()
        assert (await talk.read_finished()).outcome is Outcome.EXPIRED
        running.engines["generate"].gate.set()


async def test_service_dead_engine_fails_the_attempt_and_is_started_again(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT, credit=BIG_CREDIT) as running:
        engine = running.engines["generate"]
        engine.gate.clear()
        talk = await running.attempt(text()).open()
        await until(lambda: engine.jobs == 1)
        engine.alive = False
        engine.gate.set()
        receipt = await talk.read_finished()
        assert (receipt.outcome, receipt.output_units) == (Outcome.FAILED, 0)
        assert talk.finished is not None
        assert talk.finished.finish_reason == EngineFailed.code
        engine.alive = True
        again = await running.attempt(replace(text(max_tokens=4), name=b"again")).open()
        assert (await again.read_finished()).outcome is Outcome.COMPLETED
        assert engine.starts == 2


async def test_service_restarted_after_a_kill_bills_receipts_and_acks(tmp_path: Path) -> None:
    whole, cut, silent = text(max_tokens=4), replace(text(), name=b"cut"), replace(text(), name=b"silent")
    async with provider_at(tmp_path, TEXT, credit=BIG_CREDIT) as running:
        done = await running.attempt(whole).open()
        await done.read_finished()
        half = await running.attempt(cut).open()
        await half.read_units(8)
        await half.ack(6)
        await half.read_units(14)
        await running.attempt(silent).open()
        copy = tmp_path / "after-kill"
        copy.mkdir()
        for file in ("journal.db", "journal.db-wal", "tls.key", "tls.crt"):  # what a kill -9 would leave at this moment
            (copy / file).write_bytes((tmp_path / file).read_bytes())
    async with scheduler_at(tmp_path / "scheduler") as (fake, node), provider_at(copy, TEXT, scheduler=node, run=True) as running:
        await until(lambda: len(fake.claims) >= 3 and not running.provider.accounts.bills)
        billed = {receipt.lease: (receipt, ack) for receipt, ack in fake.claims}
        receipt, ack = billed[cut.lease.struct_hash]
        assert ack is not None
        assert (receipt.outcome, receipt.output_units, ack.units) == (Outcome.FAILED, 6, 6)
        assert receipt.output_hash == text_hash(range(6))
        assert billed[whole.lease.struct_hash][0].outcome is Outcome.COMPLETED
        assert billed[silent.lease.struct_hash][1] is None
        assert {row(running, job)["state"] for job in (whole, cut, silent)} == {OWED}
        assert isinstance(await refusal(running.attempt(cut)), ProtocolError)


async def test_service_claims_until_owed_and_keeps_the_voucher(tmp_path: Path) -> None:
    async with scheduler_at(tmp_path / "s") as (fake, node), provider_at(tmp_path, TEXT, scheduler=node, run=True) as running:
        fake.states = [market.CLAIM_STATE_HELD]
        job = text(max_tokens=4)
        talk = await running.attempt(job).open()
        await talk.read_finished()
        await talk.ack(complete=True)
        await until(lambda: row(running, job)["state"] == HELD)
        await fake.down.put(market.HeartbeatDown(channel=CHANNEL, settled=[job.lease.struct_hash]))
        await until(lambda: not running.provider.accounts.bills)  # it is told of what is on the disk
        assert row(running, job)["state"] == OWED
        earned = 4 * TEXT.output_price // 1_000_000 + 3 * TEXT.prompt_price // 1_000_000
        assert running.provider.accounts.vouchered(CHANNEL) == earned == row(running, job)["amount"]
        assert running.provider.accounts.standing(SCHEDULER.address).owed == 0


async def test_service_whose_schedulers_ledger_fails_goes_on_and_claims_again(tmp_path: Path) -> None:
    """A journal that fails ends its own process, never a peer's."""
    async with scheduler_at(tmp_path / "s") as (fake, node), provider_at(tmp_path, TEXT, scheduler=node, run=True) as running:
        fake.failures = [JournalError("the database server is gone")]
        job = text(max_tokens=4)
        talk = await running.attempt(job).open()
        await talk.read_finished()
        await talk.ack(complete=True)
        await until(lambda: row(running, job)["state"] == OWED)
        assert not fake.failures and len(fake.claims) == 1


async def test_service_whose_claim_gives_up_a_connection_says_hello_again_on_the_next(tmp_path: Path) -> None:
    """Claims and the heartbeat share a line: whoever finds it broken closes it under the other."""
    async with scheduler_at(tmp_path / "s") as (fake, node), provider_at(tmp_path, TEXT, scheduler=node, run=True) as running:
        await until(lambda: len(fake.hellos) == 1 and bool(fake.loads))
        await running.provider._peers._hang_up(SCHEDULER.address)
        await until(lambda: len(fake.hellos) == 2)


async def test_service_remembers_over_a_restart_what_a_scheduler_left_unpaid(tmp_path: Path) -> None:
    async with scheduler_at(tmp_path / "scheduler") as (scheduler, node):
        scheduler.states = [market.CLAIM_STATE_CLOSED]
        async with provider_at(tmp_path, VECTORS, scheduler=node, run=True) as running:
            job = vectors()
            talk = await running.attempt(job).open()
            receipt = await talk.read_finished()
            await talk.ack(5, receipt.output_hash, complete=True)
            await until(lambda: row(running, job)["state"] == SHORT)
            earned = 5 * VECTORS.prompt_price // 1_000_000
            assert running.provider.accounts.standing(SCHEDULER.address).owed == earned
    async with provider_at(tmp_path, VECTORS) as again:
        assert again.provider.accounts.standing(SCHEDULER.address).short == earned


async def test_service_owed_without_a_voucher_that_covers_it_is_not_believed(tmp_path: Path) -> None:
    async with scheduler_at(tmp_path / "s") as (fake, node), provider_at(tmp_path, TEXT, scheduler=node, run=True) as running:
        fake.short = 1
        job = text(max_tokens=4)
        talk = await running.attempt(job).open()
        await talk.read_finished()
        await talk.ack(complete=True)
        await until(lambda: len(fake.claims) >= 2)
        assert row(running, job)["state"] == DUE
        assert running.provider.accounts.vouchered(CHANNEL) == 0


async def test_service_heartbeat_carries_offer_and_load_and_takes_only_good_vouchers(tmp_path: Path) -> None:
    async with scheduler_at(tmp_path / "s") as (fake, node), provider_at(tmp_path, TEXT, scheduler=node, run=True) as running:
        await until(lambda: bool(fake.hellos and fake.loads))
        assert fake.hellos[0].endpoint == running.provider.endpoint
        assert (fake.loads[-1].free, fake.loads[-1].draining) == (2, False)
        deposit = running.view.channels[CHANNEL].deposit
        stranger = voucher(50)
        stranger.signature = bytes(64) + b"\x1b"
        for message in (voucher(deposit + 1), stranger, voucher(77), voucher(70)):
            await fake.down.put(market.HeartbeatDown(voucher=message))
        await until(lambda: running.provider.accounts.vouchered(CHANNEL) == 77)
        await fake.down.put(market.HeartbeatDown(notice="stake below 10"))
        await until(lambda: running.provider.heartbeats.presence[SCHEDULER.address].notice == "stake below 10")
        assert running.provider.accounts.vouchered(CHANNEL) == 77
        await running.provider.drain()
        await until(lambda: fake.loads[-1].draining and fake.loads[-1].free == 0)
        await until(lambda: bool(fake.offers) and not fake.offers[-1].models)
        assert open_offer(DOMAIN, parse(terms.SignedOffer, running.announced[-1])).sequence > fake.hellos[0].sequence


async def test_service_draining_takes_nothing_more_and_ends_what_does_not_end(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT, drain_seconds=0.5) as running:
        running.engines["generate"].gate.clear()
        job = text()
        talk = await running.attempt(job).open()
        draining = asyncio.create_task(running.provider.drain())
        await until(lambda: running.provider.service.draining)
        error = await refusal(running.attempt(replace(job, name=b"late")))
        assert isinstance(error, JobFailed)
        assert error.retryable
        assert (await talk.read_finished()).outcome is Outcome.FAILED
        await talk.end()
        await draining
        assert running.provider.service.open_attempts == 0


async def test_service_receipt_again_is_for_client_and_scheduler_only(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        job = text(max_tokens=4)
        talk = await running.attempt(job).open()
        receipt = await talk.read_finished()

        async def ask(key: Any, lease: bytes) -> terms.SignedReceipt:
            body = pb.ReceiptRequest(lease=lease)
            call = signed_call(
                key, DOMAIN, "Provider/GetReceipt", body, PROVIDER.address, int(time.time()), Hash(keccak256(key.address + lease))
            )
            try:
                return await running.stub.GetReceipt(call, timeout=10)
            except Exception as error:
                raise from_rpc(error, "provider") from error  # type: ignore[arg-type]

        for key in (CLIENT, SCHEDULER):
            assert open_receipt(DOMAIN, await ask(key, job.lease.struct_hash), PROVIDER.address) == receipt
        with pytest.raises(BadSignature):
            await ask(STRANGER, job.lease.struct_hash)
        with pytest.raises(JobFailed):
            await ask(CLIENT, b"\x01" * 32)


async def prove(
    running: Running, key: Any, nonce: bytes, size: int = 64, reads: tuple[tuple[int, ...], ...] = ()
) -> tuple[pb.GpuCommitment, pb.GpuProof]:
    call = running.stub.ProveGpu()  # type: ignore[call-arg]
    signed = signed_call(key, DOMAIN, "Provider/ProveGpu", terms.TokenList(), PROVIDER.address, int(time.time()), Hash(nonce))
    await call.write(pb.GpuChallenge(seed=pb.GpuSeed(seed=b"\x05" * 32, size=size, uuid="", repeats=3, call=signed, keep=2)))
    try:
        first = await call.read()
        assert isinstance(first, pb.GpuAnswer)
        for links in reads:
            await call.write(pb.GpuChallenge(read=pb.GpuRead(links=links, rows=[7] * len(links))))
            kept = await call.read()
            assert isinstance(kept, pb.GpuAnswer)
            expected = gpu_proof.products(b"\x05" * 32, size, 3, 2)
            assert list(kept.kept.rows) == [expected[link][7].tobytes() for link in links]
        await call.write(pb.GpuChallenge(opening=pb.GpuOpening(vector_seed=b"\x06" * 32, rows=[3, 60])))
        second = await call.read()
    except Exception as error:
        raise from_rpc(error, "provider") from error  # type: ignore[arg-type]
    assert isinstance(second, pb.GpuAnswer)
    return first.commitment, second.proof


async def test_service_gpu_proof_holds_and_is_for_schedulers_at_a_measured_pace(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        commitment, proof = await prove(running, SCHEDULER, b"\x01" * 32, reads=((2, 3), (3,)))
        assert commitment.gpu_class == "CPU"
        rows = [gpu_proof.Row(r.index, r.values, tuple(r.path)) for r in proof.rows]
        gpu_proof.check(b"\x05" * 32, 64, 3, commitment.root, b"\x06" * 32, [3, 60], proof.product, rows)
        assert running.provider.prover.measured_mflops[""] > 0
        with pytest.raises(Busy):
            await prove(running, SCHEDULER, b"\x02" * 32)
        with pytest.raises(BadSignature, match="registered"):
            await prove(running, STRANGER, b"\x03" * 32)
        with pytest.raises(BadSignature, match="before"):
            await prove(running, SCHEDULER, b"\x01" * 32)


async def test_service_gpu_proof_read_of_what_was_not_to_be_kept_ends_it(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        with pytest.raises(ProtocolError, match="not to be kept"):
            await prove(running, SCHEDULER, b"\x01" * 32, reads=((1,),))


async def test_service_shows_manifests_and_small_files_and_no_weights(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        manifest = await running.stub.GetManifest(pb.ManifestRequest(model=TEXT.manifest.digest))
        assert manifest.files[0].path == "config.json"
        pieces = [piece.data async for piece in running.stub.GetBlob(pb.BlobRequest(sha256=manifest.files[0].sha256))]
        assert b"".join(pieces) == b"{}\n"
        for call in (
            running.stub.GetManifest(pb.ManifestRequest(model=b"\x01" * 32)),
            running.stub.GetBlob(pb.BlobRequest(sha256=b"\x01" * 32)).read(),
        ):
            with pytest.raises(Exception) as refused:
                await call
            error: GpumarketError = from_rpc(refused.value, "provider")  # type: ignore[arg-type]
            assert isinstance(error, UnknownModel)


async def test_service_slow_reader_of_a_file_gives_its_place_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumarket.node.service.BLOB_SECONDS", 0.2)
    async with provider_at(tmp_path, TEXT) as running:
        service = running.provider.service
        monkeypatch.setattr(service, "_read_blob", lambda sha256, limit: bytes(24 << 20))
        wanted = pb.BlobRequest(sha256=TEXT.manifest.files[0].sha256)
        slow = [running.stub.GetBlob(wanted) for _ in range(8)]
        for call in slow:
            await call.read()
        await until(lambda: service._blobs._value == 8)
        monkeypatch.setattr(service, "_read_blob", lambda sha256, limit: b"{}")
        assert [piece.data async for piece in running.stub.GetBlob(wanted)] == [b"{}"]
        for call in slow:
            call.cancel()


async def test_service_first_message_other_than_an_open_is_refused(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        talk = Conversation(running, text())
        await talk.call.write(pb.InferRequest(cancel=True))
        with pytest.raises(ProtocolError, match="first message"):
            await talk.read()


async def test_service_finds_a_scheduler_again_that_moved(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT, run=True) as running:
        for name in ("before", "after"):
            async with scheduler_at(tmp_path / name) as (fake, node):
                running.view.nodes[SCHEDULER.address] = node
                await until(lambda fake=fake: bool(fake.loads))  # type: ignore[misc]


async def test_service_talks_to_no_scheduler_with_another_key_than_registered(tmp_path: Path) -> None:
    async with scheduler_at(tmp_path / "s") as (fake, node), provider_at(tmp_path, TEXT, run=True) as running:
        running.view.nodes[SCHEDULER.address] = replace(node, tls_key_hash=Hash(b"\x01" * 32))
        presence = running.provider.heartbeats.presence
        await until(lambda: SCHEDULER.address in presence and "TLS key" in presence[SCHEDULER.address].error)
        assert not fake.hellos

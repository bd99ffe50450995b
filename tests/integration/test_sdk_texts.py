"""What a gateway asks of a text: seed, stop strings, logprobs, token ids, leaving in the middle, slow readers, job ids of its own."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sdk_models
from sdk_market import CLIENT, FakeMarket, FakeProvider, fake_market

from gpumarket.core.errors import ConfigError, JobFailed, JobIdReused
from gpumarket.core.seeds import drawing_seed
from gpumarket.core.terms import Outcome, Task
from gpumarket.core.units import Address, Hash
from gpumarket.sdk import Client, ClientSettings
from gpumarket.sdk.results import ChatResult, LogprobsLost, Piece
from gpumarket.sdk.streaming import ChatStream
from gpumarket.sdk.sync import Client as SyncClient
from gpumarket.settlement.receipts import from_json, verify
from gpumarket.v1 import provider_pb2 as ppb
from gpumarket.v1 import terms_pb2 as pb

WINDOW = 8
LONG = 200
PATIENCE_SECONDS = 20.0


def settings(folder: Path, **changes: Any) -> ClientSettings:
    values: dict[str, Any] = {
        "state": folder / "client",
        "lock_file": folder / "models.lock",
        "check_probability": 0.0,
        "patience_seconds": 3.0,
        "failover_seconds": 0.5,
        "stall_seconds": PATIENCE_SECONDS,
    }
    return ClientSettings(**(values | changes))


@asynccontextmanager
async def market_of(folder: Path, *providers: FakeProvider, **changes: Any) -> AsyncIterator[tuple[FakeMarket, Client]]:
    async with (
        fake_market(folder, *providers, window=WINDOW) as market,
        Client(settings(folder, **changes), key=CLIENT, chain=market.chain) as client,
    ):
        await client.add_model("mini", sdk_models.EMBED.digest)
        await client.add_model("chat", sdk_models.CHAT.digest)
        yield market, client


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110  conditions of all kinds
            await asyncio.sleep(0.01)


async def pieces_of(stream: ChatStream) -> list[Piece]:
    return [piece async for piece in stream.pieces()]


# --- seed --------------------------------------------------------------------------------------------------------------------------


async def test_seed_goes_with_the_request_and_is_what_a_check_replays(tmp_path: Path) -> None:
    """Over a failover, too: each attempt's segment has the one seed, and the checker's numbers bear on the subject."""
    dying, second, checker = FakeProvider("a", dies_after_items=5), FakeProvider("b"), FakeProvider("c")
    async with market_of(tmp_path, dying, second, checker, check_probability=1.0) as (_, client):
        result = await client.chat("chat", "hello", max_tokens=30, seed=-5)
        assert (result.verdict.state, len(result.attempts)) == ("accepted", 2)
        request = pb.GenerateRequest.FromString(second.requests[0])
        assert request.client_seed == -5
        asked = [(lease.task, raw) for p in (dying, checker) for lease, raw in zip(p.jobs, p.requests, strict=True)]
        (check,) = [pb.CheckRequest.FromString(raw) for task, raw in asked if task is Task.CHECK]
        wanted = drawing_seed(request, Hash(bytes(32)), Hash(bytes(32)))
        assert [(s.start, s.seed) for s in check.segments] == [(0, wanted), (result.attempts[0].units, wanted)]


# --- stop strings ------------------------------------------------------------------------------------------------------------------


async def whole(client: Client) -> ChatResult:
    return await client.chat("chat", "hello", max_tokens=LONG)


async def test_stop_string_ends_text_and_job_and_only_what_came_is_paid(tmp_path: Path) -> None:
    provider = FakeProvider("a", frame_items=1)
    async with market_of(tmp_path, provider) as (_, client):
        full = await whole(client)
        stop = full.text[20:24]
        at = full.text.index(stop)
        stream = client.chat("chat", "hello", stream=True, max_tokens=LONG, stop=["never here", stop])
        pieces = [piece async for piece in stream]
        result = stream.result
        assert "".join(pieces) == result.text == full.text[:at]
        assert result.finish_reason == "stop"
        assert result.tokens == full.tokens[: len(result.tokens)]
        assert len(result.tokens) < len(full.tokens)
        assert result.verdict.state == "not-drawn"
        assert result.verdict.reason
        assert provider.cancelled
        # 0.1 tokens of money per 10^6 output tokens, 1 % fee, and nothing for the prompt: the provider did not finish
        assert result.cost == len(result.tokens) * 10**11 * 101 // 100
        assert provider.sent_units - len(result.tokens) <= WINDOW, "in flight is a window at most"
        assert result.receipt is not None
        assert result.receipt.outcome is Outcome.CANCELLED
        assert stream.end is not None
        assert (stream.end.outcome, stream.end.finish_reason, stream.end.cost) == ("completed", "stop", result.cost)
        assert (stream.usage, stream.job, stream.provider, stream.receipt) == (
            result.usage,
            result.job,
            provider.key.address,
            result.receipt,
        )
        again = await client.resume(result.job)
        assert isinstance(again, ChatResult)
        assert (again.text, again.cost, again.finish_reason) == (result.text, result.cost, "stop")
        other = await client.chat("chat", "hello", max_tokens=LONG, stop=stop)
        assert (other.text, other.finish_reason) == (result.text, "stop")
        account = await client.account()
        assert account.billed == full.cost + result.cost + other.cost


async def test_stop_string_in_an_answer_that_is_there_whole_leaves_it_complete(tmp_path: Path) -> None:
    provider = FakeProvider("a", frame_items=1_000)
    async with market_of(tmp_path, provider, FakeProvider("b"), check_probability=1.0) as (_, client):
        full = await client.chat("chat", "hello", max_tokens=6)
        stop = full.text[-3:-1]
        result = await client.chat("chat", "hello", max_tokens=6, stop=stop)
        assert (result.text, result.finish_reason) == (full.text[: full.text.index(stop)], "stop")
        assert (result.tokens, result.cost, result.verdict.state) == (full.tokens, full.cost, "accepted")
        assert not provider.cancelled


async def test_stop_string_whose_provider_says_nothing_more_still_is_an_answer(tmp_path: Path) -> None:
    provider = FakeProvider("a", frame_items=1, last_word=False)
    async with market_of(tmp_path, provider) as (_, client):
        full = await whole(client)
        result = await client.chat("chat", "hello", max_tokens=LONG, stop=full.text[10:13])
        assert (result.receipt, result.finish_reason) == (None, "stop")


async def test_stop_string_that_never_comes_changes_nothing(tmp_path: Path) -> None:
    async with market_of(tmp_path, FakeProvider("a")) as (_, client):
        full = await client.chat("chat", "hello", max_tokens=30)
        stream = client.chat("chat", "hello", stream=True, max_tokens=30, stop=[full.text[-1] + "\0"])
        assert "".join([p async for p in stream]) == full.text == stream.result.text
        assert (stream.result.finish_reason, stream.result.cost) == ("length", full.cost)


# --- logprobs ----------------------------------------------------------------------------------------------------------------------


async def test_logprobs_come_with_every_token_also_over_a_failover(tmp_path: Path) -> None:
    async with market_of(tmp_path, FakeProvider("a", dies_after_items=7), FakeProvider("b")) as (_, client):
        stream = client.chat("chat", "hello", stream=True, max_tokens=30, logprobs=2)
        pieces = await pieces_of(stream)
        result = stream.result
        assert len(result.attempts) == 2
        assert result.logprobs is not None
        assert [entry.token for entry in result.logprobs] == list(result.tokens)
        assert {len(entry.top) for entry in result.logprobs} == {2}
        assert all(entry.logprob == -0.5 and entry.top[0].token == entry.token for entry in result.logprobs)
        assert b"".join(e.raw for e in result.logprobs).decode("utf-8", "replace") == result.text
        assert [t for piece in pieces for t in piece.tokens] == list(result.tokens)
        assert tuple(entry for piece in pieces for entry in piece.logprobs or ()) == result.logprobs
        plain = await client.chat("chat", "hello", max_tokens=30)
        assert (plain.logprobs, plain.text) == (None, result.text)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m: m.ClearField("top"),
        lambda m: setattr(m, "logprob", float("nan")),
        lambda m: setattr(m, "logprob", 0.5),
        lambda m: setattr(m, "token", m.token + 1),
    ],
)
async def test_logprobs_that_cannot_be_are_bad_output_and_the_answer_comes_from_another(
    tmp_path: Path, wrong: Callable[[ppb.TokenLogprobs], object]
) -> None:
    async with market_of(tmp_path, FakeProvider("a", change_logprobs=wrong), FakeProvider("b")) as (_, client):
        result = await client.chat("chat", "hello", max_tokens=10, logprobs=1)
        assert [a.outcome for a in result.attempts] == ["bad-output", "completed"]
        assert "logprob" in result.attempts[0].detail or "alternatives" in result.attempts[0].detail
        assert result.logprobs is not None


async def test_logprobs_that_nobody_asked_for_are_bad_output(tmp_path: Path) -> None:
    def pushy(frame: ppb.Frame) -> ppb.Frame:
        frame.logprobs.extend(ppb.TokenLogprobs(token=token, logprob=-1) for token in frame.tokens)
        return frame

    async with market_of(tmp_path, FakeProvider("a", change_frame=pushy), FakeProvider("b")) as (_, client):
        result = await client.chat("chat", "hello", max_tokens=10)
        assert "nobody asked" in result.attempts[0].detail


async def test_logprobs_of_a_resumed_job_are_lost_and_that_is_said(tmp_path: Path) -> None:
    async with market_of(tmp_path, FakeProvider("a")) as (_, client):
        result = await client.chat("chat", "hello", max_tokens=10, logprobs=1)
        again = await client.resume(result.job)
        assert isinstance(again, ChatResult)
        assert (again.text, again.logprobs, again.warnings) == (result.text, None, (LogprobsLost(),))


# --- token ids ---------------------------------------------------------------------------------------------------------------------


async def test_token_ids_of_a_text_give_what_the_text_gives(tmp_path: Path) -> None:
    async with market_of(tmp_path, FakeProvider("a")) as (_, client):
        codec = (await client._models_.load("chat")).codec
        ids = codec.encode("hello there", limit=99).ids
        by_text = await client.complete("chat", "hello there", max_tokens=10)
        by_ids = await client.complete("chat", ids, max_tokens=10)
        assert (by_ids.text, by_ids.usage) == (by_text.text, by_text.usage)
        vectors = await client.embed("mini", ["w1 w2", "w3"])
        same = await client.embed("mini", [[1, 5, 6, 2], [1, 7, 2]])
        assert np.array_equal(same.vectors, vectors.vectors)
        one = await client.embed("mini", [1, 5, 6, 2])
        assert np.array_equal(one.vectors, vectors.vectors[:1])
        assert (await client.quote("mini", [[1, 5, 6, 2], [1, 7, 2]])).maximum == (await client.quote("mini", ["w1 w2", "w3"])).maximum
        assert (await client.quote("chat", ids, max_tokens=10)).maximum == by_ids.cost
        assert (await client.explain("chat", ids)).considered == 1
        with pytest.raises(ConfigError, match="token id 4000"):
            await client.complete("chat", [4000])
        with pytest.raises(ConfigError, match="one prompt at a time"):
            await client.quote("chat", [[5], [6]])


# --- leaving -----------------------------------------------------------------------------------------------------------------------


async def left(client: Client, stream: ChatStream, provider: FakeProvider) -> None:
    """Nothing beyond a window was made, what came is what is billed, and everybody's books say so."""
    await until(lambda: provider.cancelled)
    end = stream.end
    assert end is not None
    (job,) = client.jobs()
    assert (end.outcome, job.state) == ("cancelled", "cancelled")
    assert end.job == job.job
    assert end.cost == job.cost == end.units * 10**11 * 101 // 100
    assert end.usage.output_tokens == end.units
    assert provider.acks[-1].units == end.units, "what is billed is what was acked"
    assert provider.sent_units - end.units <= WINDOW
    await client.desk.settle()
    account = await client.account()
    assert (account.billed, account.open) == (end.cost, 0), "the scheduler knows that nothing more comes of it"
    assert client.desk.account.known(client.desk.journal.read(lambda c: job_channel(c, job.job))).open == 0  # type: ignore[union-attr]
    with pytest.raises(JobFailed):
        _ = stream.result


def job_channel(connection: Any, job: Hash) -> Hash:
    from gpumarket.sdk import store

    found = store.load_job(connection, job)
    assert found is not None
    return found.channel


async def test_leaving_by_aclose_stops_the_provider_and_says_what_was_billed(tmp_path: Path) -> None:
    provider = FakeProvider("a", frame_items=1)
    async with market_of(tmp_path, provider) as (_, client):
        stream = client.chat("chat", "hello", stream=True, max_tokens=LONG)
        await anext(aiter(stream))
        assert (stream.job, stream.provider) == (client.jobs()[0].job, provider.key.address)
        assert stream.end is None
        before = asyncio.get_running_loop().time()
        await stream.aclose()
        print(f"aclose: {provider.cancelled_at - before:.3f} s to the provider's cancel")
        await left(client, stream, provider)
        assert stream.receipt is not None
        assert stream.receipt.outcome is Outcome.CANCELLED
        assert stream.usage is not None
        assert stream.usage.output_tokens == provider.acks[-1].units
        await stream.aclose()


async def test_leaving_by_aclose_while_another_task_reads_ends_that_reading(tmp_path: Path) -> None:
    provider = FakeProvider("a", frame_items=1, silent_after_items=6, last_word=False)
    async with market_of(tmp_path, provider) as (_, client):
        stream = client.chat("chat", "hello", stream=True, max_tokens=LONG)
        reading = asyncio.create_task(pieces_of(stream))
        await until(lambda: bool(provider.acks) and provider.acks[-1].units == 6)
        await stream.aclose()
        assert sum(len(piece.tokens) for piece in await reading) == 6
        await left(client, stream, provider)


async def test_leaving_by_cancelling_the_task_that_reads(tmp_path: Path) -> None:
    provider = FakeProvider("a", frame_items=1, silent_after_items=6, last_word=False)
    async with market_of(tmp_path, provider) as (_, client):
        stream = client.chat("chat", "hello", stream=True, max_tokens=LONG)
        reading = asyncio.create_task(pieces_of(stream))
        await until(lambda: bool(provider.acks) and provider.acks[-1].units == 6)
        before = asyncio.get_running_loop().time()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        print(f"task cancelled: {provider.cancelled_at - before:.3f} s to the provider's cancel")
        await left(client, stream, provider)


async def test_leaving_the_loop_of_a_stream_that_nobody_holds(tmp_path: Path) -> None:
    provider = FakeProvider("a", frame_items=1)
    async with market_of(tmp_path, provider) as (_, client):
        gc.disable()  # it must not need the collector
        try:
            async for _ in client.chat("chat", "hello", stream=True, max_tokens=LONG):
                break
            await until(lambda: provider.cancelled)
        finally:
            gc.enable()
        await until(lambda: client.jobs()[0].state == "cancelled")


async def test_leaving_by_cancelling_a_whole_answer_stops_the_provider(tmp_path: Path) -> None:
    provider = FakeProvider("a", frame_items=1, silent_after_items=6)
    async with market_of(tmp_path, provider) as (_, client):
        asking = asyncio.create_task(client.chat("chat", "hello", max_tokens=LONG))
        await until(lambda: bool(provider.acks) and provider.acks[-1].units == 6)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: provider.cancelled)
        assert client.jobs()[0].state == "cancelled"


async def test_leaving_before_there_is_a_lease_holds_no_money(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = FakeProvider("a")
    async with market_of(tmp_path, provider) as (market, client):
        await client.chat("chat", "hello", max_tokens=2)  # the channel is open now
        answer, asked = market.scheduler._answer, asyncio.Event()

        async def slow(request: Any) -> Any:
            if not request.quote:
                asked.set()
                await asyncio.Event().wait()
            return await answer(request)

        monkeypatch.setattr(market.scheduler, "_answer", slow)
        stream = client.chat("chat", "hello", stream=True, max_tokens=LONG)
        reading = asyncio.create_task(pieces_of(stream))
        await asyncio.wait_for(asked.wait(), PATIENCE_SECONDS)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        newest = next(job for job in client.jobs() if job.job == stream.job)
        assert (newest.state, newest.cost) == ("cancelled", 0)
        assert stream.end is not None
        assert (stream.end.outcome, stream.end.provider, stream.end.units) == ("cancelled", None, 0)
        channel = client.desk.journal.read(lambda c: job_channel(c, newest.job))
        assert client.desk.account.known(channel).open == 0  # type: ignore[union-attr]


async def test_leaving_a_stream_that_was_never_read_asks_nobody(tmp_path: Path) -> None:
    provider = FakeProvider("a")
    async with market_of(tmp_path, provider) as (_, client):
        stream = client.chat("chat", "hello", stream=True)
        await stream.aclose()
        assert [piece async for piece in stream] == []
        assert (stream.end, stream.job, client.jobs()) == (None, None, [])


async def test_receipt_of_a_job_that_was_left_must_hold_or_is_none(tmp_path: Path) -> None:
    provider = FakeProvider("a", frame_items=1, change_receipt=lambda r: replace(r, output_units=r.output_units + WINDOW + 1))
    async with market_of(tmp_path, provider) as (_, client):
        async with client.chat("chat", "hello", stream=True, max_tokens=LONG) as stream:
            await anext(aiter(stream))
        await left(client, stream, provider)
        assert stream.receipt is None


@pytest.mark.parametrize("outcome", [Outcome.CANCELLED, Outcome.COMPLETED])
async def test_receipt_file_of_a_job_that_was_left_verifies_and_its_bill_is_known(tmp_path: Path, outcome: Outcome) -> None:
    """Where the provider had the whole answer out it bills the prompt, and the client knows that it does."""
    provider = FakeProvider("a", frame_items=1, outcome_when_left=outcome)
    async with market_of(tmp_path, provider) as (market, client):
        async with client.chat("chat", "hello", stream=True, max_tokens=LONG) as stream:
            await anext(aiter(stream))
        end = stream.end
        assert end is not None
        prompt = end.usage.prompt_tokens * 2 * 10**10 if outcome is Outcome.COMPLETED else 0
        assert end.cost == (end.units * 10**11 + prompt) * 101 // 100
        assert (await client.account()).billed == end.cost
        await client.desk.settle()
        assert [r.reason for r in market.scheduler.retries] == ([] if prompt else ["client-left"])
        client.save_receipt(end.job, tmp_path / "receipt.json", content=True)
        report = verify(from_json((tmp_path / "receipt.json").read_bytes()))
        assert report.holds, [f for f in report.findings if not f.holds]
        assert report.amount == end.units * 10**11 * 101 // 100, "a file states what is owed by the acks in it"


async def test_slow_reader_holds_a_window_and_the_provider_waits(tmp_path: Path) -> None:
    """What is not read is not acked: half a window unacked is acked when it is read, then at most a window comes behind it."""
    provider = FakeProvider("a", frame_items=1)
    async with market_of(tmp_path, provider) as (_, client):
        stream = client.chat("chat", "hello", stream=True, max_tokens=LONG)
        pieces, seen = stream.pieces(), 0
        for _ in range(10):
            seen += len((await anext(pieces)).tokens)
            await asyncio.sleep(0.15)
            assert provider.sent_units - seen <= 2 * WINDOW
            assert sum(len(o) for o in [client.desk.journal.read(lambda c: output(c, stream.job))]) - seen <= 2 * WINDOW
        seen += sum([len(piece.tokens) async for piece in pieces])
        assert seen == LONG == len(stream.result.tokens)


def output(connection: Any, job: Hash | None) -> list[bytes]:
    from gpumarket.sdk import store

    assert job is not None
    return store.load_output(connection, job)


# --- job ids -----------------------------------------------------------------------------------------------------------------------

ID, OTHER = b"\x01" * 32, b"\x02" * 32


async def test_job_id_asked_again_gives_the_same_job_and_pays_nothing_more(tmp_path: Path) -> None:
    provider = FakeProvider("a")
    async with market_of(tmp_path, provider) as (_, client):
        first = await client.chat("chat", "hello", max_tokens=20, job_id=ID)
        billed = (await client.account()).billed
        again = await client.chat("chat", "hello", max_tokens=20, job_id=ID, max_cost="5")
        assert (again.job, again.text, again.cost) == (first.job, first.text, first.cost)
        stream = client.chat("chat", "hello", stream=True, max_tokens=20, job_id=ID)
        assert ["".join([p async for p in stream]), stream.result.job] == [first.text, first.job]
        rows = await client.embed("mini", ["w1", "w2"], job_id=OTHER)
        assert (await client.embed("mini", ["w1", "w2"], job_id=OTHER)).job == rows.job
        assert (await client.account()).billed == billed + rows.cost
        assert len(provider.jobs) == 2
        fresh = await client.chat("chat", "hello", max_tokens=20)
        assert fresh.job != first.job


@pytest.mark.parametrize(
    "other", [{"max_tokens": 21}, {"seed": 1}, {"stop": "x"}, {"temperature": 0.0}, {"prompt": "hi"}, {"logprobs": 0}, {"top_p": 0.5}]
)
async def test_job_id_with_another_request_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    async with market_of(tmp_path, FakeProvider("a")) as (_, client):
        await client.chat("chat", "hello", max_tokens=20, job_id=ID)
        options: dict[str, Any] = {"max_tokens": 20, "job_id": ID} | other
        prompt = options.pop("prompt", "hello")
        with pytest.raises(JobIdReused, match="another request"):
            await client.chat("chat", prompt, **options)
        with pytest.raises(JobIdReused):
            await client.embed("mini", "w1", job_id=ID)


async def test_job_id_of_two_calls_at_once_is_one_job(tmp_path: Path) -> None:
    provider = FakeProvider("a")
    async with market_of(tmp_path, provider) as (_, client):
        both = await asyncio.gather(*(client.chat("chat", "hello", max_tokens=40, job_id=ID) for _ in range(2)))
        assert len({result.job for result in both}) == len(provider.jobs) == 1
        assert not client.desk.job_ids._held


async def test_job_id_of_a_job_that_was_left_or_failed_is_used_up(tmp_path: Path) -> None:
    provider = FakeProvider("a", frame_items=1)
    async with market_of(tmp_path, provider) as (_, client):
        async with client.chat("chat", "hello", stream=True, max_tokens=LONG, job_id=ID) as stream:
            await anext(aiter(stream))
        with pytest.raises(JobFailed, match="cancelled"):
            await client.chat("chat", "hello", max_tokens=LONG, job_id=ID)
        assert len(provider.jobs) == 1


async def test_job_id_that_was_ordered_before_a_crash_is_resumed(tmp_path: Path) -> None:
    provider = FakeProvider("a", frame_items=1, hold=asyncio.Event())
    async with fake_market(tmp_path, provider, window=WINDOW) as market:
        client = Client(settings(tmp_path), key=CLIENT, chain=market.chain)
        await client.__aenter__()
        await client.add_model("chat", sdk_models.CHAT.digest)
        stream = client.chat("chat", "hello", stream=True, max_tokens=30, job_id=ID)
        await anext(aiter(stream))
        key = stream.job
        await stopped_dead(client)
        provider.hold = None
        async with Client(settings(tmp_path), key=CLIENT, chain=market.chain) as again:
            result = await again.chat("chat", "hello", max_tokens=30, job_id=ID)
            assert (result.job, len(result.tokens)) == (key, 30)
            assert [a.outcome for a in result.attempts] == ["client-restart", "completed"]
        with pytest.raises(Exception, match="journal is not open"):
            await stream.aclose()


async def stopped_dead(client: Client) -> None:
    """As if the process were killed: nothing is said to anybody, only the folder's lock and the connections go."""
    from gpumarket.core.daemon import StateFolder

    desk = client.desk
    await desk.peers.close()
    await desk.hub.close()
    await desk.journal.close()
    for _, callback in client._stack.pop_all()._exit_callbacks:  # type: ignore[attr-defined]
        folder = getattr(callback, "__self__", None)
        if isinstance(folder, StateFolder):
            folder.__exit__()


async def test_job_id_of_another_length_is_refused(tmp_path: Path) -> None:
    async with market_of(tmp_path, FakeProvider("a")) as (_, client):
        with pytest.raises(ConfigError, match="31 bytes"):
            await client.chat("chat", "hello", job_id=b"\x01" * 31)
        with pytest.raises(ConfigError, match="33 bytes"):
            await client.embed("mini", "w1", job_id=b"\x01" * 33)


async def test_job_key_is_the_hash_of_client_scheduler_and_the_callers_id(tmp_path: Path) -> None:
    from gpumarket.core.terms import keccak256

    async with market_of(tmp_path, FakeProvider("a")) as (market, client):
        result = await client.chat("chat", "hello", max_tokens=3, job_id=ID)
        assert result.job == keccak256(CLIENT.address + Address(market.scheduler.key.address) + ID)


def test_sync_client_has_pieces_and_the_end_too(tmp_path: Path) -> None:
    ready, done, found = threading.Event(), threading.Event(), list[FakeMarket]()

    async def serve() -> None:
        async with fake_market(tmp_path, FakeProvider("a")) as market:
            found.append(market)
            ready.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(PATIENCE_SECONDS)
        with SyncClient(settings(tmp_path), key=CLIENT, chain=found[0].chain) as client:
            client.add_model("chat", sdk_models.CHAT.digest)
            stream = client.chat("chat", "hello", stream=True, max_tokens=20, logprobs=1)
            pieces = list(stream.pieces())
            assert tuple(t for piece in pieces for t in piece.tokens) == stream.result.tokens
            assert (stream.end.outcome, stream.end.cost) == ("completed", stream.result.cost)
            broken = client.chat("chat", "hello", stream=True, max_tokens=LONG)
            for _ in broken:
                break
            broken.close()
            assert broken.end.outcome == "cancelled"
    finally:
        done.set()
        thread.join()

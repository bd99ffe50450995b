"""The client against scripted schedulers and providers over real TLS: what it buys, what it refuses, what it survives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sdk_models
from sdk_market import CLIENT, FakeMarket, FakeProvider, fake_market, vector

from gpumarket.core.daemon import StateFolder
from gpumarket.core.errors import (
    JobFailed,
    JournalError,
    NetworkError,
    NoProvider,
    OutOfFunds,
    OverMaxCost,
    ProtocolError,
    ResultRejected,
    UnknownModel,
    Unreachable,
)
from gpumarket.core.terms import Outcome, output_chain
from gpumarket.core.units import Address, Hash, Money, parse_money
from gpumarket.sdk import Client, ClientSettings, ordering
from gpumarket.sdk.constraints import Constraints
from gpumarket.sdk.results import ChatResult, InputTruncated, OutputLimited, VerdictState
from gpumarket.sdk.sync import Client as SyncClient
from gpumarket.v1 import market_pb2 as mpb

TEXTS = ["w1 w2 w3", "w4 w5", "w6", "w7 w8 w9 w10", "w11 w12", "w13 w14 w15"]


def settings(folder: Path, **changes: Any) -> ClientSettings:
    values: dict[str, Any] = {
        "state": folder / "client",
        "lock_file": folder / "models.lock",
        "check_probability": 0.0,
        "patience_seconds": 3.0,
        "failover_seconds": 0.5,
        "stall_seconds": 20.0,
    }
    return ClientSettings(**(values | changes))


@asynccontextmanager
async def client_of(market: FakeMarket, **changes: Any) -> AsyncIterator[Client]:
    async with Client(settings(market.folder, **changes), key=CLIENT, chain=market.chain) as client:
        if not client.models():
            await client.add_model("mini", sdk_models.EMBED.digest)
            await client.add_model("chat", sdk_models.CHAT.digest)
        yield client


def expected_rows(texts: list[str]) -> np.ndarray[Any, Any]:
    def ids(text: str) -> list[int]:
        return [1, *(4 + int(word[1:]) for word in text.split()), 2]

    return np.stack([np.frombuffer(vector(ids(t)), dtype="<f4") for t in texts])


async def test_embed_returns_rows_receipt_and_cost_within_the_quote(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market) as client:
        quote = await client.quote("mini", TEXTS)
        result = await client.embed("mini", TEXTS, max_cost="0.01")
        assert np.array_equal(result.vectors, expected_rows(TEXTS))
        assert len(result) == len(TEXTS)
        assert np.array_equal(result[0], result.vectors[0])
        assert 0 < result.cost <= quote.maximum
        assert result.verdict.state is VerdictState.NOT_DRAWN
        assert result.provider == market.scheduler.providers[0].key.address
        assert result.receipt is not None
        assert result.receipt.output_hash == output_chain([row.tobytes() for row in result.vectors])
        assert [a.outcome for a in result.attempts] == ["completed"]
        assert client.jobs()[0].state == "done"
    assert market.scheduler.providers[0].acks[-1].complete


async def test_acks_of_a_long_job_keep_within_the_window_and_end_complete(tmp_path: Path) -> None:
    provider = FakeProvider("a")
    async with fake_market(tmp_path, provider, window=8) as market, client_of(market) as client:
        stream = client.chat("chat", "hello there", stream=True, max_tokens=60)
        pieces = [piece async for piece in stream]
        result = stream.result
    units = [ack.units for ack in provider.acks]
    assert units == sorted(units)
    assert units[-1] == 60
    assert all(later - earlier <= 8 for earlier, later in zip([0, *units], units, strict=False))
    assert [ack.complete for ack in provider.acks].count(True) == 1
    assert "".join(pieces) == result.text
    assert result.finish_reason == "length"
    assert len(result.tokens) == 60


async def test_chat_without_stream_equals_the_stream(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market) as client:
        stream = client.chat("chat", "hello", stream=True, max_tokens=20)
        text = "".join([piece async for piece in stream])
        whole = await client.chat("chat", messages=[{"role": "user", "content": "hello"}], max_tokens=20)
        assert whole.text == text
        raw = await client.complete("chat", "hello", max_tokens=20)
        assert raw.usage.prompt_tokens < whole.usage.prompt_tokens


async def test_max_cost_below_the_quote_sends_nothing(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market) as client:
        with pytest.raises(OverMaxCost):
            await client.embed("mini", TEXTS, max_cost="0.0000001")
        assert not market.scheduler.matched
        assert not market.chain.opened
        assert client.jobs() == []


async def test_unknown_alias_names_the_command_that_adds_it(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market) as client:
        with pytest.raises(UnknownModel) as caught:
            await client.embed("nope", "text")
        assert caught.value.hint == "gpumarket model add nope DIGEST"


async def test_no_provider_tells_the_filter_and_leaves_no_open_maximum(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market) as client:
        with pytest.raises(NoProvider) as caught:
            await client.embed("mini", "w1", constraints=Constraints(exclude_providers=[market.scheduler.providers[0].key.address]))
        assert caught.value.removed == {"model": 1}


async def test_provider_that_dies_midway_is_replaced_and_no_token_comes_twice(tmp_path: Path) -> None:
    dying, heir = FakeProvider("dying", dies_after_items=21), FakeProvider("heir")
    async with fake_market(tmp_path, dying, heir) as market, client_of(market) as client:
        stream = client.chat("chat", "hello", stream=True, max_tokens=50)
        text = "".join([piece async for piece in stream])
        result = stream.result
        again = await client.chat("chat", "hello", max_tokens=50, constraints=Constraints(require_provider=heir.key.address))
        assert text == result.text == again.text
        assert result.tokens == again.tokens
        (retry,) = market.scheduler.retries
        assert retry.reason == "lost"
        assert heir.prefixes[0] == list(result.tokens[: retry.last_ack.ack.units])
        assert 0 < retry.last_ack.ack.units <= 21
        assert [a.outcome for a in result.attempts] == ["lost", "completed"]
        assert sum(a.units for a in result.attempts) == 50
        assert result.cost == sum(a.amount for a in result.attempts)


async def test_embed_failover_skips_delivered_rows(tmp_path: Path) -> None:
    dying, heir = FakeProvider("dying", dies_after_items=3, frame_items=1), FakeProvider("heir")
    async with fake_market(tmp_path, dying, heir) as market, client_of(market) as client:
        result = await client.embed("mini", TEXTS)
        assert np.array_equal(result.vectors, expected_rows(TEXTS))
        assert heir.jobs[0].prefix_units == market.scheduler.retries[0].last_ack.ack.units > 0
        assert result.provider == heir.key.address


async def test_unreachable_and_busy_providers_are_passed_over(tmp_path: Path) -> None:
    gone, busy, fine = FakeProvider("gone"), FakeProvider("busy", busy=True), FakeProvider("fine")
    async with fake_market(tmp_path, gone, busy, fine) as market, client_of(market) as client:
        await market.servers[1].stop(None)
        result = await client.embed("mini", "w1 w2")
        assert [a.outcome for a in result.attempts] == ["unreachable", "refused", "completed"]
        assert [a.amount for a in result.attempts[:2]] == [0, 0]


async def test_every_attempt_failed_raises_with_each_reason(tmp_path: Path) -> None:
    async with (
        fake_market(tmp_path, FakeProvider("a", busy=True), FakeProvider("b", dies_after_items=0)) as market,
        client_of(market) as client,
    ):
        with pytest.raises(JobFailed) as caught:
            await client.embed("mini", "w1 w2")
        assert "attempt 1" in caught.value.message
        assert "attempt 2" in caught.value.message
        (job,) = client.jobs()
        assert (job.state, job.cost) == ("failed", 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"output_hash": Hash(b"\x01" * 32)},
        {"nonce": Hash(b"\x01" * 32)},
        {"request_hash": Hash(b"\x01" * 32)},
        {"lease": Hash(b"\x01" * 32)},
        {"output_units": 1_000},
        {"prompt_units": 1_000},
        {"prefix_units": 5},
        {"prefix_hash": Hash(b"\x01" * 32)},
        {"outcome": Outcome.FAILED},
        {"finished_at": 2**40},
    ],
    ids=lambda w: next(iter(w)),
)
async def test_wrong_receipt_is_refused_and_the_answer_comes_from_another(tmp_path: Path, wrong: dict[str, Any]) -> None:
    liar, fine = FakeProvider("liar", change_receipt=lambda r: replace(r, **wrong)), FakeProvider("fine")
    async with fake_market(tmp_path, liar, fine) as market, client_of(market) as client:
        result = await client.embed("mini", TEXTS)
        assert np.array_equal(result.vectors, expected_rows(TEXTS))
        assert result.provider == fine.key.address
        assert result.attempts[0].outcome in ("bad-output", "failed")
        assert not any(ack.complete for ack in liar.acks)
        assert market.scheduler.retries[0].HasField("receipt")


async def test_frame_with_a_wrong_count_ends_the_attempt(tmp_path: Path) -> None:
    def inflated(frame: Any) -> Any:
        frame.units += 3
        return frame

    liar, fine = FakeProvider("liar", change_frame=inflated), FakeProvider("fine")
    async with fake_market(tmp_path, liar, fine) as market, client_of(market) as client:
        result = await client.embed("mini", TEXTS)
        assert result.attempts[0].outcome == "bad-output"
        assert np.array_equal(result.vectors, expected_rows(TEXTS))


async def test_lease_above_the_order_is_refused_before_the_provider_is_called(tmp_path: Path) -> None:
    provider = FakeProvider("a")
    async with fake_market(tmp_path, provider) as market, client_of(market) as client:
        market.scheduler.change_lease = lambda lease: replace(lease, maximum=Money(10**24))
        with pytest.raises(ProtocolError, match="maximum"):
            await client.embed("mini", "w1 w2")
        assert provider.jobs == []
        assert client.jobs()[0].state == "failed"


async def test_leaving_a_stream_early_cancels_the_provider_and_pays_what_came(tmp_path: Path) -> None:
    provider = FakeProvider("a", frame_items=1)
    async with fake_market(tmp_path, provider) as market, client_of(market) as client:
        stream = client.chat("chat", "hello", stream=True, max_tokens=200)
        async with stream:
            async for _ in stream:
                break
        (job,) = client.jobs()
        assert job.state == "cancelled"
        assert 0 < job.cost < job.max_cost
        assert not provider.acks[-1].complete
        with pytest.raises(JobFailed):
            _ = stream.result


async def test_scheduler_stream_that_breaks_is_opened_again_with_the_same_order(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market) as client:
        quote = await client.quote("mini", TEXTS)
        market.scheduler.break_streams_before_answer = 2
        result = await client.embed("mini", TEXTS, max_cost=quote.maximum)
        assert np.array_equal(result.vectors, expected_rows(TEXTS))
        assert len({spec.key for spec in market.scheduler.matched}) == 1


async def test_scheduler_that_is_away_is_a_network_error_and_the_next_call_works(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market, patience_seconds=0.3) as client:
        market.scheduler.break_streams_before_answer = 10_000
        with pytest.raises(NetworkError):
            await client.embed("mini", "w1")
        market.scheduler.break_streams_before_answer = 0
        assert (await client.embed("mini", "w1")).cost > 0


async def test_crash_midway_is_resumed_from_the_journal_without_paying_twice(tmp_path: Path) -> None:
    first = FakeProvider("first", frame_items=1, hold=asyncio.Event())
    async with fake_market(tmp_path, first) as market:
        client = Client(settings(tmp_path), key=CLIENT, chain=market.chain)
        await client.__aenter__()
        await client.add_model("chat", sdk_models.CHAT.digest)
        stream = client.chat("chat", "hello", stream=True, max_tokens=30)
        seen = await anext(aiter(stream))
        key = client.jobs()[0].job
        await crash(client)
        first.hold = None
        async with client_of(market) as again:
            (job,) = again.jobs()
            assert job.resumable
            result = await again.resume(key)
            assert isinstance(result, ChatResult)
            assert result.text.startswith(seen)
            whole = await again.chat("chat", "hello", max_tokens=30)
            assert result.text == whole.text
            assert [r.reason for r in market.scheduler.retries] == ["client-restart"]
            assert result.cost < whole.cost * 2
            assert (await again.resume(key)).cost == result.cost
            assert await again.resume_all() == []
        with pytest.raises(JournalError):
            await stream.aclose()  # the dead client's journal is closed, and takes no word of it any more


async def crash(client: Client) -> None:
    """As if the process were killed: nothing is said to anybody, only the folder's lock and the connections go."""
    desk = client.desk
    await desk.peers.close()
    await desk.hub.close()
    await desk.journal.close()
    for _, callback in client._stack.pop_all()._exit_callbacks:  # type: ignore[attr-defined]
        folder = getattr(callback, "__self__", None)
        if isinstance(folder, StateFolder):
            folder.__exit__()


async def test_order_that_was_never_answered_is_sent_again_by_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market:
        async with client_of(market, patience_seconds=0.2) as client:
            quote = await client.quote("mini", "w1 w2")
            market.scheduler.break_streams_before_answer = 10_000
            monkeypatch.setattr(ordering, "quote", lambda desk, hub, ask: _done(quote))
            with pytest.raises(NetworkError) as caught:
                await client.embed("mini", "w1 w2")
            assert "gpumarket job resume 0x" in caught.value.hint
            assert client.jobs()[0].state == "ordered"
        monkeypatch.undo()
        market.scheduler.break_streams_before_answer = 0
        async with client_of(market) as again:
            (result,) = await again.resume_all()
            assert not isinstance(result, Exception)
            assert len(market.scheduler.jobs) == 1


async def _done(value: Any) -> Any:
    return value


# --- checks --------------------------------------------------------------------------------------------------------------------


async def test_honest_result_is_accepted_by_a_checker_and_both_are_reported(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a"), FakeProvider("b")) as market, client_of(market, check_probability=1.0) as client:
        result = await client.embed("mini", TEXTS, max_cost="0.01")
        assert result.verdict.state is VerdictState.ACCEPTED
        assert result.verdict.checkers == (market.scheduler.providers[1].key.address,)
        assert result.check_cost > 0
        assert result.cost + result.check_cost <= parse_money("0.01")
        assert [r.verdict for r in market.scheduler.reports] == [mpb.VERDICT_ACCEPTED] * 2
        assert not any(r.HasField("subject") for r in market.scheduler.reports)


async def test_text_is_checked_over_every_attempts_seed(tmp_path: Path) -> None:
    providers = FakeProvider("dying", dies_after_items=21), FakeProvider("heir"), FakeProvider("checker")
    async with fake_market(tmp_path, *providers) as market, client_of(market, check_probability=1.0) as client:
        result = await client.chat("chat", "hello", max_tokens=80)
        assert result.verdict.state is VerdictState.ACCEPTED, result.verdict
        assert result.provider == providers[1].key.address


async def test_cheater_is_caught_by_two_checkers_unpaid_and_replaced(tmp_path: Path) -> None:
    cheat, *honest = FakeProvider("cheat", wrong_numbers=0.002), FakeProvider("b"), FakeProvider("c"), FakeProvider("d")
    async with fake_market(tmp_path, cheat, *honest) as market, client_of(market, check_probability=1.0) as client:
        result = await client.embed("mini", TEXTS, max_cost="0.01")
        assert np.array_equal(result.vectors, expected_rows(TEXTS))
        assert result.provider != cheat.key.address
        assert [r.provider for r in result.rejected] == [cheat.key.address]
        assert result.verdict.state is VerdictState.ACCEPTED
        assert result.cost + result.check_cost <= parse_money("0.01")
        rejections = [r for r in market.scheduler.reports if r.verdict == mpb.VERDICT_REJECTED]
        assert len(rejections) == 1
        assert len(rejections[0].checks) == 2
        rejected = next(j for j in client.jobs() if j.state == "rejected")
        assert rejected.cost == 0
        account = await client.account()
        assert account.billed == sum(j.cost for j in client.jobs(checks=True))


async def test_wrong_text_is_rejected_and_a_stream_says_so(tmp_path: Path) -> None:
    providers = FakeProvider("cheat", wrong_numbers=1), FakeProvider("b"), FakeProvider("c")
    async with fake_market(tmp_path, *providers) as market, client_of(market, check_probability=1.0) as client:
        stream = client.chat("chat", "hello", stream=True, max_tokens=80)
        with pytest.raises(ResultRejected):
            async for _ in stream:
                pass
        assert stream.result.provider != providers[0].key.address
        honest = await client.chat("chat", "hello", max_tokens=80, constraints=Constraints(exclude_providers=[providers[0].key.address]))
        assert stream.result.text == honest.text


async def test_lying_checker_is_outvoted_and_its_own_job_rejected(tmp_path: Path) -> None:
    honest, liar, second = FakeProvider("honest"), FakeProvider("liar", wrong_numbers=0.5), FakeProvider("second")
    async with fake_market(tmp_path, honest, liar, second) as market, client_of(market, check_probability=1.0) as client:
        market.chain.nodes[liar.key.address].stake = 10**30  # drawn first, all but surely
        result = await client.embed("mini", TEXTS)
        assert result.verdict.state is VerdictState.ACCEPTED
        assert result.provider == honest.key.address
        assert result.verdict.checkers == (liar.key.address, second.key.address)
        (rejection,) = [r for r in market.scheduler.reports if r.verdict == mpb.VERDICT_REJECTED]
        assert rejection.subject.lease.lease.provider == liar.key.address


async def test_one_contradiction_that_nobody_confirms_is_grey(tmp_path: Path) -> None:
    async with (
        fake_market(tmp_path, FakeProvider("a"), FakeProvider("liar", wrong_numbers=0.5)) as market,
        client_of(market, check_probability=1.0) as client,
    ):
        result = await client.embed("mini", TEXTS)
        assert result.verdict.state is VerdictState.GREY
        assert not any(r.verdict == mpb.VERDICT_REJECTED for r in market.scheduler.reports)


async def test_checker_of_the_same_owner_is_never_asked(tmp_path: Path) -> None:
    async with (
        fake_market(tmp_path, FakeProvider("a", owner="x"), FakeProvider("b", owner="x"), FakeProvider("c", checks=False)) as market,
        client_of(market, check_probability=1.0) as client,
    ):
        result = await client.embed("mini", TEXTS)
        assert result.verdict.state is VerdictState.UNCHECKED
        assert "no checker available" in result.verdict.reason
        assert [r.verdict for r in market.scheduler.reports] == [mpb.VERDICT_ACCEPTED]


async def test_check_that_would_pass_max_cost_is_not_bought(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a"), FakeProvider("b")) as market, client_of(market, check_probability=1.0) as client:
        quote = await client.quote("mini", TEXTS)
        result = await client.embed("mini", TEXTS, max_cost=quote.maximum)
        assert result.verdict.state is VerdictState.UNCHECKED
        assert result.cost + result.check_cost <= quote.maximum


async def test_rejected_result_without_another_provider_is_an_error_not_a_result(tmp_path: Path) -> None:
    providers = FakeProvider("cheat", wrong_numbers=0.002), FakeProvider("b"), FakeProvider("c")
    async with fake_market(tmp_path, *providers) as market, client_of(market, check_probability=1.0, reruns_max=0) as client:
        with pytest.raises(ResultRejected, match="rejected in a row"):
            await client.embed("mini", TEXTS)


async def test_report_that_cannot_be_sent_goes_out_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(_request: Any, _traceparent: str) -> Any:
        raise Unreachable("away")

    async with fake_market(tmp_path, FakeProvider("a")) as market:
        async with client_of(market, check_probability=1.0) as client:
            monkeypatch.setattr(client.desk.hub, "report", away)
            result = await client.embed("mini", "w1")
            assert result.verdict.state is VerdictState.UNCHECKED
            assert market.scheduler.reports == []
        async with client_of(market):
            pass
        assert len(market.scheduler.reports) == 1


# --- money ---------------------------------------------------------------------------------------------------------------------


async def test_vouchers_follow_the_scheduler_but_never_pass_the_exposure(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market, exposure="0.001") as client:
        spent = 0
        for _ in range(4):
            spent += (await client.embed("mini", TEXTS, max_cost="0.0004")).cost
            account = await client.account()
            assert account.billed == spent
            assert account.voucher - min(account.billed, account.scheduler_used) <= parse_money("0.001")
            market.scheduler.settle(spent)
        assert len(market.chain.opened) == 1


async def test_scheduler_that_never_settles_is_stopped_at_the_exposure(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market, exposure="0.001") as client:
        with pytest.raises(OutOfFunds):
            for _ in range(10):
                await client.embed("mini", TEXTS, max_cost="0.0004")
        (voucher,) = market.scheduler.vouchers.values()
        assert voucher <= parse_money("0.001")


async def test_deposit_that_is_used_up_names_the_command(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market, deposit="0.00001") as client:
        with pytest.raises(OutOfFunds) as caught:
            await client.embed("mini", TEXTS, max_cost="0.01")
        assert "wallet deposit" in caught.value.hint
        await client.deposit("0.02")
        assert (await client.embed("mini", TEXTS, max_cost="0.01")).cost > 0


async def test_short_wallet_takes_from_the_faucet_only_when_told(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market:
        market.chain.money = 1
        async with client_of(market) as client:
            with pytest.raises(OutOfFunds):
                await client.embed("mini", TEXTS)
        async with client_of(market, faucet=True) as client:
            assert (await client.embed("mini", TEXTS)).cost > 0


async def test_channel_closes_at_what_was_used_and_a_greedy_close_is_refused(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market) as client:
        cost = (await client.embed("mini", TEXTS)).cost
        market.scheduler.settle(cost + 1)
        with pytest.raises(ProtocolError, match="your own acks"):
            await client.close_channel()
        market.scheduler.settle(cost)
        assert await client.close_channel() == parse_money("10") - cost
        assert (await client.embed("mini", "w1")).cost > 0
        assert len(market.chain.opened) == 2


# --- models --------------------------------------------------------------------------------------------------------------------


async def test_model_files_that_do_not_hash_are_taken_from_another_provider(tmp_path: Path) -> None:
    liar = FakeProvider("liar", files=lambda path, data: data[:-1] + b"X")
    async with fake_market(tmp_path, liar, FakeProvider("b")) as market, client_of(market) as client:
        assert {m.name: m.digest for m in client.models()} == {"mini": sdk_models.EMBED.digest, "chat": sdk_models.CHAT.digest}


async def test_model_that_nobody_serves_truthfully_is_unknown(tmp_path: Path) -> None:
    liar = FakeProvider("liar", files=lambda path, data: data[:-1] + b"X")
    async with fake_market(tmp_path, liar) as market, Client(settings(tmp_path), key=CLIENT, chain=market.chain) as client:
        with pytest.raises(UnknownModel, match="does not hash"):
            await client.add_model("mini", sdk_models.EMBED.digest)
        with pytest.raises(UnknownModel, match="nobody sells"):
            await client.add_model("other", "0x" + "12" * 32)
        assert client.models() == []


async def test_long_inputs_are_cut_and_said(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market) as client:
        result = await client.embed("mini", ["w1", " ".join(["w2"] * 30)])
        assert result.warnings == (InputTruncated(1, 32, 16),)
        chat = await client.chat("chat", "x" * 10, max_tokens=1_000)
        assert isinstance(chat.warnings[0], OutputLimited)
        assert chat.usage.prompt_tokens + chat.usage.output_tokens == 256


async def test_offers_show_owner_and_stake_from_the_registry(tmp_path: Path) -> None:
    async with (
        fake_market(tmp_path, FakeProvider("a"), FakeProvider("b", models=(sdk_models.CHAT,))) as market,
        client_of(market) as client,
    ):
        offers = await client.offers("mini")
        assert [o.provider for o in offers] == [market.scheduler.providers[0].key.address]
        assert offers[0].owner == Address(market.scheduler.providers[0].owner_address)
        assert offers[0].proven_mflops == 1_234, "the scheduler's measure, beside the provider's own word"
        assert len(await client.offers()) == 3
        assert (await client.explain("mini", "w1")).considered == 2


async def test_jobs_at_once_share_one_channel_and_one_growing_voucher(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market) as client:
        results = await asyncio.gather(*(client.embed("mini", [f"w{i} w1"], max_cost="0.001") for i in range(12)))
        assert len({r.job for r in results}) == 12
        assert len(market.chain.opened) == 1
        account = await client.account()
        assert account.billed == sum(r.cost for r in results)
        assert account.voucher <= parse_money("0.012")
        assert market.scheduler.came == sorted(market.scheduler.came)


async def test_jobs_at_once_after_others_ended_all_find_their_cover(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market) as client:
        for count in (4, 12, 12):
            results = await asyncio.gather(*(client.embed("mini", [f"w{i} w1"], max_cost="0.001") for i in range(count)))
            assert len({r.job for r in results}) == count
        assert market.scheduler.came == sorted(market.scheduler.came), "an order carries the newest voucher of its moment"
        assert market.scheduler.came[-1] == parse_money("0.028"), "ended jobs are not settled there: each maximum is covered"


def test_sync_client_buys_without_an_event_loop(tmp_path: Path) -> None:
    """The scripted market runs in a loop of its own thread, as other machines would."""
    ready, over = threading.Event(), threading.Event()
    found: list[FakeMarket] = []

    async def serve() -> None:
        async with fake_market(tmp_path, FakeProvider("a")) as market:
            found.append(market)
            ready.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        with SyncClient(settings(tmp_path), key=CLIENT, chain=found[0].chain) as market:
            market.add_model("mini", sdk_models.EMBED.digest)
            market.add_model("chat", sdk_models.CHAT.digest)
            assert np.array_equal(market.embed("mini", TEXTS).vectors, expected_rows(TEXTS))
            stream = market.chat("chat", "hello", stream=True, max_tokens=12)
            assert "".join(stream) == stream.result.text == market.chat("chat", "hello", max_tokens=12).text
            with pytest.raises(OverMaxCost):
                market.embed("mini", TEXTS, max_cost="0.0000000001")
            assert len(market.jobs()) == 3
    finally:
        over.set()
        thread.join(30)

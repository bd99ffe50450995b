"""The gateway against the official Python client, on a scripted market: answers, streams, errors, and what the market says of each."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from gateway_market import Gateway, gateway, until
from sdk_market import FakeProvider, token_at, vector

from gpumarket.core.terms import Outcome
from gpumarket.core.units import parse_money

TALK: Any = [{"role": "user", "content": "hi"}]


async def told(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


def text_of(chunks: list[Any], index: int = 0) -> str:
    return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index)


# --- what is answered ----------------------------------------------------------------------------------------------------------


async def test_models_are_those_of_the_lock_file(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g, g.openai() as client:
        listed = [model.id async for model in client.models.list()]
        assert listed == ["chat", "mini"]
        one = await client.models.retrieve("chat")
        assert (one.id, one.object, one.owned_by) == ("chat", "model", "gpumarket")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other/model")


async def test_chat_answers_with_usage_and_what_the_market_says(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g, g.openai() as client:
        raw = await client.chat.completions.with_raw_response.create(model="chat", messages=TALK, max_completion_tokens=10, temperature=0)
        answer = raw.parse()
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].message.role == "assistant"
        assert answer.usage is not None
        assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (10, answer.usage.prompt_tokens + 10)
        job = g.room.counter.client.jobs()[0]
        assert raw.headers["x-gpumarket-job"] == f"0x{job.job.hex()}"
        assert raw.headers["x-gpumarket-provider"] == f"0x{g.market.scheduler.providers[0].key.address.hex()}"
        assert raw.headers["x-gpumarket-verdict"] == "not-drawn"
        assert len(raw.headers["x-gpumarket-receipt"]) == 66
        assert parse_money(raw.headers["x-gpumarket-cost"]) == job.cost > 0
        assert raw.headers["x-request-id"].startswith("req_")


async def test_chat_streams_the_same_text_and_ends_with_what_the_market_says(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g, g.openai() as client:
        whole = await client.chat.completions.create(model="chat", messages=TALK, max_tokens=40)
        stream = await client.chat.completions.create(
            model="chat", messages=TALK, max_tokens=40, stream=True, stream_options={"include_usage": True}
        )
        chunks = await told(stream)
        assert text_of(chunks) == whole.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant"
        last = chunks[-2]
        assert last.choices[0].finish_reason == "length"
        assert last.model_extra["gpumarket"]["verdict"] == "not-drawn"
        assert parse_money(last.model_extra["gpumarket"]["cost"]) > 0
        assert chunks[-1].choices == []
        assert chunks[-1].usage == whole.usage
        assert all(chunk.usage is None for chunk in chunks[:-1])
        assert len({chunk.id for chunk in chunks}) == 1


async def test_chat_without_usage_asked_has_a_choice_in_every_chunk(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g, g.openai() as client:
        chunks = await told(await client.chat.completions.create(model="chat", messages=TALK, max_tokens=5, stream=True))
        assert all(len(chunk.choices) == 1 for chunk in chunks)
        assert all("usage" not in chunk.model_dump(exclude_unset=True) for chunk in chunks)


async def test_chat_of_several_choices_is_several_jobs_with_usage_added_up(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g, g.openai() as client:
        raw = await client.chat.completions.with_raw_response.create(model="chat", messages=TALK, max_tokens=6, n=3)
        answer = raw.parse()
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage is not None and answer.usage.completion_tokens == 18
        assert len(raw.headers["x-gpumarket-job"].split(", ")) == 3
        jobs = g.room.counter.client.jobs()
        assert len(jobs) == 3
        assert parse_money(raw.headers["x-gpumarket-cost"]) == sum(job.cost for job in jobs)
        chunks = await told(await client.chat.completions.create(model="chat", messages=TALK, max_tokens=6, n=3, stream=True))
        ends = [c.index for chunk in chunks for c in chunk.choices if c.finish_reason]
        assert sorted(ends) == [0, 1, 2]
        assert all(text_of(chunks, index) == answer.choices[0].message.content for index in range(3))


async def test_chat_stops_before_a_stop_string(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g, g.openai() as client:
        whole = (await client.chat.completions.create(model="chat", messages=TALK, max_tokens=60)).choices[0].message.content
        assert whole is not None
        stop = next(whole[at : at + 3] for at in range(10, len(whole) - 3) if "\ufffd" not in whole[at : at + 3])
        cut = await client.chat.completions.create(model="chat", messages=TALK, max_tokens=60, stop=[stop, "never to come"])
        assert cut.choices[0].message.content == whole[: whole.index(stop)]
        assert cut.choices[0].finish_reason == "stop"
        chunks = await told(await client.chat.completions.create(model="chat", messages=TALK, max_tokens=60, stop=stop, stream=True))
        assert text_of(chunks) == whole[: whole.index(stop)]


async def test_chat_carries_roles_parts_and_sampling_to_the_provider(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g, g.openai() as client:
        parts: Any = [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": []},
            {"role": "user", "content": "d"},
        ]
        plain: Any = [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ]
        first = await client.chat.completions.create(model="chat", messages=parts, max_tokens=8, seed=-5, top_p=0, temperature=1.5)
        second = await client.chat.completions.create(model="chat", messages=plain, max_tokens=8, seed=-5)
        assert first.usage == second.usage
        assert first.choices[0].message.content == second.choices[0].message.content


async def test_completion_continues_every_prompt_in_order(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g, g.openai() as client:
        answer = await client.completions.create(model="chat", prompt=["a b", "c"], n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.choices[0].text == answer.choices[1].text != answer.choices[2].text == answer.choices[3].text
        assert answer.usage is not None and answer.usage.completion_tokens == 4 * 16
        ids = [5, 6, 7]
        by_ids = await client.completions.create(model="chat", prompt=ids, max_tokens=3)
        several = await client.completions.create(model="chat", prompt=[ids, [9]], max_tokens=3)
        assert by_ids.choices[0].text == several.choices[0].text
        assert by_ids.usage is not None and by_ids.usage.prompt_tokens == 3
        chunks = await told(await client.completions.create(model="chat", prompt=ids, max_tokens=3, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == by_ids.choices[0].text
        assert chunks[-1].model_extra["gpumarket"]["job"].startswith("0x")


def ids_of(text: str) -> list[int]:
    return [1, *(4 + int(word[1:]) for word in text.split()), 2]


async def test_embeddings_are_numbers_or_base64_of_texts_or_tokens(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g, g.openai() as client:
        texts = ["w1 w2 w3", "w4"]
        rows = [list(struct.unpack("<4f", vector(ids_of(text)))) for text in texts]
        packed = await client.embeddings.create(model="mini", input=texts)
        assert [entry.embedding for entry in packed.data] == rows
        assert (packed.usage.prompt_tokens, packed.usage.total_tokens) == (8, 8)
        plain = await client.embeddings.create(model="mini", input=texts, encoding_format="float")
        assert [entry.embedding for entry in plain.data] == rows
        raw = await client.embeddings.create(model="mini", input=texts[0], encoding_format="base64")
        assert base64.b64decode(str(raw.data[0].embedding)) == vector(ids_of(texts[0]))
        by_ids = await client.embeddings.create(model="mini", input=[ids_of(text) for text in texts])
        assert [entry.embedding for entry in by_ids.data] == rows
        one = await client.embeddings.create(model="mini", input=ids_of(texts[0]))
        assert one.data[0].embedding == rows[0]


async def test_response_is_created_and_streamed_with_its_event_types(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g, g.openai() as client:
        items: Any = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
        whole = await client.responses.create(model="chat", input=items, max_output_tokens=20, instructions="be brief", store=False)
        assert whole.status == "incomplete"
        assert whole.incomplete_details is not None and whole.incomplete_details.reason == "max_output_tokens"
        assert whole.usage is not None and whole.usage.output_tokens == 20
        assert whole.output_text
        stream = await client.responses.create(model="chat", input=items, max_output_tokens=20, instructions="be brief", stream=True)
        events = await told(stream)
        kinds = [event.type for event in events]
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert kinds[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
        assert set(kinds[4:-4]) == {"response.output_text.delta"}
        assert "".join(event.delta for event in events[4:-4]) == whole.output_text == events[-1].response.output_text
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[-1].response.model_extra["gpumarket"]["provider"].startswith("0x")


async def test_answer_of_an_earlier_response_may_be_sent_back(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g, g.openai() as client:
        first = await client.responses.create(model="chat", input="hi", max_output_tokens=4)
        talk: Any = [{"role": "user", "content": "hi"}, *[item.model_dump(exclude_none=True) for item in first.output]]
        second = await client.responses.create(model="chat", input=[*talk, {"role": "user", "content": "go on"}], max_output_tokens=4)
        assert second.output_text


# --- what is refused -----------------------------------------------------------------------------------------------------------


async def refused(work: Any) -> dict[str, Any]:
    with pytest.raises(openai.APIStatusError) as caught:
        await work
    error = caught.value
    assert error.response.headers["x-request-id"].startswith("req_")
    assert isinstance(error.body, dict)
    return {"status": error.status_code, **error.body, "retry-after": error.response.headers.get("retry-after")}


async def test_what_cannot_be_is_refused_before_anything_is_ordered(tmp_path: Path) -> None:
    async with gateway(tmp_path, choices_max=4, job_cost_max="0.00001") as g, g.openai() as client:
        create = client.chat.completions.create
        cases = [
            (create(model="nope", messages=TALK), 404, "model_not_found", "model"),
            (create(model="mini", messages=TALK), 400, "model_not_supported", "model"),
            (create(model="chat", messages=TALK, n=5), 400, "invalid_value", "n"),
            (create(model="chat", messages=TALK, max_tokens=5, max_completion_tokens=5), 400, "invalid_value", "max_tokens"),
            (create(model="chat", messages=TALK, top_logprobs=5), 400, "invalid_value", "top_logprobs"),
            (create(model="chat", messages=TALK, stream_options={"include_usage": True}), 400, "invalid_value", "stream_options"),
            (create(model="chat", messages=[{"role": "user", "content": "x" * 1_000}]), 400, "context_length_exceeded", "messages"),
            (create(model="chat", messages=TALK, max_tokens=200), 400, "over_max_cost", None),
            (client.completions.create(model="chat", prompt=["a"] * 5), 400, "invalid_value", "prompt"),
            (client.completions.create(model="chat", prompt=[[1], [10**6]]), 400, "invalid_request", None),
            (client.embeddings.create(model="chat", input="w1"), 400, "model_not_supported", "model"),
            (client.embeddings.create(model="mini", input="w1", dimensions=2), 400, "unsupported_parameter", "dimensions"),
            (client.embeddings.create(model="mini", input=["w1", ""]), 400, "invalid_value", "input[1]"),
            (client.embeddings.create(model="mini", input="w1 " * 40), 400, "context_length_exceeded", "input"),
            (client.responses.create(model="chat", input="hi", store=True), 400, "unsupported_parameter", "store"),
            (client.responses.create(model="chat", input="hi", previous_response_id="resp_1"), 400, "unsupported_parameter", None),
        ]
        for work, status, code, param in cases:
            error = await refused(work)
            assert (error["status"], error["code"]) == (status, code), error
            assert param is None or error["param"] == param
        assert g.room.counter.client.jobs() == []
        assert g.room.counter.running == 0


async def test_what_the_router_refuses_has_the_same_shape(tmp_path: Path) -> None:
    async with gateway(tmp_path, body_bytes_max=1_000) as g, aiohttp.ClientSession() as http:
        headers = {"authorization": f"Bearer {g.key}"}
        good = json.dumps({"model": "chat", "messages": TALK}).encode()
        cases: list[tuple[str, str, dict[str, Any], int]] = [
            ("GET", "/v1/nothing", {"headers": headers}, 404),
            ("GET", "/v1/chat/completions", {"headers": headers}, 405),
            ("POST", "/v1/chat/completions", {"headers": headers, "data": good}, 415),
            ("POST", "/v1/chat/completions", {"headers": headers, "json": {"model": "m" * 2_000}}, 413),
            ("POST", "/v1/chat/completions", {"json": {}}, 401),
            ("POST", "/v1/chat/completions", {"headers": {"authorization": "Basic eDp5"}, "json": {}}, 401),
            (
                "POST",
                "/v1/chat/completions",
                {"headers": headers | {"content-type": "application/json", "content-encoding": "gzip"}, "data": good},
                415,
            ),
        ]
        for method, path, options, status in cases:
            async with http.request(method, g.url + path, **options) as answer:
                assert answer.status == status, (path, await answer.text())
                assert set((await answer.json())["error"]) == {"message", "type", "param", "code"}
                assert answer.headers["x-request-id"].startswith("req_")
        async with http.get(f"{g.url}/openapi.json") as answer:
            assert (await answer.json())["openapi"] == "3.1.0"


async def test_market_without_a_provider_is_503_with_when_to_come_back(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g, g.openai() as client:
        g.market.scheduler.providers.clear()
        error = await refused(client.chat.completions.create(model="chat", messages=TALK))
        assert (error["status"], error["code"], error["retry-after"]) == (503, "no_provider", "2")


async def test_job_that_fails_everywhere_is_502_and_nothing_is_held(tmp_path: Path) -> None:
    async with gateway(tmp_path, FakeProvider("a", outcome=Outcome.FAILED)) as g, g.openai() as client:
        error = await refused(client.chat.completions.create(model="chat", messages=TALK, max_tokens=5))
        assert (error["status"], error["type"]) == (502, "server_error")
        owner = g.keys.all()[0].id
        await until(lambda: g.room.counter.ledger.account(owner).reserved == 0)


async def test_excess_is_turned_away_at_once_and_the_rest_goes_on(tmp_path: Path) -> None:
    hold = asyncio.Event()
    async with gateway(tmp_path, FakeProvider("a", hold=hold), jobs_max=2) as g, g.openai() as client:
        running = [asyncio.create_task(client.chat.completions.create(model="chat", messages=TALK, max_tokens=20)) for _ in range(2)]
        await until(lambda: g.room.counter.running == 2)
        error = await refused(client.chat.completions.create(model="chat", messages=TALK))
        assert (error["status"], error["code"], error["retry-after"]) == (429, "rate_limit_exceeded", "1")
        hold.set()
        assert all(answer.choices[0].message.content for answer in await asyncio.gather(*running))
        assert (await client.chat.completions.create(model="chat", messages=TALK, max_tokens=5)).choices


# --- what breaks ---------------------------------------------------------------------------------------------------------------


async def test_client_that_goes_away_stops_the_provider_and_pays_what_was_delivered(tmp_path: Path) -> None:
    hold = asyncio.Event()
    provider = FakeProvider("a", hold=hold)
    async with gateway(tmp_path, provider) as g:
        async with g.openai() as client:
            stream = await client.chat.completions.create(model="chat", messages=TALK, max_tokens=100, stream=True)
            seen = 0
            async for chunk in stream:
                seen += len(chunk.choices[0].delta.content or "")
                if seen:
                    break
            await stream.close()
        async with asyncio.timeout(5):
            await until(lambda: provider.cancelled)
            await until(lambda: g.room.counter.running == 0)
            owner = g.keys.all()[0].id
            await until(lambda: g.room.counter.ledger.account(owner).reserved == 0)
        job = g.room.counter.client.jobs()[0]
        assert job.state == "cancelled"
        assert 0 < job.cost < job.max_cost / 4
        assert g.room.counter.ledger.account(owner).total_spent == job.cost
        assert provider.acks[-1].units <= 20


async def test_client_of_a_whole_answer_that_goes_away_stops_the_provider(tmp_path: Path) -> None:
    provider = FakeProvider("a", hold=asyncio.Event())
    async with gateway(tmp_path, provider) as g, g.openai() as client:
        asking = asyncio.create_task(client.chat.completions.create(model="chat", messages=TALK, max_tokens=100))
        await until(lambda: provider.acks)
        asking.cancel()
        async with asyncio.timeout(5):
            await until(lambda: provider.cancelled and g.room.counter.running == 0)


async def test_provider_lost_in_mid_stream_is_replaced_and_no_token_comes_twice(tmp_path: Path) -> None:
    dies, lives = FakeProvider("dies", dies_after_items=20), FakeProvider("lives")
    async with gateway(tmp_path, dies, lives) as g, g.openai() as client:
        chunks = await told(await client.chat.completions.create(model="chat", messages=TALK, max_tokens=60, stream=True))
        job = g.room.counter.client.jobs()[0]
        assert (job.attempts, job.state) == (2, "done")
        prompt = len(lives.prefixes[0])
        assert 0 < prompt < 60
        g.market.scheduler.providers.remove(dies)
        whole = await client.chat.completions.create(model="chat", messages=TALK, max_tokens=60)
        assert text_of(chunks) == whole.choices[0].message.content
        last = chunks[-1].model_extra["gpumarket"]
        assert last["provider"] == f"0x{lives.key.address.hex()}"


async def test_stream_that_a_check_refuses_ends_with_an_error(tmp_path: Path) -> None:
    liar, honest, third = FakeProvider("liar", wrong_numbers=1), FakeProvider("honest"), FakeProvider("third")
    async with gateway(tmp_path, liar, honest, third, client={"check_probability": 1.0}) as g, g.openai() as client:
        stream = await client.chat.completions.create(model="chat", messages=TALK, max_tokens=80, stream=True)
        with pytest.raises(openai.APIError, match="void"):
            await told(stream)
        whole = await client.chat.completions.with_raw_response.create(model="chat", messages=TALK, max_tokens=80)
        assert whole.headers["x-gpumarket-verdict"] in ("accepted", "unchecked")
        assert whole.headers["x-gpumarket-provider"] != f"0x{liar.key.address.hex()}"


def test_scripted_tokens_are_what_these_tests_take_them_for() -> None:
    assert token_at([1, 2, 3], 4) == 2 + (6 + 28) % 318


async def test_no_key_prompt_or_output_reaches_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async with gateway(tmp_path, FakeProvider("a", outcome=Outcome.FAILED)) as g, g.openai() as client:
        await refused(client.chat.completions.create(model="chat", messages=[{"role": "user", "content": "sesame-7731"}]))
        async with aiohttp.ClientSession() as http:
            bad = {"authorization": f"Bearer {g.key}", "x-bad": "a"}
            async with http.post(f"{g.url}/v1/chat/completions", headers=bad, data=b'{"model": "sesame-7731') as answer:
                assert answer.status == 415
        reader, writer = await asyncio.open_connection("127.0.0.1", int(g.url.rpartition(":")[2]))
        writer.write(f"GET / HTTP/1.1\r\nauthorization Bearer {g.key}\r\n\r\n".encode())
        assert b"400" in await reader.readline()
        writer.close()
    heard = capfd.readouterr()
    for secret in (g.key, "sesame-7731"):
        assert secret not in heard.out + heard.err
    _check_files(g, "sesame-7731")


def _check_files(g: Gateway, secret: str) -> None:
    for file in g.state.iterdir():
        assert secret.encode() not in file.read_bytes()

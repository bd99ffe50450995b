"""The official clients, Python's and Node's, on a gateway in front of a real testnet: every endpoint, parameter and error that it has."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import node_client
import openai
import psutil
import pytest

from gpumarket.core import private_files
from gpumarket.testnet.network import Network
from gpumarket.testnet.plan import GATEWAY, MINILM, TINY_LLAMA, Plan, honest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240
TALK: Any = [{"role": "user", "content": "Count the ways in which a market of machines can fail, and what each of them costs."}]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * SECONDS)]


@pytest.fixture
async def network(tmp_path: Path) -> AsyncIterator[Network]:
    plan = Plan(honest(2, warm=True), client={"check_probability": 0.2}, gateway={"listen": "127.0.0.1:0", "grpc_listen": "127.0.0.1:0"})
    async with Network(tmp_path / "net", plan) as found:
        yield found


def environment(network: Network) -> dict[str, str]:
    key = private_files.read(network.folder.gateway_key).decode().strip()
    return {"OPENAI_BASE_URL": network.ready[GATEWAY]["api"], "OPENAI_API_KEY": key}


def client_of(network: Network) -> openai.AsyncOpenAI:
    env = environment(network)
    return openai.AsyncOpenAI(base_url=env["OPENAI_BASE_URL"], api_key=env["OPENAI_API_KEY"], max_retries=0)


async def test_node_client_finds_every_endpoint_parameter_and_error(network: Network, tmp_path: Path) -> None:
    program = node_client.SOURCE / "conformance.mjs"
    told = json.loads(await asyncio.to_thread(node_client.run, program, environment(network), tmp_path))
    assert len(told) == 19
    page = (ROOT / "docs" / "openai.md").read_text("utf-8")
    (block,) = re.findall(r"^```js\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "page.mjs").write_text(block)
    said = await asyncio.to_thread(node_client.run, tmp_path / "page.mjs", environment(network), tmp_path)
    assert said.endswith("384\n")


async def test_python_client_finds_every_endpoint_and_parameter(network: Network) -> None:
    async with client_of(network) as client:
        assert {model.id async for model in client.models.list()} == {TINY_LLAMA, MINILM}
        asked: Any = {"model": TINY_LLAMA, "messages": TALK, "max_completion_tokens": 24, "seed": 5, "temperature": 0.8, "top_p": 0.9}
        whole = await client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        again = await client.chat.completions.create(**asked)
        text = whole.choices[0].message.content
        assert text and again.choices[0].message.content == text
        assert whole.usage is not None and whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content is not None
        assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
        assert {len(token.top_logprobs) for token in whole.choices[0].logprobs.content} == {2}
        stream = await client.chat.completions.create(**asked, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == text
        several = await client.chat.completions.create(**asked, n=3)
        assert len({choice.message.content for choice in several.choices}) == 3
        stop = text[len(text) // 2 :][:3]
        stopped = await client.chat.completions.create(**asked, stop=stop)
        assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
        completed = await client.completions.create(model=TINY_LLAMA, prompt=[[5, 6, 7], [8]], max_tokens=4, logprobs=3)
        assert [len(choice.logprobs.tokens or []) for choice in completed.choices if choice.logprobs] == [4, 4]
        vectors = await client.embeddings.create(model=MINILM, input=["a red fox", "ein roter Fuchs"])
        assert [len(entry.embedding) for entry in vectors.data] == [384, 384]
        raw = await client.responses.with_raw_response.create(model=TINY_LLAMA, input="hi", max_output_tokens=8, top_logprobs=1)
        assert raw.parse().output_text
        assert raw.headers["x-gpumarket-verdict"] in ("not-drawn", "accepted", "grey", "unchecked")


async def test_provider_killed_in_mid_stream_is_replaced(network: Network) -> None:
    async with client_of(network) as client:
        asked: Any = {"model": TINY_LLAMA, "messages": TALK, "max_tokens": 160, "seed": 9, "temperature": 1.0}
        whole = await client.chat.completions.create(**asked)
        stream = await client.chat.completions.create(**asked, stream=True)
        addresses = {f"0x{network.wallets[name].address.hex()}": name for name in ("provider-1", "provider-2")}
        text, killed, last = "", "", None
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if text and not killed:
                killed = _serving(network)
                network.processes.kill(killed)
            last = chunk
        assert text == whole.choices[0].message.content
        assert last is not None and last.model_extra is not None
        assert addresses[last.model_extra["gpumarket"]["provider"]] != killed


def _serving(network: Network) -> str:
    """The provider whose engine works hardest now."""
    burnt = {}
    for name in ("provider-1", "provider-2"):
        process = psutil.Process(network.processes.roles[name].process.pid)
        burnt[name] = sum(sum(p.cpu_times()[:2]) for p in [process, *process.children(recursive=True)])
    return max(burnt, key=lambda name: burnt[name])


async def test_gateway_killed_and_started_again_settles_what_it_owed_and_repeats_its_answers(network: Network) -> None:
    async with client_of(network) as client:
        asked: Any = {"model": TINY_LLAMA, "messages": TALK, "max_tokens": 16}
        first = await client.chat.completions.create(**asked, extra_headers={"Idempotency-Key": "one"})
        running = asyncio.create_task(client.chat.completions.create(**{**asked, "max_tokens": 200}))
        await asyncio.sleep(0.3)
        network.processes.kill(GATEWAY)
        with pytest.raises(openai.APIConnectionError):
            await running
    network.start_role(GATEWAY)
    await network.wait_ready(GATEWAY)
    async with client_of(network) as client:
        again = await client.chat.completions.create(**asked, extra_headers={"Idempotency-Key": "one"})
        assert again == first
    ledger = network.folder.state(GATEWAY) / "ledger.db"
    async with asyncio.timeout(SECONDS):
        while _reserved(ledger):  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.2)
    assert os.stat(ledger).st_mode & 0o077 == 0


def _reserved(ledger: Path) -> int:
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as connection:
        count: int = connection.execute("SELECT count(*) FROM gateway_reservations").fetchone()[0]
    return count

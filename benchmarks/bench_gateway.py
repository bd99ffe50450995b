"""The gateway in front of a real market, beside a bare FastAPI route and the litellm proxy, and beside the SDK without a gateway.

The market is a testnet with a real scheduler and a provider whose engine process serves a model of next to nothing. Every request is an
embedding of one text of four tokens: quote, reservation, order with a voucher, lease, row, ack, receipt and claim, each signed, verified
and journaled as always; no checks (p = 0: there is nobody else to ask). The peers answer the same request without any of that: FastAPI by
a raw route under uvicorn, litellm from an OpenAI endpoint on this machine that does nothing. One process each, the same event loop, the
same load from here; rounds alternate, medians are compared.

CPU time of the server's process is what its owner pays, whatever else runs on the machine. Throughput at 16 connections is wall time: the
market's scheduler, provider and engine share the machine with the gateway, while litellm shares it with a backend that does nothing, so
that row says what one machine does with all of it, and its neighbour by CPU what the process alone could.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import gateway_peers as peers
from gateway_peers import Sample, Target
from noop_model import NAME, TEXT, make_noop_model

from gpumarket.core import private_files
from gpumarket.core.terms import Task
from gpumarket.node.models.store import ModelStore
from gpumarket.sdk import Client
from gpumarket.testnet.folder import Folder
from gpumarket.testnet.network import Network
from gpumarket.testnet.plan import GATEWAY, TINY_LLAMA, ModelPlan, Plan, ProviderPlan

CONNECTIONS = 16
REQUESTS = {"gateway": 400, "fastapi": 4_000, "litellm": 400}
"""A round: long enough for a clock of CPU time that ticks every 10 ms."""
ROUNDS = 5
STREAMS = 60
STREAM_TOKENS = 4
PROMPT = "Say hello"
PLAN = Plan(
    (ProviderPlan("seller", (ModelPlan(NAME, "0.02"), ModelPlan(TINY_LLAMA, "0.05", "0.2", warm=True)), settings={"queue_limit": 64}),),
    client={"check_probability": 0.0, "exposure": "5"},
    gateway={"listen": "127.0.0.1:0"},
)


def run() -> list[dict[str, object]]:
    """Rows (name, value, unit, compared_with)."""
    peers.make_environment()
    return asyncio.run(_run())


async def _run() -> list[dict[str, object]]:
    body = json.dumps({"model": NAME, "input": TEXT, "encoding_format": "base64"}).encode()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fastapi = await stack.enter_async_context(peers.fastapi(body))
        litellm = await stack.enter_async_context(peers.litellm(fastapi.url.removesuffix("/embeddings"), body, folder))
        add_noop_model(folder)
        network = await stack.enter_async_context(Network(folder / "net", PLAN))
        gateway = gateway_target(network, body)
        rounds = await _rounds({"gateway": gateway, "fastapi": fastapi, "litellm": litellm})
        added = await _added_ttft(network, gateway)
    cpu = {name: statistics.median(s.cpu_seconds for s in samples) for name, samples in rounds.items()}
    rate = {name: statistics.median(s.per_second for s in samples) for name, samples in rounds.items()}
    at = f"{CONNECTIONS} connections"
    versus = f"litellm {peers.LITELLM} before a no-op endpoint, {rate['litellm']:.0f} requests/s, {at}; the gateway with its whole market"
    return [
        row("gateway_cpu_ms", 1e3 * cpu["gateway"], "CPU ms/request", f"embedding of {TEXT!r}, match to receipt, {at}"),
        row(
            "gateway_cpu_ratio_to_fastapi",
            cpu["gateway"] / cpu["fastapi"],
            "ratio",
            f"raw route, {1e3 * cpu['fastapi']:.3f} CPU ms/request",
        ),
        row("gateway_requests_per_s", rate["gateway"], "requests/s", f"{at}; scheduler, provider and engine on the same cores"),
        row("gateway_ratio_to_litellm", rate["gateway"] / rate["litellm"], "ratio", versus),
        row(
            "gateway_cpu_ratio_to_litellm",
            cpu["gateway"] / cpu["litellm"],
            "ratio",
            f"its {1e3 * cpu['litellm']:.2f} CPU ms/request, no market",
        ),
        row("gateway_added_ttft_ms_p50", added, "ms", f"the SDK's first piece of {TINY_LLAMA}, {STREAMS} streams each, in turn"),
    ]


def add_noop_model(folder: Path) -> None:
    """Into the store of the testnet that will come up in folder/net."""
    make_noop_model(folder / "model")
    store = ModelStore(Folder.at(folder / "net").store)
    manifest = store.add(folder / "model", NAME, task=Task.EMBED, dtype="float32", licence="Apache-2.0", max_input_tokens=16)
    store.set_alias(NAME, manifest.digest)


def gateway_target(network: Network, body: bytes) -> Target:
    """A testnet's gateway, under an API key of its own."""
    key = private_files.read(network.folder.gateway_key).decode().strip()
    ready = network.ready[GATEWAY]
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    return Target(f"{ready['api']}/embeddings", ready["pid"], headers, body)


async def _rounds(targets: dict[str, Target]) -> dict[str, list[Sample]]:
    for name, target in targets.items():  # opens the channel, fills the caches
        await peers.load(target, REQUESTS[name] // 4, CONNECTIONS)
    samples: dict[str, list[Sample]] = {name: [] for name in targets}
    for _ in range(ROUNDS):
        for name, target in targets.items():
            samples[name].append(await peers.load(target, REQUESTS[name], CONNECTIONS))
    return samples


# --- time to first token -------------------------------------------------------------------------------------------------------


async def _added_ttft(network: Network, gateway: Target) -> float:
    """Milliseconds that the gateway adds to the median first token, one stream at a time, both ways in turn."""
    url = gateway.url.replace("/embeddings", "/chat/completions")
    talk = [{"role": "user", "content": PROMPT}]
    body = {"model": TINY_LLAMA, "messages": talk, "max_tokens": STREAM_TOKENS, "temperature": 0, "stream": True}
    async with Client.from_env(config=network.client_config) as market, aiohttp.ClientSession(headers=dict(gateway.headers)) as session:

        async def direct() -> AsyncIterator[str]:
            async for piece in market.chat(TINY_LLAMA, PROMPT, stream=True, max_tokens=STREAM_TOKENS, temperature=0):
                yield piece

        async def through() -> AsyncIterator[str]:
            async with session.post(url, json=body) as response:
                response.raise_for_status()
                async for line in response.content:
                    yield _content(line)

        await first_seconds(direct)
        await first_seconds(through)
        seconds: dict[str, list[float]] = {"direct": [], "through": []}
        for _ in range(STREAMS):
            seconds["direct"].append(await first_seconds(direct))
            seconds["through"].append(await first_seconds(through))
    return 1e3 * (statistics.median(seconds["through"]) - statistics.median(seconds["direct"]))


async def first_seconds(stream: Callable[[], AsyncIterator[str]]) -> float:
    """Until the first text; the rest is read, so that the job ends as it should."""
    started, first = time.perf_counter(), 0.0
    async for text in stream():
        if text and not first:
            first = time.perf_counter() - started
    assert first, "a stream without text"
    return first


def _content(line: bytes) -> str:
    """The text in a line of an event stream."""
    data = line.strip().removeprefix(b"data: ")
    if not data or data == b"[DONE]":
        return ""
    choices: list[Any] = json.loads(data)["choices"]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def row(name: str, value: float, unit: str, compared_with: str) -> dict[str, object]:
    return {"name": name, "value": round(value, 3), "unit": unit, "compared_with": compared_with}


if __name__ == "__main__":
    for line in run():
        print(line)

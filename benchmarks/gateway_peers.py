"""What the gateway's benchmarks need around them: the peers' own environment, servers in it, and one HTTP load for all sides.

The peers (FastAPI under uvicorn, the litellm proxy) live in a virtual environment under .cache/, made once: nothing of theirs is a
dependency of ours.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from gpumarket.testnet.ports import free_port
from gpumarket.testnet.processes import clean_environment

HERE = Path(__file__).resolve().parent
LITELLM = "1.108.7"
PACKAGES = (f"litellm[proxy]=={LITELLM}", "uvicorn[standard]")
ENVIRONMENT = HERE.parent / ".cache" / f"gateway-peers-{LITELLM}"
MASTER_KEY = "sk-benchmark"
"""litellm looks at a key on every request, as the gateway does."""
READY_SECONDS = 120.0
SETTLE_SECONDS = 0.5
"""After the last answer: what a server still does about it is counted, too."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server under load: where it takes requests, which process it is, and what a request to it is."""

    url: str
    pid: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Sample:
    """One round: requests per second of wall time, and CPU seconds of the server's process a request."""

    per_second: float
    cpu_seconds: float


async def load(target: Target, requests: int, connections: int) -> Sample:
    """So many requests on so many connections, each one after the last's answer. Raises ClientResponseError for any that is not 200."""
    process, queue = psutil.Process(target.pid), iter(range(requests))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections), headers=dict(target.headers)) as session:

        async def connection() -> None:
            for _ in queue:
                async with session.post(target.url, data=target.body) as response:
                    answer = await response.read()
                    if response.status != 200:
                        raise RuntimeError(f"{target.url} answered {response.status}: {answer[:300]!r}")

        before, started = _cpu(process), time.perf_counter()
        await asyncio.gather(*(connection() for _ in range(connections)))
        wall = time.perf_counter() - started
    await asyncio.sleep(SETTLE_SECONDS)
    return Sample(requests / wall, (_cpu(process) - before) / requests)


@asynccontextmanager
async def fastapi(body: bytes) -> AsyncIterator[Target]:
    """A bare FastAPI route under uvicorn: one process, the event loop that the gateway has."""
    port = free_port()
    options = ["--port", str(port), "--loop", "asyncio", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    command = [_python(), "-m", "uvicorn", "--app-dir", str(HERE / "peers"), "noop_app:app", *options]
    async with _serving(command, f"http://127.0.0.1:{port}/openapi.json", {}) as pid:
        yield Target(f"http://127.0.0.1:{port}/v1/embeddings", pid, {"content-type": "application/json"}, body)


@asynccontextmanager
async def litellm(backend: str, body: bytes, folder: Path) -> AsyncIterator[Target]:
    """litellm's proxy, one worker, in front of an OpenAI endpoint at `backend` (…/v1)."""
    port, config = free_port(), folder / "litellm.json"
    model: dict[str, Any] = {"model": "openai/no-op", "api_base": backend, "api_key": "none"}
    settings = {"model_list": [{"model_name": "no-op", "litellm_params": model}], "general_settings": {"master_key": MASTER_KEY}}
    config.write_text(json.dumps(settings))
    command = [
        str(ENVIRONMENT / "bin" / "litellm"),
        "--config",
        str(config),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--num_workers",
        "1",
    ]
    quiet = {"LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    headers = {"content-type": "application/json", "authorization": f"Bearer {MASTER_KEY}"}
    async with _serving([*command, "--telemetry", "False"], f"http://127.0.0.1:{port}/health/liveliness", quiet) as pid:
        yield Target(f"http://127.0.0.1:{port}/v1/embeddings", pid, headers, body)


def make_environment() -> None:
    """Install the peers, once."""
    if (ENVIRONMENT / "complete").exists():
        return
    print("making the peers' environment (once)", file=sys.stderr)
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    subprocess.run([_python(), "-m", "pip", "install", "--quiet", *PACKAGES], check=True, stdout=sys.stderr)
    (ENVIRONMENT / "complete").touch()


@asynccontextmanager
async def _serving(command: Sequence[str], probe: str, variables: Mapping[str, str]) -> AsyncIterator[int]:
    """A server while inside; its pid. Raises RuntimeError with the end of its output when it does not come up."""
    process = await asyncio.create_subprocess_exec(
        *command, env=clean_environment() | variables, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        await _answering(probe, process)
        yield process.pid
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 10)
            except TimeoutError:
                process.kill()
                await process.wait()


async def _answering(probe: str, process: asyncio.subprocess.Process) -> None:
    deadline = time.monotonic() + READY_SECONDS
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            if process.returncode is not None:
                raise RuntimeError(f"a peer ended with exit code {process.returncode} instead of answering at {probe}")
            try:
                async with session.get(probe) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass  # not yet
            await asyncio.sleep(0.2)
    raise RuntimeError(f"a peer does not answer at {probe} after {READY_SECONDS:.0f} s")


def _cpu(process: psutil.Process) -> float:
    """User and system seconds of a process and whatever it started."""
    times = [process.cpu_times(), *(child.cpu_times() for child in process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _python() -> str:
    return str(ENVIRONMENT / "bin" / ("python.exe" if os.name == "nt" else "python"))

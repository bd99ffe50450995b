"""One client of a chaos run: a steady load of mixed jobs, each written down when it begins and when it ends.

    python -m gpumarket.testnet.chaos_load --config FILE --log JOBS.jsonl --seed N [--job-seconds S]

It uses the SDK as anybody would. On start it takes up what an earlier life left in the journal; on SIGTERM it finishes what it began, takes
up what failed on the way, and ends. Never: a prompt or an answer in the log.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gpumarket.core.errors import GpumarketError
from gpumarket.core.settings import ChainSettings, load
from gpumarket.core.units import hex0x
from gpumarket.sdk import Client
from gpumarket.sdk.results import ChatResult, EmbedResult, JobOutcome
from gpumarket.sdk.settings import ClientSettings
from gpumarket.testnet.plan import MINILM, TINY_LLAMA

TOKENS = (128, 512)
TEXTS = (1, 12)
WORDS = ("market", "machine", "token", "promise", "signature", "channel", "receipt", "price", "stake", "lease", "voucher", "model")
CHATS_AT_ONCE = 2
PAUSE_SECONDS = 0.3
AGAIN_SECONDS = 2.0
ENDING_SECONDS = 150.0
"""To bring everything to its end after SIGTERM: a job's deadline and some more."""
RUNNING = ("ordered", "leased", "delivered")

Log = Callable[..., None]


class Load:
    """The workers of one client; `stop` is set when it shall end."""

    def __init__(self, client: Client, log: Log, seed: int, stop: asyncio.Event) -> None:
        self.client, self.log, self.stop = client, log, stop
        self._random = random.Random(seed)  # noqa: S311  texts and sizes

    async def run(self) -> None:
        """Until stopped and everything has its end. Raises TimeoutError where that does not come."""
        await self._resume()
        async with asyncio.TaskGroup() as group:
            for _ in range(CHATS_AT_ONCE):
                group.create_task(self._work("chat", self._chat))
            group.create_task(self._work("embed", self._embed))
        async with asyncio.timeout(ENDING_SECONDS):
            while True:
                if await self._resume():
                    return
                await asyncio.sleep(AGAIN_SECONDS)

    async def _work(self, task: str, job: Callable[[], Awaitable[JobOutcome]]) -> None:
        number = 0
        while not self.stop.is_set():
            number += 1
            began = time.time()
            self.log("began", task=task, number=number)
            try:
                result = await job()
            except GpumarketError as error:
                self.log("failed", task=task, number=number, code=error.code, seconds=time.time() - began)
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            self.log("done", task=task, number=number, seconds=time.time() - began, **_told(result))
            await asyncio.sleep(PAUSE_SECONDS)

    async def _chat(self) -> ChatResult:
        stream = self.client.chat(TINY_LLAMA, self._text(20), stream=True, max_tokens=self._random.randint(*TOKENS), temperature=0.7)
        pieces = [piece async for piece in stream]
        result = stream.result
        assert isinstance(result, ChatResult)
        assert "".join(pieces) == result.text, "what was streamed is not what was answered"
        return result

    async def _embed(self) -> EmbedResult:
        return await self.client.embed(MINILM, [self._text(15) for _ in range(self._random.randint(*TEXTS))])

    async def _resume(self) -> bool:
        """Take up what was interrupted; whether nothing is left open."""
        try:
            for found in await self.client.resume_all():
                if isinstance(found, Exception):
                    self.log("resumed", code=getattr(found, "code", type(found).__name__))
                else:
                    self.log("resumed", **_told(found))
        except GpumarketError as error:  # the scheduler or the chain is away: again later
            self.log("waits", code=error.code)
            return False
        return not any(job.state in RUNNING for job in self.client.jobs(checks=True))

    def _text(self, words: int) -> str:
        return " ".join(self._random.choices(WORDS, k=words))


def _told(result: JobOutcome) -> dict[str, Any]:
    return {
        "job": hex0x(result.job),
        "attempts": [{"provider": hex0x(attempt.provider), "outcome": attempt.outcome} for attempt in result.attempts],
        "verdict": str(result.verdict.state),
        "rejected": len(result.rejected),
        "units": result.usage.output_tokens,
        "cost": result.cost,
    }


@asynccontextmanager
async def opened(config: Path, log: Log, stop: asyncio.Event, job_seconds: int | None) -> AsyncIterator[Client | None]:
    """The client, once scheduler and chain let it in; None where it is to stop before."""
    while not stop.is_set():
        settings = load(ClientSettings, file=config, env={}, flags={"job_seconds": job_seconds})
        client = Client(settings, load(ChainSettings, file=config, env={}))
        try:
            await client.__aenter__()
        except GpumarketError as error:
            log("waits", code=error.code)
            await asyncio.sleep(AGAIN_SECONDS)
            continue
        try:
            yield client
        finally:
            await client.__aexit__(None, None, None)
        return
    yield None


async def serve(config: Path, file: Path, seed: int, job_seconds: int | None) -> None:
    """Work until SIGTERM, then to the end of what was begun. `job_seconds`: of each job, where it is not the settings'."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    with file.open("a", buffering=1) as sink:

        def log(event: str, **more: Any) -> None:
            sink.write(json.dumps({"at": round(time.time(), 3), "client": config.stem, "event": event, **more}) + "\n")

        log("started")
        async with opened(config, log, stop, job_seconds) as client:
            if client is not None:
                await Load(client, log, seed, stop).run()
        log("ended")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gpumarket.testnet.chaos_load", description="Load of a chaos run.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--job-seconds", type=int)
    given = parser.parse_args(argv)
    asyncio.run(serve(given.config, given.log, given.seed, given.job_seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The embedding engine against plain transformers, and the engine process against the engine: texts per second.

256 paragraphs of the Python reference, at most 256 tokens each, all-MiniLM-L6-v2 in float32, one torch thread.
"""

from __future__ import annotations

import asyncio
import pydoc_data.topics
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from gpumarket.node.engine.base import EmbedRequest
from gpumarket.node.engine.embed import EmbedEngine
from gpumarket.node.engine.encoder import load_encoder_model
from gpumarket.node.engine.process import EngineProcess
from gpumarket.node.models.minilm import minilm_path

TEXTS = 256
BATCH = 64
ROUNDS = 3

Inputs = list[tuple[int, ...]]


def run() -> list[dict[str, object]]:
    """Rows (name, value, unit, compared_with)."""
    torch.set_num_threads(1)
    return asyncio.run(_run(read_texts()))


async def _run(texts: Inputs) -> list[dict[str, object]]:
    engine, process = EmbedEngine(minilm_path()), EngineProcess("embed", minilm_path())
    encoder = load_encoder_model(minilm_path(), "float32")
    await asyncio.gather(engine.start(), process.start())
    best: dict[str, float] = {}

    async def plain() -> None:
        for at in range(0, TEXTS, 32):
            encoder.encode(texts[at : at + 32])

    async def through(server: EmbedEngine | EngineProcess) -> None:
        for at in range(0, TEXTS, BATCH):
            rows = [batch async for batch in server.embed(EmbedRequest(tuple(texts[at : at + BATCH])))]
            assert len(np.concatenate(rows)) == BATCH

    for _ in range(ROUNDS):
        await measure(best, "plain", plain, time.process_time)
        await measure(best, "engine", lambda: through(engine), time.process_time)
        await measure(best, "engine_wall", lambda: through(engine), time.perf_counter)
        await measure(best, "process_wall", lambda: through(process), time.perf_counter)
    await asyncio.gather(engine.close(), process.close())
    return [
        row("embed_engine_texts_per_cpu_s", best["engine"], "texts/CPU-s", f"batch {BATCH}, MiniLM float32, 1 thread"),
        row("embed_engine_ratio_to_plain", best["engine"] / best["plain"], "ratio", "unsorted batches of 32 through transformers"),
        row("embed_process_ratio_to_engine", best["process_wall"] / best["engine_wall"], "ratio", "the same engine in this process"),
    ]


async def measure(best: dict[str, float], name: str, work: Callable[[], Coroutine[Any, Any, None]], clock: Callable[[], float]) -> None:
    before = clock()
    await work()
    best[name] = max(best.get(name, 0.0), TEXTS / (clock() - before))


def row(name: str, value: float, unit: str, compared_with: str) -> dict[str, object]:
    return {"name": name, "value": round(value, 3), "unit": unit, "compared_with": compared_with}


def read_texts() -> Inputs:
    """Token ids of the first TEXTS paragraphs."""
    return tokenize(read_paragraphs(TEXTS))


def read_paragraphs(count: int) -> list[str]:
    """The first `count` paragraphs of the Python reference that are longer than a line."""
    topics = sorted(pydoc_data.topics.topics)
    return [p for topic in topics for p in pydoc_data.topics.topics[topic].split("\n\n") if len(p) > 40][:count]


def tokenize(texts: list[str]) -> Inputs:
    """Ids as a client of the model makes them."""
    tokenizer = Tokenizer.from_file(str(minilm_path() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    return [tuple(tokenizer.encode(text).ids) for text in texts]


if __name__ == "__main__":
    for line in run():
        print(line)

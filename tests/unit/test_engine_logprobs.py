"""The slots engine's logprobs are those of the model's raw logits, for who asks, and nobody else notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import VOCABULARY, request, small_llama
from transformers import AutoModelForCausalLM

from gpumarket.core.errors import EngineFailed, ProtocolError
from gpumarket.node.attempt import Produced
from gpumarket.node.engine import frames
from gpumarket.node.engine.base import Chunk, GenerateRequest, TokenLogprobs
from gpumarket.node.engine.pick import LOGPROB_MIN, pick_logprobs
from gpumarket.node.engine.process import EngineProcess
from gpumarket.node.engine.slots import SlotEngine
from gpumarket.node.work import GenerateWork, run


@pytest.fixture
async def engine() -> AsyncIterator[SlotEngine]:
    made = SlotEngine(small_llama(), rows_max=4, queue_max=8, prefill_tokens=32, cache_tokens_max=4096)
    await made.start()
    yield made
    await made.close()


async def drawn(engine: Any, asked: GenerateRequest) -> tuple[list[int], list[TokenLogprobs]]:
    tokens: list[int] = []
    told: list[TokenLogprobs] = []
    async for chunk in engine.generate(asked):
        assert len(chunk.logprobs) == (0 if asked.top_logprobs is None else len(chunk.tokens))
        tokens += chunk.tokens
        told += chunk.logprobs
    return tokens, told


async def test_logprobs_are_the_models_own_before_temperature_and_top_p(engine: SlotEngine) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(small_llama(), dtype=torch.float32)
    asked = replace(request(40, 12, temperature=1500, top_p=500_000), top_logprobs=5)
    tokens, told = await drawn(engine, asked)
    with torch.inference_mode():
        logits = model(torch.tensor([[*asked.prompt, *tokens]])).logits[0, len(asked.prompt) - 1 : -1]
    expected = logits.log_softmax(-1).numpy()
    assert [entry.token for entry in told] == tokens
    for entry, row in zip(told, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        best = np.sort(row)[::-1][:5]
        assert [value for _, value in entry.top] == pytest.approx(best.tolist(), abs=1e-4)
        assert [float(row[token]) for token, _ in entry.top] == pytest.approx(best.tolist(), abs=1e-4)
        assert all(value <= 0 for _, value in entry.top)


async def test_logprobs_of_one_request_change_nothing_for_the_others_in_its_batch(engine: SlotEngine) -> None:
    asked = [request(n, 20, temperature=1000, salt=n) for n in (5, 50, 9, 30)]
    alone = [(await drawn(engine, r))[0] for r in asked]
    mixed = [replace(r, top_logprobs=top) for r, top in zip(asked, (None, 0, 20, None), strict=True)]
    together = await asyncio.gather(*(drawn(engine, r) for r in mixed))
    assert [tokens for tokens, _ in together] == alone
    assert [sorted({len(entry.top) for entry in told}) for _, told in together] == [[], [0], [20], []]


@pytest.mark.parametrize("count", [-1, 21])
def test_logprobs_beyond_twenty_are_refused(count: int) -> None:
    with pytest.raises(ProtocolError, match="top_logprobs"):
        replace(request(5, 5), top_logprobs=count)


def test_logprobs_of_masked_and_certain_tokens_are_finite_and_at_most_0() -> None:
    logits = torch.tensor([[-torch.inf, 100.0, -torch.inf]])
    (told,) = pick_logprobs(logits, [0], [2])
    assert told is not None
    assert (told.logprob, told.top[0]) == (LOGPROB_MIN, (1, 0.0))
    assert told.top[1][1] == LOGPROB_MIN


async def test_logprobs_come_out_of_the_engine_process_as_they_went_in() -> None:
    process = EngineProcess("slots", small_llama(), options={"rows_max": 2, "queue_max": 2, "cache_tokens_max": 2048})
    await process.start()
    try:
        tokens, told = await drawn(process, replace(request(9, 8), top_logprobs=3))
        assert [entry.token for entry in told] == tokens
        assert all(entry.top[0][0] == entry.token and 0 <= entry.top[2][0] < VOCABULARY for entry in told)
    finally:
        await process.close()


def test_logprobs_that_are_off_leave_no_byte_in_the_engines_frames() -> None:
    assert b"logprobs" not in frames.pack(frames.Tokens(1, (5,), "", ()))
    assert b"logprobs" in frames.pack(frames.Tokens(1, (5,), "", (TokenLogprobs(5, -1.0),)))


class Wrong:
    """An engine whose logprobs are another token's."""

    async def generate(self, _: GenerateRequest) -> AsyncIterator[Chunk]:
        yield Chunk((5,), "length", (TokenLogprobs(6, -1.0, ()),))


async def test_work_refuses_an_engine_whose_logprobs_are_not_its_tokens() -> None:
    engine: Any = Wrong()
    with pytest.raises(EngineFailed, match="not those of the 1 tokens"):
        [step async for step in run(GenerateWork(replace(request(3, 1), top_logprobs=0)), engine)]
    found = [step async for step in run(GenerateWork(request(3, 1)), engine)]
    assert isinstance(found[0], Produced)
    assert found[0].items[0].logprobs is None

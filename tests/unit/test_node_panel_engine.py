"""A panel member with the real decoder: an honest text is in order, another model's is not; an attempt is judged for its own part."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest
from dispute_kit import DOMAIN, Deal, seed_of
from engine_kit import prompt, small_llama
from node_fixtures import manifest

from gpumarket.core.signing import LocalKey
from gpumarket.core.terms import Task
from gpumarket.node.engine.base import GenerateRequest, Sampling
from gpumarket.node.engine.slots import SlotEngine
from gpumarket.node.panel.recompute import recompute, work_of
from gpumarket.settlement.disputes import bound, number
from gpumarket.settlement.verification import TEXT_FP32, open_evidence

MODEL = manifest(Task.GENERATE, max_input_tokens=512)
DEAL = Deal(LocalKey(b"\1" * 32), LocalKey(b"\2" * 32), LocalKey(b"\3" * 32), MODEL.digest)
PROMPT = prompt(24)
LENGTH = 96


@pytest.fixture
async def engines() -> AsyncIterator[tuple[SlotEngine, SlotEngine]]:
    """The model that is sold, and another one."""
    made = tuple(SlotEngine(small_llama(seed), rows_max=2, queue_max=4, prefill_tokens=64, cache_tokens_max=2048) for seed in (0, 1))
    for engine in made:
        await engine.start()
    yield made[0], made[1]
    for engine in made:
        await engine.close()


async def delivered(engine: SlotEngine, prefix: Sequence[int] = ()) -> list[int]:
    """The text that this engine draws under the seed of the attempt's lease, which does not depend on the text."""
    seed = seed_of(DEAL.text(PROMPT, [*prefix, *[0] * (LENGTH - len(prefix))], skip=len(prefix)))
    asked = GenerateRequest(PROMPT, LENGTH, (), Sampling(1_000, 1_000_000, seed), tuple(prefix))
    found = list(prefix)
    async for chunk in engine.generate(asked):
        found += chunk.tokens
    return found


async def judged(engine: SlotEngine, tokens: Sequence[int], *, skip: int = 0) -> int:
    evidence = open_evidence(DOMAIN, DEAL.text(PROMPT, tokens, skip=skip))
    return number(TEXT_FP32, evidence, await recompute(work_of(evidence, MODEL), engine))


async def test_panel_honest_text_is_in_order_and_another_models_is_grossly_not(engines: tuple[SlotEngine, SlotEngine]) -> None:
    sold, other = engines
    assert await judged(sold, await delivered(sold)) == 0
    assert await judged(sold, await delivered(other)) > bound(TEXT_FP32)


async def test_panel_judges_an_attempt_by_its_own_tokens_only(engines: tuple[SlotEngine, SlotEngine]) -> None:
    sold, other = engines
    foreign = (await delivered(other))[:20]  # an earlier attempt of a cheater
    assert await judged(sold, await delivered(sold, foreign), skip=20) == 0
    honest = (await delivered(sold))[:20]
    assert await judged(sold, await delivered(other, honest), skip=20) > bound(TEXT_FP32)

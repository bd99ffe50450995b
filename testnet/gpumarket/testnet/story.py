"""What the demo's client does: embeds a document, answers a question from it, has text generated, and goes on until the cheater was met.

It uses the SDK as anybody would; the cheater gets work because it is cheap, and is found because results are checked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from gpumarket.core.errors import GpumarketError, OverMaxCost, UnknownModel
from gpumarket.core.units import Address, Hash, format_money, hex0x
from gpumarket.sdk import Client
from gpumarket.sdk.results import ChatResult, EmbedResult, JobOutcome
from gpumarket.testnet import passages
from gpumarket.testnet.plan import MINILM, TINY_LLAMA
from gpumarket.v1 import market_pb2

MAX_COST = "0.001"
JOBS_MAX = 6
PASSAGES_PER_JOB = 2
TEXT_TOKENS = 40
LINE_CHARACTERS = 16
EXTRA_JOBS_MAX = 40
"""More jobs until the cheater gets one. It is the cheapest of four, so its chance at each is at least a quarter: 1e-5 that all miss it."""
BEST = 2
PROMPT = "Say hello to the market."


@dataclass(slots=True)
class Story:
    """What came of it."""

    answer: tuple[str, ...] = ()
    text: str = ""
    why: dict[Hash, str] = field(default_factory=dict)
    """Job → the match in words."""
    first_result: float = 0.0
    """Monotonic time."""
    refusals: dict[str, bool] = field(default_factory=dict)
    rejected: set[Address] = field(default_factory=set)


async def tell(market: Client, texts: list[str], question: str, cheater: Address, say: Callable[[str], None]) -> Story:
    """Run all jobs. Errors of the SDK pass through."""
    story = Story()
    async with asyncio.TaskGroup() as group:
        group.create_task(_read(market, texts, question, cheater, story, say))
        group.create_task(_write(market, story, say))
    await _probe(market, story)
    return story


async def _read(market: Client, texts: list[str], question: str, cheater: Address, story: Story, say: Callable[[str], None]) -> None:
    parts = []
    for number, batch in enumerate(passages.batches(texts, jobs_max=JOBS_MAX, size_min=PASSAGES_PER_JOB), 1):
        result = await _embed(market, batch, story, say, f"passages, job {number}")
        parts.append(result.vectors)
    asked = await _embed(market, [question], story, say, "the question")
    vectors = np.concatenate(parts)
    story.answer = tuple(texts[index] for index, _ in passages.nearest(asked.vectors[0], vectors, BEST))
    for extra in range(EXTRA_JOBS_MAX):
        if cheater in story.rejected:
            return
        await _embed(market, [texts[extra % len(texts)]], story, say, "one passage again")


async def _embed(market: Client, texts: list[str], story: Story, say: Callable[[str], None], what: str) -> EmbedResult:
    result = await market.embed(MINILM, texts, max_cost=MAX_COST, explain=True)
    _note(story, result, say, what)
    return result


async def _write(market: Client, story: Story, say: Callable[[str], None]) -> None:
    stream = market.chat(TINY_LLAMA, PROMPT, stream=True, max_tokens=TEXT_TOKENS, max_cost=MAX_COST, explain=True)
    line = ""
    async for piece in stream:
        story.text += piece
        line += piece
        if len(line) >= LINE_CHARACTERS:  # a line of its own: jobs that run meanwhile tell theirs in between
            say(f"a text, as it comes: {line}")
            line = ""
    if line:
        say(f"a text, as it comes: {line}")
    result = stream.result
    assert isinstance(result, ChatResult)
    _note(story, result, say, "a text")


def _note(story: Story, result: JobOutcome, say: Callable[[str], None], what: str) -> None:
    story.first_result = story.first_result or time.monotonic()
    story.why[result.job] = explain(result.explanation)
    story.rejected.update(rejected.provider for rejected in result.rejected)
    again = f"; rejected before: {', '.join(hex0x(r.provider)[:10] for r in result.rejected)}" if result.rejected else ""
    say(f"{what}: {hex0x(result.provider)[:10]}, {result.verdict.state}, {format_money(result.cost)}{again}")


def explain(explanation: market_pb2.Explanation | None) -> str:
    """A match in words: how many were looked at, what the chosen one's score is made of, who was struck out and why."""
    if explanation is None:
        return ""
    chosen = next((score for score in explanation.candidates if score.chosen), None)
    words = [f"{explanation.considered} considered"]
    if chosen is not None:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in sorted(chosen.parts.items()))
        words.append(f"score {chosen.total:.2f} ({parts})")
    if explanation.explored:
        words.append("drawn from the newcomers' share")
    if explanation.rejected:
        words.append("struck out: " + ", ".join(f"{hex0x(r.provider)[:10]} by {r.filter}" for r in explanation.rejected))
    return "; ".join(words)


async def _probe(market: Client, story: Story) -> None:
    """Orders that must be refused, each with its own error."""
    probes: dict[str, tuple[type[GpumarketError], str, str]] = {
        "a price above the limit": (OverMaxCost, MINILM, "0.000000000000000001"),
        "an unknown model": (UnknownModel, "no-such-model", MAX_COST),
    }
    for name, (expected, model, limit) in probes.items():
        try:
            await market.embed(model, ["one"], max_cost=limit)
        except expected:
            story.refusals[name] = True
        else:
            story.refusals[name] = False

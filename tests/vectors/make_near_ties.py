"""Writes near_ties.json: how often, and how widely, two honest computations of one text differ. Real decoders, no distribution assumed.

A random Llama (hidden 64, two layers) in bfloat16 draws a text at temperature 1 as its provider, with a prefill of 64 tokens. Another
engine with the same weights and a prefill of 16 replays it as a checker: other shapes of the same sums round otherwise. Of PROMPTS prompts
the TAKEN with the largest mean gap are kept, each with the gap of every token. Run by hand, once; it takes a minute:

    .venv/bin/python tests/vectors/make_near_ties.py
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from engine_kit import prompt, small_llama

from gpumarket.core.terms import keccak256
from gpumarket.node.engine.base import GenerateRequest, Sampling, Segment
from gpumarket.node.engine.slots import SlotEngine

PROMPTS, TAKEN, PROMPT_TOKENS, TOKENS = 100, 8, 24, 129


async def gaps_of(provider: SlotEngine, checker: SlotEngine, salt: int) -> list[float]:
    """One text's gap of every token."""
    seed = keccak256(b"near tie %d" % salt)
    asked = GenerateRequest(prompt(PROMPT_TOKENS, salt), TOKENS, (), Sampling(1_000, 1_000_000, seed), ())
    text: list[int] = []
    async for chunk in provider.generate(asked):
        text += chunk.tokens
    gaps = await checker.replay(asked, text, (Segment(0, seed),))
    return [round(float(gap), 6) for gap in gaps]


async def measured() -> list[list[float]]:
    """Every prompt's gaps."""
    provider, checker = _engine(prefill_tokens=64), _engine(prefill_tokens=16)
    await provider.start()
    await checker.start()
    try:
        return [await gaps_of(provider, checker, salt) for salt in range(PROMPTS)]
    finally:
        await provider.close()
        await checker.close()


def _engine(prefill_tokens: int) -> SlotEngine:
    return SlotEngine(
        small_llama(0), compute_dtype="bfloat16", rows_max=1, queue_max=4, prefill_tokens=prefill_tokens, cache_tokens_max=1024
    )


def main() -> None:
    """Measure and write."""
    found = asyncio.run(measured())
    worst = sorted(found, key=lambda gaps: -float(np.mean(gaps)))[:TAKEN]
    rates = [float(np.mean(np.array(gaps) > 0)) for gaps in found]
    about = {"prompts": PROMPTS, "tokens": TOKENS, "torch": torch.__version__, "median_rate": round(float(np.median(rates)), 6)}
    texts = [{"tokens": len(g), "gaps": {str(i): gap for i, gap in enumerate(g) if gap}} for g in worst]
    Path(__file__).with_name("near_ties.json").write_text(json.dumps(about | {"texts": texts}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

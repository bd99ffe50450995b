"""The numbers that honest and cheating hardware give, drawn from the measured distributions, and a client that picks the worst prompts.

Measured (random Llama, bf16, 200 honest jobs of 129 tokens on five stacks; MiniLM float32, 64 texts):
    honest text      3 % of the tokens near a tie at most, largest gap of one 0.071, mean clipped gap of a job 8e-5 median, 6.1e-4 largest
    4-bit weights    21 to 42 % of the tokens with a gap above 0.1; another model 78 to 93 %
    honest rows      differ by 1.3e-7 a coordinate at most; the mildest cheat by 1.5e-4
    real decoders    tests/vectors/near_ties.json: of 100 prompts to a random Llama in bfloat16 the eight whose texts differ most between
                     two prefill sizes; their mean gaps reach 1.1e-3 and their largest 0.083, beyond what is drawn here
A near tie is a property of prompt and seed. Nobody can grind the seed, so an adversary picks the prompt: of `TRIED` prompts the one whose
own rate of ties is highest. How the rate spreads over prompts was not measured; log-normal with a sigma of 0.5 makes the worst of a
hundred three to four times the median, which is beyond the largest of the 200.
"""

from __future__ import annotations

import json
import math
import random
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TIE_RATE, TIE_GAP, GAP_MAX = 0.012, 0.0065, 0.071
"""Share of tokens near a tie, mean gap of one, and the largest that was seen. 129 x 0.012 x 0.0065 / 129 = 8e-5, the measured median."""
TRIED, SIGMA = 100, 0.5
ROW_NOISE_MAX, ROW_CHEAT_MIN = 1.3e-7, 1.5e-4
GROSS_SHARES = {"4-bit weights": (0.21, 0.42), "another model": (0.78, 0.93)}
Gaps = NDArray[np.float32]


@cache
def real_ties() -> tuple[Gaps, ...]:
    """Gaps of whole texts that a real decoder gave for another's honest answers."""
    stored = json.loads((Path(__file__).parents[1] / "vectors" / "near_ties.json").read_text(encoding="utf-8"))
    found = []
    for text in stored["texts"]:
        gaps = np.zeros(text["tokens"], dtype="<f4")
        for position, gap in text["gaps"].items():
            gaps[int(position)] = gap
        found.append(gaps)
    return tuple(found)


def tie_rate(rng: random.Random, *, worst_of: int = 1) -> float:
    """A prompt's rate of near ties; the highest of so many prompts."""
    return max(TIE_RATE * rng.lognormvariate(0.0, SIGMA) for _ in range(worst_of))


def honest_gaps(rng: random.Random, tokens: int, rate: float) -> Gaps:
    """What an honest checker finds for an honest answer."""
    gaps = np.zeros(tokens, dtype="<f4")
    for at in range(tokens):
        if rng.random() < rate:
            gaps[at] = min(GAP_MAX, rng.expovariate(1 / TIE_GAP))
    return gaps


def gross_gaps(rng: random.Random, tokens: int, shares: tuple[float, float]) -> Gaps:
    """What an honest checker finds for a gross cheat's answer."""
    gaps = np.zeros(tokens, dtype="<f4")
    for at in rng.sample(range(tokens), math.ceil(rng.uniform(*shares) * tokens)):
        gaps[at] = rng.uniform(0.11, 3.0)
    return gaps


def rows(count: int, dimensions: int = 8) -> Gaps:
    """Embeddings as the reference gives them."""
    return np.linspace(-0.2, 0.2, count * dimensions, dtype="<f4").reshape(count, dimensions)


def near(rng: random.Random, truth: Gaps) -> Gaps:
    """The same on another honest machine."""
    noise = np.array([rng.uniform(-ROW_NOISE_MAX / 2, ROW_NOISE_MAX / 2) for _ in range(truth.size)])
    moved: Gaps = (truth.astype(np.float64) + noise.reshape(truth.shape)).astype("<f4")
    return moved


def off(rng: random.Random, truth: Gaps) -> Gaps:
    """A cheat's: the mildest that was measured, or worse."""
    moved: Gaps = (truth.astype(np.float64) + rng.choice((-1, 1)) * ROW_CHEAT_MIN * rng.uniform(1.1, 100)).astype("<f4")
    return moved


def as_items(table: Gaps) -> tuple[bytes, ...]:
    return tuple(row.tobytes() for row in table)

"""Writes sampling.json. Run it by hand, and only when the definition of the draw changes: providers and checkers change with it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpumarket.node.engine import noise, sampling
from gpumarket.node.engine.base import Sampling

SEEDS = ("00" * 32, "ff" * 32, bytes(range(32)).hex())
VOCABULARY = 4001


def logits() -> NDArray[np.float32]:
    """A row that needs no random numbers and has ties: 4001 values in steps of 1/64."""
    return ((np.arange(VOCABULARY) * 7919 % 997) / 64).astype(np.float32)


def main() -> None:
    tokens = np.array([0, 1, 2, 255, 4000, 151_935], dtype=np.int64)
    rows = []
    for seed in SEEDS:
        for position in (0, 1, 4095, 2**31 + 5):
            index = noise.noise_index(noise.seed_words(bytes.fromhex(seed)), position, tokens)
            rows.append({"seed": seed, "position": position, "tokens": tokens.tolist(), "index": index.tolist()})
    draws = []
    for temperature, top_p in ((0, 1_000_000), (1000, 1_000_000), (300, 1_000_000), (1000, 900_000), (2000, 500_000)):
        for position in (7, 8, 9):
            params = Sampling(temperature, top_p, bytes.fromhex(SEEDS[2]))
            token = sampling.draw(logits(), position, params)
            draws.append({"temperature_milli": temperature, "top_p_ppm": top_p, "position": position, "token": token})
    table = hashlib.sha256(noise.gumbel_table().astype("<f4").tobytes()).hexdigest()
    out = {"gumbel_table_sha256": table, "draw_seed": SEEDS[2], "noise": rows, "draws": draws}
    Path(__file__).with_name("sampling.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Small models for the engine tests, made once per test process and removed with it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from gpumarket.node.engine.base import GenerateRequest, Sampling
from gpumarket.node.models.tiny_llama import make_tiny_llama

VOCABULARY = 600
SEED = bytes(range(32))


@cache
def small_llama(seed: int = 0) -> Path:
    """A folder with a Llama of 64 x 2 layers; another seed is another model with the same tokenizer."""
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="gpumarket-test-model-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    make_tiny_llama(root / "model", seed=seed, hidden=64, layers=2, vocabulary=VOCABULARY)
    return root / "model"


def prompt(length: int, salt: int = 0) -> tuple[int, ...]:
    """Token ids that look random and are the same in every run."""
    return tuple(6 + (i * 131 + salt * 977 + i * i * 17) % (VOCABULARY - 6) for i in range(length))


def request(
    length: int,
    max_tokens: int,
    *,
    temperature: int = 0,
    top_p: int = 1_000_000,
    seed: bytes = SEED,
    stop: tuple[int, ...] = (),
    prefix: tuple[int, ...] = (),
    salt: int = 0,
) -> GenerateRequest:
    """A request for the small Llama."""
    return GenerateRequest(prompt(length, salt), max_tokens, stop, Sampling(temperature, top_p, seed), prefix)

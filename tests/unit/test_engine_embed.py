"""Vectors are those of sentence-transformers' recipe on plain transformers, whatever batch they were computed in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoModel

from gpumarket.core.errors import ConfigError, EngineFailed, ProtocolError
from gpumarket.node.engine import embed
from gpumarket.node.engine.base import EmbedRequest, GenerateRequest, Sampling
from gpumarket.node.engine.embed import EmbedEngine
from gpumarket.node.engine.encoder import batches_by_length, read_recipe
from gpumarket.node.models.minilm import minilm_path

TEXTS = [
    "a red fox",
    "ein roter Fuchs",
    "The market pays for what was promised, and for nothing else.",
    "word " * 120,
    "GPU",
    "Why is the sky blue? " * 6,
]


def token_ids(texts: list[str]) -> tuple[tuple[int, ...], ...]:
    tokenizer = Tokenizer.from_file(str(minilm_path() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    return tuple(tuple(tokenizer.encode(text).ids) for text in texts)


@pytest.fixture(scope="module")
def plain() -> NDArray[np.float32]:
    """One text at a time: mean over its token states, divided by the norm."""
    torch.set_num_threads(1)
    model = AutoModel.from_pretrained(minilm_path(), dtype=torch.float32)
    with torch.inference_mode():
        rows = [model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in token_ids(TEXTS)]
        return torch.stack([row / row.norm() for row in rows]).numpy()


@pytest.fixture
async def engine() -> AsyncIterator[EmbedEngine]:
    torch.set_num_threads(1)
    made = EmbedEngine(minilm_path(), window=4, batch_tokens=512)
    await made.start()
    yield made
    await made.close()


async def vectors(engine: EmbedEngine, inputs: tuple[tuple[int, ...], ...]) -> NDArray[np.float32]:
    return np.concatenate([rows async for rows in engine.embed(EmbedRequest(inputs))])


async def test_embed_equals_plain_transformers(engine: EmbedEngine, plain: NDArray[np.float32]) -> None:
    found = await vectors(engine, token_ids(TEXTS))
    assert found.shape == (len(TEXTS), 384) and found.dtype == np.float32
    assert np.abs(found - plain).max() <= 1e-6


async def test_embed_does_not_depend_on_batch_or_company(engine: EmbedEngine) -> None:
    ids = token_ids(TEXTS)
    together = await vectors(engine, ids)
    alone = np.concatenate([await vectors(engine, (one,)) for one in ids])
    wide = EmbedEngine(minilm_path(), window=64, batch_tokens=100_000)
    await wide.start()
    in_one_batch, backwards = await asyncio.gather(vectors(wide, ids), vectors(wide, ids[::-1]))
    await wide.close()
    for other in (alone, in_one_batch, backwards[::-1]):
        assert np.abs(together - other).max() <= 1e-6


async def test_embed_in_bfloat16_is_outside_the_tolerance_of_float32(plain: NDArray[np.float32]) -> None:
    cheat = EmbedEngine(minilm_path(), compute_dtype="bfloat16")
    await cheat.start()
    found = await vectors(cheat, token_ids(TEXTS))
    await cheat.close()
    assert np.abs(found - plain).max(1).min() > 1e-4


async def test_slow_reader_holds_up_itself_alone(engine: EmbedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "UNREAD_ROWS_MAX", 32)
    many = EmbedRequest(((101, 102),) * 120)
    slow = engine.embed(many)
    got = len(await anext(slow))
    for _ in range(32):  # each turn of the other gives the slow one a turn as well
        await vectors(engine, ((101, 2003, 102),))
    assert int((await engine.stats())["texts"]) - 32 <= 32 + 2 * 4
    async for rows in slow:
        got += len(rows)
    assert got == 120


async def test_embed_closed_early_ends_its_work(engine: EmbedEngine) -> None:
    first = engine.embed(EmbedRequest(((101, 102),) * 5000))
    await anext(first)
    await first.aclose()
    assert len(await vectors(engine, ((101, 102),))) == 1
    stats = await engine.stats()
    assert stats["open"] == 0 and int(stats["texts"]) < 5000


@pytest.mark.parametrize(("ids", "message"), [((101,) * 257, "the model reads 256"), ((30_522,), "vocabulary"), ((-1,), "vocabulary")])
async def test_embed_input_that_does_not_fit_is_refused(engine: EmbedEngine, ids: tuple[int, ...], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        await vectors(engine, ((101, 102), ids))


@pytest.mark.parametrize("inputs", [(), ((),), ((1,), ())])
def test_embed_request_without_tokens_is_refused(inputs: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ProtocolError):
        EmbedRequest(inputs)


async def test_generate_on_an_encoder_is_refused(engine: EmbedEngine) -> None:
    asked = GenerateRequest((1,), 1, (), Sampling(0, 1, bytes(32)))
    with pytest.raises(ProtocolError, match="makes embeddings"):
        await anext(engine.generate(asked))
    with pytest.raises(ProtocolError, match="not replayed"):
        await engine.replay(asked, [1])


async def test_failing_batch_fails_its_calls_and_no_later_ones(engine: EmbedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine._encoder, "encode", broken)
        with pytest.raises(EngineFailed, match="RuntimeError"):
            await vectors(engine, ((101, 102),))
    assert len(await vectors(engine, ((101, 102),))) == 1


async def test_closed_engine_refuses_calls() -> None:
    engine = EmbedEngine(minilm_path())
    with pytest.raises(EngineFailed, match="not running"):
        await vectors(engine, ((101, 102),))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(16, 2000))
def test_batches_by_length_cover_all_texts_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(batches_by_length(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_recipe_of_minilm_is_mean_and_norm() -> None:
    recipe = read_recipe(minilm_path())
    assert (recipe.pooling, recipe.normalise, recipe.tokens_max) == ("mean", True, 256)


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "pooling max_tokens"),
        (["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "pooling"),
        (["Transformer", "Dense"], {}, "Dense"),
        (["Transformer"], {}, "no Pooling"),
    ],
)
def test_recipe_that_is_unknown_is_refused(tmp_path: Path, modules: list[str], pooling: dict[str, bool], message: str) -> None:
    rows = [{"idx": i, "path": "p", "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(modules)]
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "config.json").write_text(json.dumps(pooling))
    (tmp_path / "modules.json").write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match=message):
        read_recipe(tmp_path)


def test_recipe_path_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": "../../etc"}]))
    with pytest.raises(ConfigError, match="outside the model folder"):
        read_recipe(tmp_path)

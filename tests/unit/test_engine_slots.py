"""The slots engine gives each request what it would get alone, whatever else runs, and its replay tells honest from not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import SEED, request, small_llama
from transformers import AutoModelForCausalLM

from gpumarket.core.errors import Busy, ConfigError, EngineFailed, ProtocolError
from gpumarket.node.engine.base import EmbedRequest, GenerateRequest, Segment
from gpumarket.node.engine.slots import SlotEngine


@pytest.fixture
async def engine() -> AsyncIterator[SlotEngine]:
    made = SlotEngine(small_llama(), rows_max=4, queue_max=8, prefill_tokens=32, cache_tokens_max=4096)
    await made.start()
    yield made
    await made.close()


async def tokens(engine: SlotEngine, asked: GenerateRequest) -> list[int]:
    found: list[int] = []
    async for chunk in engine.generate(asked):
        found += chunk.tokens
    return found


# Short and long prompts (over the prefill size of 32), so that packing, pieces and rows that change places all happen.
MIXED = [(5, 20), (90, 12), (31, 3), (33, 30), (7, 1), (64, 9), (12, 25), (100, 5)]


async def test_generate_greedy_batch_is_token_identical_to_transformers(engine: SlotEngine) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(small_llama(), dtype=torch.float32)
    asked = [request(n, m, salt=i) for i, (n, m) in enumerate(MIXED)]
    outputs = await asyncio.gather(*(tokens(engine, r) for r in asked))
    for r, output in zip(asked, outputs, strict=True):
        ids = torch.tensor([r.prompt])
        alone = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=r.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert output == alone[0, len(r.prompt) :].tolist()


async def test_generate_sampled_batch_equals_each_alone_and_replays_to_zero(engine: SlotEngine) -> None:
    asked = [request(n, m, temperature=1000, top_p=950_000, salt=i) for i, (n, m) in enumerate(MIXED)]
    together = await asyncio.gather(*(tokens(engine, r) for r in asked))
    for r, output in zip(asked, together, strict=True):
        assert await tokens(engine, r) == output
        gaps = await engine.replay(r, output)
        assert gaps.shape == (len(output),) and gaps.max() < 1e-3
    assert len({tuple(o[:5]) for o in together}) > 1


async def test_generate_other_seed_gives_other_text(engine: SlotEngine) -> None:
    one = await tokens(engine, request(20, 30, temperature=1000))
    other = await tokens(engine, request(20, 30, temperature=1000, seed=bytes(32)))
    assert one != other


async def test_generate_stop_token_is_delivered_last(engine: SlotEngine) -> None:
    free = await tokens(engine, request(20, 12))
    stop = free[5]
    chunks = [chunk async for chunk in engine.generate(request(20, 12, stop=(stop,)))]
    got = [token for chunk in chunks for token in chunk.tokens]
    assert got == free[: free.index(stop) + 1]
    assert [c.finish_reason for c in chunks][-1] == "stop" and all(c.finish_reason == "" for c in chunks[:-1])


async def test_generate_from_prefix_continues_the_same_text(engine: SlotEngine) -> None:
    whole = request(20, 16, temperature=1000)
    full = await tokens(engine, whole)
    assert await tokens(engine, replace(whole, prefix=tuple(full[:6]))) == full[6:]


async def test_replay_of_two_attempts_needs_both_seeds(engine: SlotEngine) -> None:
    first = request(20, 24, temperature=1000)
    head = (await tokens(engine, first))[:10]
    second = request(20, 24, temperature=1000, seed=bytes(32), prefix=tuple(head))
    output = head + await tokens(engine, second)
    honest = await engine.replay(first, output, [Segment(0, SEED), Segment(10, bytes(32))])
    assert honest.max() < 1e-3
    one_seed = await engine.replay(first, output)
    assert one_seed[:10].max() < 1e-3 and (one_seed[10:] > 0.1).mean() > 0.3


@pytest.mark.parametrize("segments", [[Segment(1, SEED)], [Segment(0, SEED), Segment(0, SEED)]])
async def test_replay_with_disordered_segments_is_refused(engine: SlotEngine, segments: list[Segment]) -> None:
    with pytest.raises(ProtocolError, match="start at"):
        await engine.replay(request(5, 4), [10, 11], segments)


@pytest.mark.parametrize("output", [[], [10] * 5, [10, 600], [-1]])
async def test_replay_of_impossible_output_is_refused(engine: SlotEngine, output: list[int]) -> None:
    with pytest.raises(ProtocolError):
        await engine.replay(request(5, 4), output)


async def test_replay_of_other_model_or_prompt_has_large_gaps(engine: SlotEngine) -> None:
    cheat = SlotEngine(small_llama(1))
    await cheat.start()
    asked = request(40, 60, temperature=1000)
    other_model = await engine.replay(asked, await tokens(cheat, asked))
    changed = replace(asked, prompt=(*asked.prompt[:2], asked.prompt[2] + 1, *asked.prompt[3:]))
    other_prompt = await engine.replay(asked, await tokens(engine, changed))
    await cheat.close()
    assert (other_model > 0.1).mean() > 0.5
    assert (other_prompt > 0.1).mean() > 0.15


async def test_replay_of_lower_precision_is_between_honest_and_gross(engine: SlotEngine) -> None:
    cheat = SlotEngine(small_llama(), compute_dtype="bfloat16")
    await cheat.start()
    asked = request(40, 120, temperature=1000)
    gaps = await engine.replay(asked, await tokens(cheat, asked))
    await cheat.close()
    assert 1e-5 < np.minimum(gaps, 2).mean() < 0.05
    assert (gaps > 0.1).mean() < 0.15


async def test_generate_closed_early_frees_its_row_and_leaves_others_alone(engine: SlotEngine) -> None:
    alone = await tokens(engine, request(10, 40, salt=3))
    doomed = [engine.generate(request(9, 900, salt=i)) for i in range(4)]  # all rows, for a long time
    for generation in doomed:
        await anext(generation)
    waiting = asyncio.create_task(tokens(engine, request(10, 40, salt=3)))
    for generation in doomed:
        await generation.aclose()
    assert await waiting == alone
    stats = await engine.stats()
    assert stats["running"] == 0 and stats["open"] == 0
    assert int(stats["tokens_out"]) < 4 * 900


async def test_generate_over_the_queue_is_busy(engine: SlotEngine) -> None:
    open_calls = [asyncio.create_task(tokens(engine, request(10, 200, salt=i))) for i in range(12)]
    await asyncio.sleep(0)
    with pytest.raises(Busy) as refused:
        await tokens(engine, request(10, 2))
    assert refused.value.retryable
    await asyncio.gather(*open_calls)
    assert len(await tokens(engine, request(10, 2))) == 2


async def test_slow_reader_gets_everything_in_few_chunks(engine: SlotEngine) -> None:
    generation = engine.generate(request(10, 200))
    first = await anext(generation)
    while (await engine.stats())["running"]:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    rest = [chunk async for chunk in generation]
    assert len(first.tokens) + sum(len(c.tokens) for c in rest) == 200
    assert len(rest) <= 2 and rest[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [((request(10, 4090)), "the model serves"), (replace(request(3, 4), prompt=(1, 600)), "outside the vocabulary")],
)
async def test_request_that_does_not_fit_is_refused(engine: SlotEngine, wrong: GenerateRequest, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        await tokens(engine, wrong)
    with pytest.raises(ProtocolError, match=message):
        await engine.replay(wrong, [10])


@pytest.mark.parametrize("wrong", [{"prompt": ()}, {"max_tokens": 0}, {"prefix": (7, 8), "max_tokens": 2}, {"stop_tokens": (1,) * 65}])
def test_malformed_request_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        replace(request(5, 4), **wrong)


async def test_embed_on_a_generator_is_refused(engine: SlotEngine) -> None:
    with pytest.raises(ProtocolError, match="generates text"):
        await anext(engine.embed(EmbedRequest(((1,),))))


async def test_failing_pass_fails_open_calls_and_no_later_ones(engine: SlotEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = engine._decoder
    assert decoder is not None
    model = decoder.model
    generation = engine.generate(request(10, 900))
    await anext(generation)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of something")

    decoder.model = broken
    with pytest.raises(EngineFailed, match="RuntimeError"):
        async for _ in generation:
            pass
    decoder.model = model
    assert len(await tokens(engine, request(10, 5))) == 5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_broken_thread_fails_open_calls_and_says_so_from_then_on(engine: SlotEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = engine.generate(request(10, 900))
    await anext(generation)

    def bug(_: int) -> None:
        raise KeyError("a bug of ours")

    monkeypatch.setattr(engine._decoder, "cancel", bug)
    other = engine.generate(request(10, 900, salt=1))
    await anext(other)
    await other.aclose()
    with pytest.raises(EngineFailed, match="KeyError"):
        async for _ in generation:
            pass
    with pytest.raises(EngineFailed, match="not running"):
        await tokens(engine, request(5, 2))


async def test_closed_engine_fails_open_and_new_calls() -> None:
    engine = SlotEngine(small_llama())
    with pytest.raises(EngineFailed, match="not running"):
        await tokens(engine, request(5, 2))
    await engine.start()
    generation = engine.generate(request(10, 900))
    await anext(generation)
    await engine.close()
    await engine.close()
    with pytest.raises(EngineFailed, match="closed"):
        async for _ in generation:
            pass
    with pytest.raises(EngineFailed, match="not running"):
        await engine.stats()


async def test_long_prompt_does_not_stall_running_rows(engine: SlotEngine) -> None:
    """While a prompt of 50 passes is prefilled, a running row draws a token after each of them."""
    running = engine.generate(request(8, 900))
    await anext(running)
    long = asyncio.create_task(tokens(engine, request(1600, 2)))
    drawn = 0
    while not long.done():
        drawn += len((await anext(running)).tokens)
    await running.aclose()
    assert drawn >= 40


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pkl", "modeling_evil.py", "weights.pt"])
async def test_folder_with_files_that_could_run_is_refused(tmp_path: Path, name: str) -> None:
    copy = copied_model(tmp_path)
    (copy / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match="may run code"):
        await SlotEngine(copy).start()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
async def test_folder_whose_config_names_code_is_refused(tmp_path: Path, file: str) -> None:
    copy = copied_model(tmp_path)
    (copy / file).write_text('{"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "model_type": "llama"}')
    with pytest.raises(ConfigError, match="auto_map"):
        await SlotEngine(copy).start()


async def test_sliding_window_model_is_refused(tmp_path: Path) -> None:
    copy = copied_model(tmp_path)
    text = (copy / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "mistral", "sliding_window": 16')
    (copy / "config.json").write_text(text)
    with pytest.raises(EngineFailed, match="full attention"):
        await SlotEngine(copy).start()


def copied_model(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    target.mkdir()
    for file in small_llama().iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target

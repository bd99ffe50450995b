"""The slots engine against sequential generation and the continuous batching of transformers: useful tokens per CPU-second.

32 greedy requests at once, prompts of 16-96 tokens, outputs of 8-96, a random Llama of 28M parameters, one torch thread. CPU time of the
process is what is compared: it is steady where wall time is not. The three are run in turn and the best round of each counts.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from gpumarket.node.engine.base import GenerateRequest, Sampling
from gpumarket.node.engine.decoder import SlotDecoder
from gpumarket.node.engine.loading import load_decoder

REQUESTS = 32
ROUNDS = 3
VOCABULARY = 4096

Requests = list[tuple[list[int], int]]
Outputs = list[list[int]]


def run() -> list[dict[str, object]]:
    """Rows (name, value, unit, compared_with). AssertionError when the three do not give the same tokens."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        model = load_decoder(Path(folder), "float32")
    model.generation_config.eos_token_id = None
    requests = make_requests()
    run_slots(model, requests[:4])  # warm up
    runners: dict[str, Callable[[Any, Requests], Outputs]] = {
        "slots": run_slots,
        "sequential": run_sequential,
        "hf_cb": run_transformers_batching,
    }
    best = dict.fromkeys(runners, 0.0)
    useful = sum(count for _, count in requests)
    outputs: dict[str, Outputs] = {}
    for _ in range(ROUNDS):
        for name, runner in runners.items():
            before = time.process_time()
            outputs[name] = runner(model, requests)
            best[name] = max(best[name], useful / (time.process_time() - before))
    assert outputs["slots"] == outputs["sequential"], "the slots engine changed the text"
    return [
        row("slots_tokens_per_cpu_s", best["slots"], "tokens/CPU-s", f"{REQUESTS} greedy requests, 28M Llama, 1 thread"),
        row("slots_ratio_to_sequential", best["slots"] / best["sequential"], "ratio", "model.generate, one request after another"),
        row("slots_ratio_to_hf_cb", best["slots"] / best["hf_cb"], "ratio", "continuous batching of transformers"),
    ]


def row(name: str, value: float, unit: str, compared_with: str) -> dict[str, object]:
    return {"name": name, "value": round(value, 3), "unit": unit, "compared_with": compared_with}


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_requests() -> Requests:
    rng = random.Random(1)
    return [([rng.randrange(VOCABULARY) for _ in range(rng.randint(16, 96))], rng.choice([8, 16, 32, 64, 96])) for _ in range(REQUESTS)]


def run_slots(model: Any, requests: Requests) -> Outputs:
    decoder = SlotDecoder(model, rows_max=REQUESTS, cache_tokens_max=32_768, prefill_tokens=512)
    for key, (prompt, count) in enumerate(requests):
        decoder.submit(key, GenerateRequest(tuple(prompt), count, (), Sampling(0, 1_000_000, bytes(32))))
    outputs: Outputs = [[] for _ in requests]
    while not decoder.idle:
        for emission in decoder.step():
            outputs[emission.key].append(emission.token)
    return outputs


@torch.inference_mode()
def run_sequential(model: Any, requests: Requests) -> Outputs:
    outputs = []
    for prompt, count in requests:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        outputs.append(made[0, len(prompt) :].tolist())
    return outputs


def run_transformers_batching(model: Any, requests: Requests) -> Outputs:
    configuration: Any = GenerationConfig
    generation = configuration(max_new_tokens=96, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(page_size=32, num_blocks=512, max_batch_tokens=512, max_requests_per_batch=REQUESTS)
    outputs: dict[int, list[int]] = {}
    with model.continuous_batching_context_manager(generation_config=generation, continuous_batching_config=batching) as running:
        for key, (prompt, count) in enumerate(requests):
            running.add_request(prompt, request_id=str(key), max_new_tokens=count)
        while len(outputs) < len(requests):
            result = running.get_result(timeout=1)
            if result is not None and result.is_finished():
                outputs[int(result.request_id)] = result.generated_tokens
            if not running.is_running():
                raise RuntimeError("the batching of transformers stopped by itself")
    return [outputs[key] for key in range(len(requests))]


if __name__ == "__main__":
    for line in run():
        print(line)

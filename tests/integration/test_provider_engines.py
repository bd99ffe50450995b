"""A provider with its real engine processes: a sentence encoder and a small Llama, served over TLS."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from node_fixtures import Job, embed_job, generate_job, text_hash
from provider_market import provider_at, until

from gpumarket.core.errors import ConfigError, UnknownModel
from gpumarket.core.terms import Outcome, Task, sampling_seed
from gpumarket.core.units import Hash, hex0x
from gpumarket.node.engine.process import EngineProcess
from gpumarket.node.models.minilm import minilm_path
from gpumarket.node.models.store import ModelStore
from gpumarket.node.provider import Stock
from gpumarket.node.settings import ModelSetting
from gpumarket.node.stock import default_engine_factory, open_stock
from gpumarket.settlement.verification import Verdict, decide_text, profile_for
from gpumarket.v1 import terms_pb2 as terms

SENTENCES = ((101, 1037, 2417, 4419, 102), (101, 7592, 2088, 102), (101, 7592, 102))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """Both models, taken in as an owner would."""
    root = tmp_path_factory.mktemp("models")
    llama = root / "llama-source"
    subprocess.run([sys.executable, "-m", "gpumarket.node.models.tiny_llama", str(llama)], check=True, timeout=150)
    store = ModelStore(root / "store")
    text = store.add(llama, "tiny-llama", task=Task.GENERATE, dtype="float32", licence="Apache-2.0", max_input_tokens=512)
    vectors = store.add(minilm_path(), "minilm", task=Task.EMBED, dtype="float32", licence="Apache-2.0", max_input_tokens=256, link=False)
    store.set_alias("tiny-llama", text.digest)
    store.set_alias("minilm", vectors.digest)
    return store


def stock(store: ModelStore, name: str) -> Stock:
    (entry,) = open_stock(store, [ModelSetting(model=name)])
    return entry


def serving(folder: Path, entry: Stock, **settings: Any) -> Any:
    folders = {entry.model.manifest.digest: entry.folder}
    return provider_at(folder, entry.model, factory=default_engine_factory, folders=folders, credit="1", **settings)


def test_stock_names_models_by_alias_or_digest_and_refuses_the_rest(store: ModelStore) -> None:
    entry = stock(store, "minilm")
    assert entry.warm
    assert entry.model.profile == profile_for(Task.EMBED, "float32").digest
    assert not stock(store, "tiny-llama").warm
    assert stock(store, hex0x(entry.model.manifest.digest)).model == entry.model
    with pytest.raises(UnknownModel):
        stock(store, "nothing")
    with pytest.raises(UnknownModel):
        stock(store, "0x12")
    with pytest.raises(ConfigError, match="twice"):
        open_stock(store, [ModelSetting(model="minilm"), ModelSetting(model=hex0x(entry.model.manifest.digest))])
    with pytest.raises(ConfigError, match="nothing to sell"):
        open_stock(store, [])


async def test_provider_embeds_with_the_real_encoder(store: ModelStore, tmp_path: Path) -> None:
    entry = stock(store, "minilm")
    async with serving(tmp_path, entry) as running:
        job = embed_job(entry.model, SENTENCES, now=int(time.time()))
        talk = await running.attempt(job).open()
        receipt = await talk.read_finished()
        rows = np.stack([np.frombuffer(item, "<f4") for item in talk.items])
        assert rows.shape == (3, 384)
        assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        assert rows[1] @ rows[2] > rows[0] @ rows[2]
        assert (receipt.outcome, receipt.output_units) == (Outcome.COMPLETED, 12)


async def test_provider_generates_what_its_own_check_confirms_and_survives_its_engine(store: ModelStore, tmp_path: Path) -> None:
    entry = stock(store, "tiny-llama")
    async with serving(tmp_path, entry) as running:
        body = terms.GenerateRequest(prompt=[5, 6, 7], max_tokens=64, temperature_milli=1000, top_p_ppm=1_000_000)
        job = Job(entry.model, Task.GENERATE, body.SerializeToString(), 3, 64, 8, now=int(time.time()))
        talk = await running.attempt(job).open()
        while talk.finished is None:
            assert await talk.read() is not None
            if talk.units % 8 == 0 and talk.finished is None:
                await talk.ack()
        receipt = await talk.read_finished()
        assert receipt.output_hash == text_hash(talk.tokens)

        seed = sampling_seed(job.lease.struct_hash, Hash(talk.nonce))
        honest = await check(running, entry, body, talk.tokens, seed, b"honest")
        assert honest.verdict is Verdict.ACCEPTED
        forged = [(token + 1) % 1000 for token in talk.tokens]
        assert (await check(running, entry, body, forged, seed, b"forged")).verdict is Verdict.REJECTED

        seat = running.provider.engines.seats[entry.model.manifest.digest]
        engine = seat._engine
        assert isinstance(engine, EngineProcess)
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: not engine.running)
        again = await running.attempt(generate_job(entry.model, max_tokens=8, name=b"again", now=int(time.time()))).open()
        assert (await again.read_finished()).outcome is Outcome.COMPLETED


async def check(running: Any, entry: Stock, body: terms.GenerateRequest, output: list[int], seed: bytes, name: bytes) -> Any:
    """Buy a check of a text from the provider itself."""
    request = terms.CheckRequest(generate=body, output=output, segments=[terms.SeedSegment(start=0, seed=seed)])
    units = len(body.prompt) + len(output)
    job = Job(entry.model, Task.CHECK, request.SerializeToString(), units, units, 1_000, name=name, now=int(time.time()))
    talk = await running.attempt(job).open()
    await talk.read_finished()
    await talk.end()
    return decide_text(profile_for(Task.GENERATE, "float32"), talk.items[0])

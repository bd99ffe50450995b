"""A provider with its real engine processes: a sentence encoder and a small Llama, served over TLS."""

from __future__ import annotations

import asyncio
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
from provider_market import provider_at, refusal, until

from gpumarket.core.errors import ConfigError, UnknownModel
from gpumarket.core.seeds import drawing_seed
from gpumarket.core.terms import Outcome, Task, sampling_seed, token_item
from gpumarket.core.units import Hash, hex0x
from gpumarket.node.engine.process import EngineProcess
from gpumarket.node.models.minilm import minilm_path
from gpumarket.node.models.store import ModelStore
from gpumarket.node.provider import Stock
from gpumarket.node.settings import ModelSetting
from gpumarket.node.stock import default_engine_factory, open_stock
from gpumarket.sdk.logprobs import logprobs_flaw, logprobs_of
from gpumarket.settlement.verification import Verdict, decide_text, profile_for
from gpumarket.v1 import provider_pb2 as pb
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


async def test_provider_draws_from_the_clients_seed_whoever_leased_and_its_check_confirms_it(store: ModelStore, tmp_path: Path) -> None:
    entry = stock(store, "tiny-llama")
    body = terms.GenerateRequest(prompt=[5, 6, 7], max_tokens=64, temperature_milli=1000, top_p_ppm=900_000, client_seed=-7)
    async with serving(tmp_path, entry) as running:
        first, second = [await text_of(running, entry, body, name) for name in (b"first", b"second")]
        assert first.nonce != second.nonce
        assert first.tokens == second.tokens
        seed = drawing_seed(body, first.job.lease.struct_hash, Hash(first.nonce))
        assert (await check(running, entry, body, first.tokens, seed, b"check")).verdict is Verdict.ACCEPTED
        leased = sampling_seed(first.job.lease.struct_hash, Hash(first.nonce))
        assert (await check(running, entry, body, first.tokens, leased, b"wrong")).verdict is Verdict.REJECTED
        body.client_seed = 8
        assert (await text_of(running, entry, body, b"other")).tokens != first.tokens


async def test_provider_attempt_that_goes_on_elsewhere_continues_under_the_clients_seed(store: ModelStore, tmp_path: Path) -> None:
    """Positions are absolute and the seed is one: the joined text is the text that one provider alone would have given."""
    entry = stock(store, "tiny-llama")
    body = terms.GenerateRequest(prompt=[5, 6, 7], max_tokens=32, temperature_milli=1000, top_p_ppm=1_000_000, client_seed=3)
    async with serving(tmp_path, entry) as running:
        whole = (await text_of(running, entry, body, b"whole")).tokens
        begun: dict[str, Any] = {"prefix": tuple(whole[:13]), "prefix_units": 13, "prefix_hash": text_hash(whole[:13]), "attempt": 2}
        job = Job(entry.model, Task.GENERATE, body.SerializeToString(), 3, 32, 64, now=int(time.time()), **begun)
        talk = await running.attempt(job).open()
        await talk.read_finished()
        assert talk.tokens == whole[13:]


async def test_provider_tells_logprobs_beside_its_tokens(store: ModelStore, tmp_path: Path) -> None:
    entry = stock(store, "tiny-llama")
    body = terms.GenerateRequest(prompt=[5, 6, 7], max_tokens=24, temperature_milli=1000, top_p_ppm=1_000_000, client_seed=3)
    async with serving(tmp_path, entry) as running:
        plain = await text_of(running, entry, body, b"plain")
        assert not any(frame.logprobs for frame in plain.frames)
        body.top_logprobs = 4
        told = await text_of(running, entry, body, b"told")
        assert told.tokens == plain.tokens, "who asks for logprobs gets the same text"
        for frame in told.frames:
            items = [token_item(token) for token in frame.tokens]
            assert logprobs_flaw(4, items, logprobs_of(frame)) == ""
        body.top_logprobs = 21
        refused = await refusal(running.attempt(Job(entry.model, Task.GENERATE, body.SerializeToString(), 3, 24, 8, now=int(time.time()))))
        assert "top_logprobs is 21" in refused.message


async def test_provider_told_to_stop_closes_the_engines_call(store: ModelStore, tmp_path: Path) -> None:
    """From the client's word, and from its hanging up, to an engine process that has no call open; how long it took is told."""
    entry = stock(store, "tiny-llama")
    async with serving(tmp_path, entry) as running:
        for how in ("cancel", "hang up"):
            job = generate_job(entry.model, max_tokens=400, window=64, name=how.encode(), now=int(time.time()))
            talk = await running.attempt(job).open()
            await talk.read_units(2)
            engine = running.provider.engines.seats[entry.model.manifest.digest]._engine
            assert (await engine.stats())["open"] == 1
            began = time.monotonic()
            if how == "cancel":
                await talk.call.write(pb.InferRequest(cancel=True))
            else:
                talk.call.cancel()
            async with asyncio.timeout(20):
                while (await engine.stats())["open"]:  # noqa: ASYNC110  another process
                    await asyncio.sleep(0.005)
            print(f"{how}: {time.monotonic() - began:.3f} s to a closed call")
            assert talk.units < 400
            if how == "cancel":
                receipt = await talk.read_finished()
                assert receipt.outcome is Outcome.CANCELLED
                assert receipt.output_units < 400


async def text_of(running: Any, entry: Stock, body: terms.GenerateRequest, name: bytes) -> Any:
    """A whole text, of a lease of its own."""
    job = Job(entry.model, Task.GENERATE, body.SerializeToString(), len(body.prompt), body.max_tokens, 64, name=name, now=int(time.time()))
    talk = await running.attempt(job).open()
    talk.frames = []
    while talk.finished is None:
        reply = await talk.read()
        assert reply is not None
        if reply.HasField("frame"):
            talk.frames.append(reply.frame)
    await talk.end()
    return talk


async def check(running: Any, entry: Stock, body: terms.GenerateRequest, output: list[int], seed: bytes, name: bytes) -> Any:
    """Buy a check of a text from the provider itself."""
    request = terms.CheckRequest(generate=body, output=output, segments=[terms.SeedSegment(start=0, seed=seed)])
    units = len(body.prompt) + len(output)
    job = Job(entry.model, Task.CHECK, request.SerializeToString(), units, units, 1_000, name=name, now=int(time.time()))
    talk = await running.attempt(job).open()
    await talk.read_finished()
    await talk.end()
    return decide_text(profile_for(Task.GENERATE, "float32"), talk.items[0])

"""What a provider counts while it serves, and how it finds out whether it could: real calls over TLS, scripted engines."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from node_fixtures import ScriptedEngine, embed_job, generate_job, on_sale, text_hash
from numpy.typing import NDArray
from provider_market import provider_at, refusal, scheduler_at, until

from gpumarket.core.terms import Task
from gpumarket.node import canary
from gpumarket.node.engine.base import EmbedRequest
from gpumarket.node.readiness import _engine_trouble, _own_trouble
from gpumarket.node.tables import attempts

TEXT, VECTORS = on_sale(Task.GENERATE), on_sale(Task.EMBED)


async def test_provider_counts_tokens_first_output_and_outcome_of_a_job(tmp_path: Path) -> None:
    first: list[float] = []
    async with provider_at(tmp_path, TEXT) as running:
        tally, model = running.provider.tally, TEXT.manifest.digest
        tally.on_first = lambda seen, seconds: first.append(seconds) if seen == model else None
        talk = await running.attempt(generate_job(TEXT, now=int(time.time()), max_tokens=8)).open()
        await talk.read_finished()
        await talk.ack(8, text_hash(range(8)), complete=True)
        assert await talk.read() is None
        assert (tally.tokens[model], dict(tally.attempts), len(first)) == (8, {"completed": 1}, 1)
        assert tally.prompt_tokens[model] > 0
        await until(lambda: running.provider.accounts.sums["due"] > 0)


async def test_provider_counts_claims_by_their_answer(tmp_path: Path) -> None:
    async with scheduler_at(tmp_path / "scheduler") as (_, node), provider_at(tmp_path, VECTORS, scheduler=node, run=True) as running:
        talk = await running.attempt(embed_job(VECTORS, now=int(time.time()))).open()
        receipt = await talk.read_finished()
        await talk.ack(receipt.output_units, receipt.output_hash, complete=True)
        await until(lambda: running.provider.claims.settled["owed"] == 1)
        sums = running.provider.accounts.sums
        assert sums["owed"] == sums["vouchered"] > 0
        assert (sums["due"], sums["held"], sums["short"]) == (0, 0, 0)


async def test_provider_counts_refusals_by_code(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        strange = embed_job(VECTORS, now=int(time.time()))
        assert (await refusal(running.attempt(strange))).code == "unknown_model"
        assert dict(running.provider.tally.refusals) == {"unknown_model": 1}


# --- canaries ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [TEXT, VECTORS], ids=["text", "vectors"])
async def test_canary_is_a_real_job_that_nobody_pays_and_that_takes_no_slot(tmp_path: Path, model: Any) -> None:
    async with provider_at(tmp_path, model) as running:
        seat = running.provider.engines.seats[model.manifest.digest]
        assert await canary.trouble_with(seat) == ""
        assert seat.warm and (seat.running, seat.waiting) == (0, 0)
        assert running.journal.read(lambda c: c.execute(attempts.select()).all()) == []
        assert running.provider.accounts.sums["due"] == 0
        assert running.provider.tally.tokens == {}


async def test_canary_of_an_engine_that_fails_says_so(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        running.engines[TEXT.manifest.name].alive = False
        trouble = await canary.trouble_with(running.provider.engines.seats[TEXT.manifest.digest])
        assert trouble == "a canary job failed (engine_failed)"


async def test_canary_that_is_not_answered_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "ANSWER_SECONDS", 0.05)
    async with provider_at(tmp_path, TEXT) as running:
        engine = running.engines[TEXT.manifest.name]
        engine.gate.clear()
        assert "was not done" in await canary.trouble_with(running.provider.engines.seats[TEXT.manifest.digest])
        await until(lambda: engine.jobs == 0)  # what was begun for it ends with it


class Nonsense(ScriptedEngine):
    """Answers with numbers that are none."""

    async def embed(self, request: EmbedRequest) -> AsyncIterator[NDArray[np.float32]]:
        yield np.array([[np.nan]], dtype=np.float32)


async def test_canary_whose_answer_is_no_vector_says_so(tmp_path: Path) -> None:
    async with provider_at(tmp_path, VECTORS, factory=lambda *_: Nonsense("embed")) as running:
        assert await canary.trouble_with(running.provider.engines.seats[VECTORS.manifest.digest]) == "a canary job gave no vector"


async def test_canary_waits_for_nobody_where_every_slot_is_taken_by_paying_work(tmp_path: Path) -> None:
    full = replace(TEXT, slots=1)
    async with provider_at(tmp_path, full) as running:
        engine, seat = running.engines[full.manifest.name], running.provider.engines.seats[full.manifest.digest]
        engine.gate.clear()
        await running.attempt(generate_job(full, now=int(time.time()))).open()
        await until(lambda: (seat.running, engine.jobs) == (1, 1))
        assert await canary.trouble_with(seat) == ""
        assert engine.jobs == 1, "the paying work is the canary"
        seat.heard_at -= canary.SILENT_SECONDS + 1
        assert "nothing came for" in await canary.trouble_with(seat)
        engine.gate.set()


async def test_readiness_leaves_an_engine_cold_that_waits_for_its_first_job(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        assert await _engine_trouble(running.provider, TEXT.manifest.digest) == ""
        assert running.engines[TEXT.manifest.name].starts == 0
        assert running.provider.tally.canaries == {}


async def test_readiness_tries_an_engine_that_runs_and_counts_it(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        digest = TEXT.manifest.digest
        await running.provider.engines.warm_up([digest])
        assert await _engine_trouble(running.provider, digest) == ""
        running.engines[TEXT.manifest.name].alive = False
        assert await _engine_trouble(running.provider, digest) != ""
        assert dict(running.provider.tally.canaries) == {"ok": 1, "failed": 1}


async def test_readiness_is_refused_while_the_provider_drains(tmp_path: Path) -> None:
    async with provider_at(tmp_path, TEXT) as running:
        assert await _own_trouble(running.provider) == ""
        running.provider.service.draining = True
        assert await _own_trouble(running.provider) != ""

"""What a panel member asks of its engine: this attempt's inputs, or the whole text under this attempt's seed, and nothing partial back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest
from dispute_kit import DOMAIN, Deal, seed_of
from node_fixtures import ScriptedEngine, manifest
from numpy.typing import NDArray

from gpumarket.core.errors import EngineFailed, NotDisputable, ProtocolError
from gpumarket.core.signing import LocalKey
from gpumarket.core.terms import Task
from gpumarket.node.engine.base import EmbedRequest, GenerateRequest, Segment
from gpumarket.node.panel.recompute import recompute, work_of
from gpumarket.node.work import EmbedWork, ReplayWork
from gpumarket.settlement.verification import open_evidence

CLIENT, SCHEDULER, PROVIDER = (LocalKey(bytes([i]) * 32) for i in range(1, 4))
EMBED, TEXT = manifest(Task.EMBED), manifest(Task.GENERATE, max_input_tokens=64)
ROW = np.array([1.0, 2.0], dtype="<f4").tobytes()


def deal(model: Any) -> Deal:
    return Deal(CLIENT, SCHEDULER, PROVIDER, model.digest)


def test_work_embeddings_are_this_attempts_inputs_only() -> None:
    opening = deal(EMBED).embed([[1, 2], [3], [4, 5]], [ROW, ROW], skip=1)
    assert work_of(open_evidence(DOMAIN, opening), EMBED) == EmbedWork(EmbedRequest(((3,),)))


def test_work_text_is_replayed_whole_under_the_attempts_own_seed() -> None:
    opening = deal(TEXT).text([1, 2, 3], [7, 8, 9], skip=1)
    work = work_of(open_evidence(DOMAIN, opening), TEXT)
    assert isinstance(work, ReplayWork)
    assert (work.request.prompt, work.output, work.segments) == ((1, 2, 3), (7, 8, 9), (Segment(0, seed_of(opening)),))
    assert work.request.sampling.seed == seed_of(opening)


def test_work_result_of_another_task_than_the_models_refused() -> None:
    with pytest.raises(ProtocolError, match="cannot be disputed"):
        work_of(open_evidence(DOMAIN, deal(EMBED).embed([[1]], [ROW])), TEXT)


def test_work_text_drawn_from_its_clients_own_seed_refused() -> None:
    with pytest.raises(NotDisputable, match="client_seed"):
        work_of(open_evidence(DOMAIN, deal(TEXT).text([1, 2, 3], [7, 8, 9], client_seed=0)), TEXT)


def test_work_text_longer_than_the_model_takes_refused() -> None:
    with pytest.raises(ProtocolError, match="65 tokens"):
        work_of(open_evidence(DOMAIN, deal(TEXT).text([1, 2, 3], list(range(62)))), TEXT)


async def test_recompute_gives_a_row_for_each_input_and_gaps_for_the_text() -> None:
    rows = await recompute(work_of(open_evidence(DOMAIN, deal(EMBED).embed([[5], [6, 7]], [ROW, ROW])), EMBED), ScriptedEngine("embed"))
    assert [np.frombuffer(r, dtype="<f4").tolist() for r in rows] == [[1.0, 5.0, 0.5], [2.0, 6.0, 0.5]]
    gaps = await recompute(work_of(open_evidence(DOMAIN, deal(TEXT).text([1], [2, 3])), TEXT), ScriptedEngine("generate"))
    assert [len(item) for item in gaps] == [8]


async def test_recompute_engine_that_dies_in_the_middle_fails() -> None:
    engine = ScriptedEngine("embed")
    engine.alive = False
    with pytest.raises(EngineFailed):
        await recompute(work_of(open_evidence(DOMAIN, deal(EMBED).embed([[5]], [ROW])), EMBED), engine)


class _Stutters(ScriptedEngine):
    async def embed(self, request: EmbedRequest) -> AsyncIterator[NDArray[np.float32]]:
        yield np.ones((len(request.inputs) - 1, 2), dtype=np.float32)

    async def replay(self, request: GenerateRequest, output: Sequence[int], segments: Sequence[Segment] = ()) -> NDArray[np.float32]:
        return np.zeros(len(output) - 1, dtype=np.float32)


@pytest.mark.parametrize("task", ["embed", "generate"])
async def test_recompute_engine_that_leaves_something_out_fails(task: str) -> None:
    model = EMBED if task == "embed" else TEXT
    opening = deal(EMBED).embed([[5], [6]], [ROW, ROW]) if task == "embed" else deal(TEXT).text([1], [2, 3])
    with pytest.raises(EngineFailed):
        await recompute(work_of(open_evidence(DOMAIN, opening), model), _Stutters(task))

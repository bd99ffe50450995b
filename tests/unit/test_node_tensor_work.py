"""Tensor jobs at a provider: what is admitted, what is left of one that another provider began, and a whole one over the wire."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from node_fixtures import CHANNEL, NOW, Channel, Job, house, on_sale, tensor_job, tensor_model, tensor_request
from provider_market import provider_at

from gpumarket.core.errors import EngineFailed, ProtocolError
from gpumarket.core.tensor_requests import TensorRequest, to_proto
from gpumarket.core.tensors import TensorSpec, encode_item
from gpumarket.core.terms import Outcome, Task, keccak256, output_chain
from gpumarket.core.units import Hash
from gpumarket.node.admission import Admitted, admit
from gpumarket.node.attempt import Ended, Produced
from gpumarket.node.work import InferWork, run
from gpumarket.v1 import terms_pb2 as terms

MODEL = tensor_model()
NONCE = Hash(keccak256(b"nonce"))


def judge(job: Job) -> Admitted:
    return admit(job.open(), house(job.model), {CHANNEL: Channel()}, NONCE, NOW)


def asked(job: Job) -> TensorRequest:
    work = judge(job).work
    assert isinstance(work, InferWork)
    return work.request


def test_admission_of_an_honest_tensor_job_passes() -> None:
    assert asked(tensor_job(MODEL, 5)) == tensor_request(5)


def test_admission_of_a_continued_tensor_job_takes_the_rows_that_are_left() -> None:
    job = tensor_job(MODEL, 5, attempt=2, prefix_units=3, prefix_hash=Hash(b"\5" * 32))
    assert asked(job) == tensor_request(5).take([3, 4])


@pytest.mark.parametrize(
    ("job", "match"),
    [
        (tensor_job(MODEL, 5, prompt_units=4), "rows"),
        (tensor_job(MODEL, 5, max_output_units=6), "rows"),
        (tensor_job(MODEL, 5, prefix_units=5), "nothing is left"),
        (tensor_job(MODEL, 600), "512 at a time"),
        (tensor_job(MODEL, 5, window=5_000), "window"),
        (tensor_job(replace(MODEL, signature=None), 5), "takes no tensors"),
        (tensor_job(on_sale(Task.EMBED), 5), "does not go with"),
        (tensor_job(MODEL, 5, request=b"\xff" * 9), "TensorRequest"),
        (tensor_job(MODEL, 5, request=terms.TensorRequest(rows=5).SerializeToString()), "input"),
    ],
)
def test_admission_of_a_tensor_job_that_does_not_fit_is_refused(job: Job, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        judge(job)


def test_admission_of_tensors_that_the_model_does_not_take_is_refused() -> None:
    assert MODEL.signature is not None
    other = replace(MODEL, signature=replace(MODEL.signature, inputs=(TensorSpec("x", "FP64", (-1, 2)),)))
    with pytest.raises(ProtocolError, match="takes FP64"):
        judge(tensor_job(other, 5))


def test_admission_of_a_check_of_tensors_gives_its_rows() -> None:
    drawn = tensor_request(5).take([1, 4])
    check = terms.CheckRequest(infer=to_proto(drawn)).SerializeToString()
    assert asked(tensor_job(MODEL, 5, task=Task.CHECK, request=check, prompt_units=2, max_output_units=2)) == drawn
    both = terms.CheckRequest(infer=to_proto(drawn), embed=terms.EmbedRequest())
    with pytest.raises(ProtocolError, match="exactly one"):
        judge(tensor_job(MODEL, 5, task=Task.CHECK, request=both.SerializeToString(), prompt_units=2, max_output_units=2))


class Scripted:
    """Gives these batches, whatever was asked."""

    def __init__(self, *batches: tuple[np.ndarray, ...]) -> None:
        self.batches = batches

    async def infer(self, _: TensorRequest):  # type: ignore[no-untyped-def]
        for batch in self.batches:
            yield batch


async def test_engine_that_leaves_rows_out_or_gives_too_many_fails_the_job() -> None:
    two = (np.zeros(2, np.float32), np.zeros(2, np.int64))
    for batches in ((two,), (two, two), ()):
        with pytest.raises(EngineFailed):
            [event async for event in run(InferWork(tensor_request(3)), Scripted(*batches))]  # type: ignore[arg-type]
    events = [event async for event in run(InferWork(tensor_request(4)), Scripted(two, two))]  # type: ignore[arg-type]
    assert [type(event) for event in events] == [Produced, Produced, Ended]


async def test_service_serves_tensors_window_by_window_and_signs_a_receipt(tmp_path: Path) -> None:
    async with provider_at(tmp_path, MODEL) as running:
        talk = await running.attempt(tensor_job(MODEL, 20, window=8, now=int(time.time()))).open()
        while talk.finished is None:
            assert await talk.read() is not None
            if talk.finished is None and talk.units % 8 == 0:
                await talk.ack(talk.units, output_chain(talk.items))
        receipt = await talk.read_finished()
        await talk.ack(20, receipt.output_hash, complete=True)
        assert await talk.read() is None
    expected = [encode_item([np.array(2 * i, np.float32), np.array(2 * i)]) for i in range(20)]
    assert talk.items == expected
    assert (receipt.output_units, receipt.output_hash, receipt.outcome) == (20, output_chain(expected), Outcome.COMPLETED)

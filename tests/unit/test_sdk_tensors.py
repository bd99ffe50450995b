"""From arrays to a request, by the signature in verified files: what fits goes, and what would change a number does not."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from gpumarket.core import tensor_requests
from gpumarket.core.errors import ConfigError
from gpumarket.core.tensors import SIGNATURE_FILE, Signature, TensorSpec, encode_item, signature_to_json
from gpumarket.core.terms import JobSpec, ManifestFile, ModelManifest, Task, keccak256
from gpumarket.core.units import Address, Hash, Money
from gpumarket.sdk.frames import accept_items
from gpumarket.sdk.lock import LockedModel
from gpumarket.sdk.model_files import LoadedModel, ModelFiles
from gpumarket.sdk.ordering import plan_of
from gpumarket.sdk.tensors import tensor_body

SIGNATURE = Signature(
    (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("k", "UINT8", (-1,))),
    (TensorSpec("y", "FP32", (-1, 3)), TensorSpec("n", "INT64", (-1,))),
    True,
)


def loaded(signature: Signature | bytes = SIGNATURE, rows_max: int = 100) -> LoadedModel:
    raw = signature if isinstance(signature, bytes) else signature_to_json(signature)
    entry = ManifestFile(SIGNATURE_FILE, Hash(hashlib.sha256(raw).digest()), len(raw))
    manifest = ModelManifest("m", Task.INFER, "float32", "none", "MIT", rows_max, (entry,))
    return LoadedModel(LockedModel.of("m", manifest), ModelFiles(manifest, {SIGNATURE_FILE: raw}))


def spec_of(units: int) -> JobSpec:
    zero, nobody = Hash(bytes(32)), Address(b"\1" * 20)
    return JobSpec(nobody, nobody, keccak256(b"job"), Task.INFER, zero, zero, units, units, Money(1), zero, zero, 2_000_000_000)


def test_arrays_become_a_request_billed_by_its_rows() -> None:
    body = tensor_body(loaded(), {"k": [1, 2, 3], "x": np.zeros((3, 2))}, None)
    request = tensor_requests.from_bytes(body.request)
    assert (body.units, body.output_units, request.rows) == (3, 3, 3)
    assert {t.name: (t.datatype, t.shape) for t in request.inputs} == {"x": ("FP32", (3, 2)), "k": ("UINT8", (3,))}
    assert [s.name for s in request.outputs] == ["y", "n"]


def test_wanted_outputs_are_asked_for_in_their_order() -> None:
    body = tensor_body(loaded(), {"k": [1], "x": [[0.0, 1.0]]}, ["n"])
    assert [s.name for s in tensor_requests.from_bytes(body.request).outputs] == ["n"]


def test_arrays_that_are_not_contiguous_or_of_other_byte_order_are_sent_right() -> None:
    x = np.arange(6, dtype=">f4").reshape(2, 3).T
    body = tensor_body(loaded(), {"x": x, "k": np.zeros(3, np.uint8)}, None)
    sent = tensor_requests.from_bytes(body.request)
    np.testing.assert_array_equal({t.name: t.array for t in sent.inputs}["x"], [[0, 3], [1, 4], [2, 5]])


@pytest.mark.parametrize(
    ("inputs", "outputs", "told"),
    [
        ({"x": np.zeros((2, 2), np.float32)}, None, "'k' is missing"),
        ({"x": np.zeros((2, 3), np.float32), "k": [1, 2]}, None, "takes FP32"),
        ({"x": np.zeros((2, 2), np.float32), "k": [1, 2, 3]}, None, "first dimension"),
        ({"x": np.zeros((2, 2), np.float32), "k": [1, 300]}, None, "takes UINT8"),
        ({"x": np.zeros((2, 2), np.float32), "k": [1, -1]}, None, "takes UINT8"),
        ({"x": np.zeros((2, 2), np.float32), "k": [1.5, 2.0]}, None, "takes UINT8"),
        ({"x": [["a", "b"]], "k": [1]}, None, "takes FP32"),
        ({"x": [[1e300, 0.0]], "k": [1]}, None, "takes FP32"),
        ({"x": [[1.0], [1.0, 2.0]], "k": [1, 2]}, None, "no array"),
        ({"x": np.zeros((1, 2)), "k": [1], "z": [1]}, None, "no input 'z'"),
        ({"x": np.zeros((1, 2)), "k": [1]}, ["z"], "no output 'z'"),
        ({"x": np.zeros((1, 2)), "k": [1]}, [], "output"),
        ({}, None, "input"),
        ({"x": np.zeros((101, 2)), "k": np.zeros(101, np.uint8)}, None, "100 rows at a time"),
        ({"x": np.zeros((0, 2)), "k": np.zeros(0, np.uint8)}, None, "shape"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_before_anything_is_sent(inputs: dict[str, Any], outputs: list[str] | None, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        tensor_body(loaded(), inputs, outputs)


def test_large_integers_are_not_rounded_into_floats() -> None:
    model = loaded(Signature((TensorSpec("x", "FP32", (-1,)),), (TensorSpec("y", "FP32", (-1,)),), True))
    assert tensor_body(model, {"x": np.array([1, 2])}, None).units == 2
    with pytest.raises(ConfigError, match="takes FP32"):
        tensor_body(model, {"x": np.array([2**24 + 1])}, None)


def test_model_without_a_signature_that_can_be_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="signature"):
        tensor_body(loaded(b"{}"), {"x": [1]}, None)


def test_model_without_a_batch_dimension_is_one_unit() -> None:
    model = loaded(Signature((TensorSpec("x", "FP32", (2, 2)),), (TensorSpec("y", "FP32", (2, -1)),), False), rows_max=1)
    body = tensor_body(model, {"x": np.zeros((2, 2))}, None)
    assert (body.units, tensor_requests.from_bytes(body.request).rows) == (1, 0)


def test_frames_of_tensors_are_held_against_what_was_asked_for() -> None:
    body = tensor_body(loaded(), {"k": [1, 2], "x": np.zeros((2, 2))}, None)
    plan = plan_of(spec_of(2), body.request, 1)
    good = encode_item([np.zeros(3, np.float32), np.array(1)])
    assert accept_items(plan, 0, 0, [good, good]) == ""
    assert plan.completes(1, good) and not plan.completes(0, good)
    assert accept_items(plan, 0, 0, [encode_item([np.full(3, np.nan, np.float32), np.array(1)])]) == ""
    assert "missing" in accept_items(plan, 1, 0, [good, good])
    assert accept_items(plan, 0, 0, [encode_item([np.zeros(3, np.float32)])])
    assert accept_items(plan, 0, 0, [encode_item([np.zeros(2, np.float32), np.array(1)])])
    assert accept_items(plan, 0, 0, [good[:-1]])
    assert accept_items(plan, 0, 0, []) == "an empty frame"

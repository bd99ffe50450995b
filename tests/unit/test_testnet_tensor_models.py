"""The testnet's tensor models: they do what they are sold for, and the verification profile tells honest runs from cheap ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from gpumarket.core.tensors import encode_item
from gpumarket.node.models.onnx_file import read_onnx
from gpumarket.settlement.verification import INFER_FP32, decide_tensors
from gpumarket.testnet.plan import CARD_FRAUD, SHAPE_CLASSIFIER, TELEMETRY_ANOMALY
from gpumarket.testnet.tensor_models import (
    make_card_fraud,
    make_shape_classifier,
    make_telemetry_anomaly,
    payments,
    shapes,
    telemetry,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, onnx.ModelProto]:
    folder = tmp_path_factory.mktemp("models")
    make_shape_classifier(folder / "shapes.onnx")
    make_telemetry_anomaly(folder / "telemetry.onnx")
    make_card_fraud(folder / "payments.onnx")
    files = {SHAPE_CLASSIFIER: "shapes", TELEMETRY_ANOMALY: "telemetry", CARD_FRAUD: "payments"}
    return {name: onnx.load(folder / f"{file}.onnx") for name, file in files.items()}


def run(model: onnx.ModelProto, rows: NDArray[Any], *, batch: int = 1_000, threads: int = 1, fused: bool = True) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: rows[at : at + batch]}) for at in range(0, len(rows), batch)]
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def items(outputs: list[NDArray[Any]]) -> list[bytes]:
    return [encode_item([output[row] for output in outputs]) for row in range(len(outputs[0]))]


def cheapened(model: onnx.ModelProto) -> onnx.ModelProto:
    """Its weights in half precision."""
    cheap = onnx.ModelProto()
    cheap.CopyFrom(model)
    for weight in cheap.graph.initializer:
        array = numpy_helper.to_array(weight)
        weight.CopyFrom(numpy_helper.from_array(array.astype(np.float16).astype(np.float32), weight.name))
    return cheap


def test_classifier_names_more_than_nine_in_ten_shapes_right(models: dict[str, onnx.ModelProto]) -> None:
    images, labels = shapes(600, 12_345)
    scores, found = run(models[SHAPE_CLASSIFIER], images)
    assert (found == labels).mean() > 0.9
    np.testing.assert_array_equal(scores.argmax(axis=1), found)


def test_anomaly_score_finds_planted_failures_that_no_single_sensor_shows(models: dict[str, onnx.ModelProto]) -> None:
    readings, failing = telemetry(5_000, 999)
    _, flagged = run(models[TELEMETRY_ANOMALY], readings)
    assert flagged[failing].mean() > 0.95 and flagged[~failing].mean() < 0.02
    normal = readings[~failing]
    inside = (readings >= normal.min(axis=0)) & (readings <= normal.max(axis=0))
    assert inside[failing].all(axis=1).mean() > 0.9, "the plain range of each sensor would have shown it"


def test_fraud_score_finds_planted_frauds_better_than_any_single_column(models: dict[str, onnx.ModelProto]) -> None:
    rows, fraud = payments(20_000, 999)
    score, flagged = run(models[CARD_FRAUD], rows)
    assert flagged[fraud].mean() > 0.9 and flagged[~fraud].mean() < 0.02
    assert score[fraud].mean() > 0 > score[~fraud].mean(), "log odds"
    for column in rows.T:
        assert (column[fraud] > np.quantile(column[~fraud], 0.98)).mean() < 0.8, "one column would have told it"


def test_models_pass_the_reader_and_are_batched(models: dict[str, onnx.ModelProto]) -> None:
    for model in models.values():
        found = read_onnx(model.SerializeToString())
        assert found.signature.batched and found.dtype == "float32"


def test_same_seed_gives_the_same_bytes(models: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    make_telemetry_anomaly(tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == models[TELEMETRY_ANOMALY].SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", [SHAPE_CLASSIFIER, TELEMETRY_ANOMALY, CARD_FRAUD])
def test_profile_takes_honest_runs_and_refuses_half_precision(models: dict[str, onnx.ModelProto], name: str) -> None:
    rows = {SHAPE_CLASSIFIER: shapes, TELEMETRY_ANOMALY: telemetry, CARD_FRAUD: payments}[name](128, 7)[0]
    model = models[name]
    right = items(run(model, rows))
    for honest in (run(model, rows, batch=1), run(model, rows, batch=7), run(model, rows, threads=2, fused=False)):
        assert decide_tensors(INFER_FP32, right, items(honest)).accepted
    cheap = items(run(cheapened(model), rows))
    assert not decide_tensors(INFER_FP32, right, cheap).accepted
    caught = [not decide_tensors(INFER_FP32, [a], [b]).accepted for a, b in zip(right, cheap, strict=True)]
    assert np.mean(caught) > 0.3, "a check of a few rows has to see it"

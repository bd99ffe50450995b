"""Small tensor models with what they are tried on: an image classifier, an anomaly score of machine telemetry and a fraud score.

    python -m gpumarket.testnet.tensor_models OUT

Made in seconds, and real: fitted on seeded synthetic data and measured on other draws of it (tests/unit/test_testnet_tensor_models.py).
Invariant: the same seed, library versions and machine give the same bytes. Needs the `onnx` package, of the testnet extra.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gpumarket.core.errors import MissingExtra
from gpumarket.testnet.plan import CARD_FRAUD, SHAPE_CLASSIFIER, TELEMETRY_ANOMALY

if TYPE_CHECKING:
    import onnx

Floats = NDArray[np.float32]

SHAPES: Final = ("disc", "square", "triangle", "cross")
SIDE: Final = 32
SENSORS: Final = ("temperature", "vibration", "pressure", "current", "speed", "torque", "acoustic", "humidity")
PAYMENT: Final = ("amount_to_usual", "hour", "km_from_home", "payments_last_hour", "new_merchant")
FALSE_ALARMS: Final = 0.005
"""Share of normal readings, or honest payments, that the threshold flags."""
_OPSET, _IR = 17, 8
_FILTERS: Final = (12, 24)
_RIDGE: Final = 3.0
_NEWTON_STEPS: Final = 12


def shapes(count: int, seed: int) -> tuple[Floats, NDArray[np.int64]]:
    """Images of one shape each at a random place, size and colour on noise: float32 [count, 3, 32, 32] in 0..1, and their classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(SHAPES), count)
    x, y = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    images = rng.uniform(0.0, 0.25, (count, 3, SIDE, SIDE))
    for image, label in zip(images, labels, strict=True):
        radius, middle = rng.uniform(6, 11), rng.uniform(11, 21, 2)
        dx, dy = (x - middle[0]) / radius, (y - middle[1]) / radius
        inside = (
            dx**2 + dy**2 <= 1,
            np.maximum(abs(dx), abs(dy)) <= 0.85,
            (dy <= 0.8) & (dy >= 2 * abs(dx) - 1),
            (np.minimum(abs(dx), abs(dy)) <= 0.3) & (np.maximum(abs(dx), abs(dy)) <= 1),
        )[label]
        image[:, inside] += rng.uniform(0.5, 0.75, (3, 1))
    return images.astype(np.float32), labels


def telemetry(count: int, seed: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Readings of a machine, float32 [count, 8], one in twenty of them of a failing one: each sensor near its range, but not together."""
    rng = np.random.default_rng(seed)
    load = rng.normal(0, 1, (count, 2))
    signs = np.random.default_rng(7)
    mix = signs.choice([-1, 1], (2, len(SENSORS))) * signs.uniform(0.7, 1.4, (2, len(SENSORS)))
    readings = load @ mix + rng.normal(0, 0.2, (count, len(SENSORS)))
    failing = rng.random(count) < 0.05
    readings[failing, 1] += rng.choice([-1.3, 1.3], int(failing.sum()))
    readings[failing, 6] -= rng.choice([-1.3, 1.3], int(failing.sum()))
    return (readings * np.linspace(0.5, 4, len(SENSORS)) + np.linspace(20, 90, len(SENSORS))).astype(np.float32), failing


def payments(count: int, seed: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Card payments, float32 [count, 5] in the order of PAYMENT, one in fifty a fraud: amount over the holder's usual one, hour 0..24,
    kilometres from home, payments in the hour before, and 1 for a merchant that is new to the holder. Frauds overlap in each of them."""
    rng = np.random.default_rng(seed)
    fraud = rng.random(count) < 0.02
    columns = (
        np.where(fraud, rng.lognormal(1.4, 0.8, count), rng.lognormal(0.0, 0.6, count)),
        np.where(fraud, rng.uniform(0, 24, count), np.clip(rng.normal(15, 4, count), 0, 24)),
        np.where(fraud, rng.lognormal(5.5, 1.5, count), rng.lognormal(2.0, 1.2, count)),
        np.where(fraud, rng.poisson(4.0, count), rng.poisson(0.4, count)),
        np.where(fraud, rng.random(count) < 0.9, rng.random(count) < 0.15),
    )
    return np.stack(columns, axis=1).astype(np.float32), fraud


def make_shape_classifier(out: Path, *, seed: int = 0) -> None:
    """Write the classifier: image FP32 [n, 3, 32, 32] to scores FP32 [n, 4] and label INT64 [n]. Random filters, a fitted last layer."""
    helper, _ = _onnx()
    rng = np.random.default_rng(seed)
    filters = [
        (rng.normal(0, (2 / (9 * taken)) ** 0.5, (made, taken, 3, 3)).astype(np.float32), rng.normal(0, 0.1, made).astype(np.float32))
        for taken, made in zip((3, *_FILTERS), _FILTERS, strict=False)
    ]
    images, labels = shapes(1_500, seed + 1)
    features = np.concatenate([_features(images[at : at + 50], filters) for at in range(0, len(images), 50)])
    weights, bias = _fitted(features, labels)
    constants: dict[str, NDArray[Any]] = {"weights": weights, "bias": bias}
    nodes, last = [], "image"
    for index, (kernel, offset) in enumerate(filters):
        constants |= {f"kernel{index}": kernel, f"offset{index}": offset}
        nodes += [
            helper.make_node("Conv", [last, f"kernel{index}", f"offset{index}"], [f"conv{index}"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"conv{index}"], [f"relu{index}"]),
            helper.make_node("AveragePool", [f"relu{index}"], [f"pool{index}"], kernel_shape=[2, 2], strides=[2, 2]),
        ]
        last = f"pool{index}"
    nodes += [
        helper.make_node("Flatten", [last], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"], axis=1),
        helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
    ]
    inputs = {"image": ("float32", ["n", 3, SIDE, SIDE])}
    outputs = {"scores": ("float32", ["n", len(SHAPES)]), "label": ("int64", ["n"])}
    _save(out, "shapes", nodes, inputs, outputs, constants)


def make_telemetry_anomaly(out: Path, *, seed: int = 0) -> None:
    """Write the anomaly score: telemetry FP32 [n, 8] to its Mahalanobis distance, score FP32 [n], and anomaly BOOL [n]."""
    helper, _ = _onnx()
    readings, failing = telemetry(20_000, seed + 1)
    normal = readings[~failing].astype(np.float64)
    mean = normal.mean(axis=0)
    whiten = np.linalg.cholesky(np.linalg.inv(np.cov(normal, rowvar=False)))
    threshold = np.quantile(np.linalg.norm((normal - mean) @ whiten, axis=1), 1 - FALSE_ALARMS)
    constants: dict[str, NDArray[Any]] = {
        "mean": mean.astype(np.float32),
        "whiten": whiten.astype(np.float32),
        "threshold": np.array([threshold], np.float32),
    }
    nodes = [
        helper.make_node("Sub", ["telemetry", "mean"], ["centred"]),
        helper.make_node("MatMul", ["centred", "whiten"], ["white"]),
        helper.make_node("ReduceL2", ["white"], ["score"], axes=[1], keepdims=0),
        helper.make_node("Greater", ["score", "threshold"], ["anomaly"]),
    ]
    inputs = {"telemetry": ("float32", ["n", len(SENSORS)])}
    _save(out, "telemetry", nodes, inputs, {"score": ("float32", ["n"]), "anomaly": ("bool", ["n"])}, constants)


def make_card_fraud(out: Path, *, seed: int = 0) -> None:
    """Write the fraud score: payment FP32 [n, 5] to its log odds, score FP32 [n], and fraud BOOL [n]. Logistic regression on log(1 + x)."""
    helper, _ = _onnx()
    rows, fraud = payments(50_000, seed + 1)
    logs = np.log1p(rows.astype(np.float64))
    mean, spread = logs.mean(axis=0), logs.std(axis=0)
    seen = np.column_stack([(logs - mean) / spread, np.ones(len(logs))])
    weights = np.zeros(seen.shape[1])
    for _ in range(_NEWTON_STEPS):
        odds = 1 / (1 + np.exp(-seen @ weights))
        curvature = (seen * (odds * (1 - odds))[:, None]).T @ seen + np.eye(len(weights))
        weights -= np.linalg.solve(curvature, seen.T @ (odds - fraud) + weights)
    constants: dict[str, NDArray[Any]] = {
        "one": np.array([1], np.float32),
        "weights": (weights[:-1] / spread).astype(np.float32),
        "bias": np.array([weights[-1] - (mean / spread) @ weights[:-1]], np.float32),
        "threshold": np.array([np.quantile((seen @ weights)[~fraud], 1 - FALSE_ALARMS)], np.float32),
    }
    nodes = [
        helper.make_node("Add", ["payment", "one"], ["counted"]),
        helper.make_node("Log", ["counted"], ["logs"]),
        helper.make_node("MatMul", ["logs", "weights"], ["weighted"]),
        helper.make_node("Add", ["weighted", "bias"], ["score"]),
        helper.make_node("Greater", ["score", "threshold"], ["fraud"]),
    ]
    inputs = {"payment": ("float32", ["n", len(PAYMENT)])}
    _save(out, "payments", nodes, inputs, {"score": ("float32", ["n"]), "fraud": ("bool", ["n"])}, constants)


def _features(images: Floats, filters: list[tuple[Floats, Floats]]) -> Floats:
    """What the last layer sees: as the graph computes it."""
    for kernel, offset in filters:
        padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = sliding_window_view(padded, (3, 3), axis=(2, 3))
        count, _, height, width = images.shape
        columns = windows.transpose(0, 2, 3, 1, 4, 5).reshape(count * height * width, -1)
        made = np.maximum(columns @ kernel.reshape(len(kernel), -1).T + offset, 0)
        pooled = made.reshape(count, height // 2, 2, width // 2, 2, len(kernel)).mean(axis=(2, 4))
        images = np.ascontiguousarray(pooled.transpose(0, 3, 1, 2), dtype=np.float32)
    return images.reshape(len(images), -1)


def _fitted(features: Floats, labels: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Ridge regression to one-hot classes: weights [features, classes] and bias."""
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features - mean
    wanted = np.eye(len(SHAPES))[labels] * 8
    gram = centred.T @ centred + _RIDGE * np.eye(features.shape[1])
    weights = np.linalg.solve(gram, centred.T @ (wanted - wanted.mean(axis=0)))
    return weights.astype(np.float32), (wanted.mean(axis=0) - mean @ weights).astype(np.float32)


def _save(
    out: Path, name: str, nodes: list[onnx.NodeProto], inputs: dict[str, Any], outputs: dict[str, Any], constants: dict[str, NDArray[Any]]
) -> None:
    helper, numpy_helper = _onnx()
    values = [
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape) for n, (kind, shape) in group.items()]
        for group in (inputs, outputs)
    ]
    weights = [numpy_helper.from_array(array, constant) for constant, array in constants.items()]
    graph = helper.make_graph(nodes, name, *values, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR, producer_name="gpumarket")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(model.SerializeToString(deterministic=True))


def _onnx() -> tuple[Any, Any]:
    try:
        from onnx import helper, numpy_helper
    except ImportError as error:
        raise MissingExtra("testnet", "making a tensor model (onnx)") from error
    return helper, numpy_helper


def main() -> None:
    """Make all of them in the folder given, under the names of `plan`."""
    parser = argparse.ArgumentParser(description="make the testnet's tensor models")
    parser.add_argument("out", type=Path, help="folder to write")
    folder = parser.parse_args().out
    make_shape_classifier(folder / f"{SHAPE_CLASSIFIER}.onnx")
    make_telemetry_anomaly(folder / f"{TELEMETRY_ANOMALY}.onnx")
    make_card_fraud(folder / f"{CARD_FRAUD}.onnx")


if __name__ == "__main__":
    main()

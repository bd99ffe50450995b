"""The Open Inference Protocol v2 on a real testnet: NVIDIA's client over HTTP and gRPC, and what must be refused."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from gpumarket.core import private_files
from gpumarket.core.units import parse_money
from gpumarket.testnet.network import Network
from gpumarket.testnet.plan import GATEWAY, SHAPE_CLASSIFIER, TELEMETRY_ANOMALY, ModelPlan, Plan, ProviderPlan
from gpumarket.testnet.tensor_models import shapes, telemetry

SECONDS = 240
pytestmark = pytest.mark.timeout(2 * SECONDS)
TRITON = Path(__file__).resolve().parents[1] / "triton_conformance.py"


@dataclass(frozen=True)
class Served:
    network: Network
    url: str
    grpc: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    seller = ProviderPlan("provider-1", (ModelPlan(SHAPE_CLASSIFIER, "0.50"), ModelPlan(TELEMETRY_ANOMALY, "0.50")))
    plan = Plan((seller,), client={"check_probability": 0.0}, gateway={"listen": "127.0.0.1:0", "grpc_listen": "127.0.0.1:0"})
    network = Network(tmp_path_factory.mktemp("inference") / "net", plan)
    try:
        asyncio.run(network.up())
        ready = network.ready[GATEWAY]
        key = private_files.read(network.folder.gateway_key).decode().strip()
        yield Served(network, ready["endpoint"], ready["grpc"], key)
    finally:
        asyncio.run(network.down())


def test_triton_client_finds_health_metadata_and_the_right_answers_over_http_and_grpc(served: Served, tmp_path: Path) -> None:
    """In a process of its own: its generated code declares the package that ours declares."""
    images, labels = shapes(64, 7)
    readings, _ = telemetry(40, 3)
    np.savez(tmp_path / "tensors.npz", images=images, labels=labels, readings=readings)
    command = [sys.executable, str(TRITON), served.url.removeprefix("http://"), served.grpc, str(tmp_path / "tensors.npz")]
    done = subprocess.run(command, input=served.key, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["right"] > 0.85
    assert told["checked"] == 16


def test_page_on_tensors_runs_as_it_stands(served: Served) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "tensors.md").read_text("utf-8")
    env = {**os.environ, "OPENAI_BASE_URL": f"{served.url}/v1", "OPENAI_API_KEY": served.key}
    for language, argv, said in (("python", [sys.executable, "-c"], "(2, 4)"), ("bash", ["bash", "-ec"], '"model_name"')):
        (block,) = re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
        done = subprocess.run([*argv, block], capture_output=True, text=True, timeout=SECONDS, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout and '"error"' not in done.stdout


async def infer(served: Served, document: Any, *, model: str = SHAPE_CLASSIFIER, **headers: str) -> tuple[int, Any, Any]:
    async with aiohttp.ClientSession() as http:
        url = f"{served.url}/v2/models/{model}/infer"
        async with http.post(url, json=document, headers={**served.headers, **headers}) as answer:
            return answer.status, await answer.json(), answer.headers


def image_of(rows: int = 2) -> dict[str, Any]:
    images, _ = shapes(rows, 9)
    return {"name": "image", "shape": list(images.shape), "datatype": "FP32", "data": images.reshape(-1).tolist()}


async def test_json_tensors_are_answered_with_what_the_market_says(served: Served) -> None:
    status, answer, headers = await infer(served, {"id": "mine", "inputs": [image_of()], "outputs": [{"name": "label"}]})
    assert (status, answer["id"], answer["model_name"]) == (200, "mine", SHAPE_CLASSIFIER)
    (output,) = answer["outputs"]
    assert (output["name"], output["shape"], len(output["data"])) == ("label", [2], 2)
    assert parse_money(headers["x-gpumarket-cost"]) > 0
    assert headers["x-gpumarket-receipt"].startswith("0x")


async def test_same_idempotency_key_is_one_job(served: Served) -> None:
    document = {"inputs": [image_of(3)]}
    answers = [await infer(served, document, **{"Idempotency-Key": "tensor"}) for _ in range(2)]
    assert answers[0][1] == answers[1][1]
    assert answers[0][2]["x-gpumarket-job"] == answers[1][2]["x-gpumarket-job"]
    assert (await infer(served, {"inputs": [image_of(4)]}, **{"Idempotency-Key": "tensor"}))[0] == 422


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": []},
        {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["a"]}]},
        {"inputs": [{"name": "picture", "shape": [1], "datatype": "FP32", "data": [1]}]},
        {"inputs": [{"name": "image", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]},
        {"inputs": [{"name": "image", "shape": [1], "datatype": "FP64", "data": [1]}]},
        {"inputs": [{"name": "image", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}}]},
        {"inputs": [{"name": "image", "shape": [1], "datatype": "FP32", "parameters": {"shared_memory_region": "x"}, "data": [1]}]},
        {"outputs": [{"name": "nothing"}]},
        {"outputs": [{"name": "label", "parameters": {"classification": 2}}]},
        {"parameters": {"sequence_id": 7}},
        {"whatever": 1},
    ],
)
async def test_request_that_cannot_be_is_refused_in_the_protocols_shape(served: Served, change: dict[str, Any]) -> None:
    status, answer, _ = await infer(served, {"inputs": [image_of(1)]} | change)
    assert status == 400
    assert list(answer) == ["error"] and isinstance(answer["error"], str)


async def test_models_and_inference_take_a_key_and_health_takes_none(served: Served) -> None:
    async with aiohttp.ClientSession() as http:
        for path in ("/v2", "/v2/health/live", "/v2/health/ready"):
            async with http.get(served.url + path) as answer:
                assert answer.status == 200
        for path in (f"/v2/models/{SHAPE_CLASSIFIER}", f"/v2/models/{SHAPE_CLASSIFIER}/ready"):
            async with http.get(served.url + path) as answer:
                assert (answer.status, list(await answer.json())) == (401, ["error"])
        async with http.get(f"{served.url}/v2/models/nothing", headers=served.headers) as answer:
            assert answer.status == 404
        async with http.get(f"{served.url}/v2/models/{SHAPE_CLASSIFIER}/versions/0x00/ready", headers=served.headers) as answer:
            assert answer.status == 404
        async with http.get(f"{served.url}/v2/nothing", headers=served.headers) as answer:
            assert (answer.status, list(await answer.json())) == (404, ["error"])

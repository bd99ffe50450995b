"""Tensor models on a real market: an image classifier and an anomaly score, bought, checked, falsified and resumed."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpumarket.core.errors import ConfigError, OverMaxCost
from gpumarket.core.settings import ChainSettings, load
from gpumarket.core.terms import Task
from gpumarket.sdk import Client
from gpumarket.sdk.results import InferResult, VerdictState
from gpumarket.sdk.settings import ClientSettings
from gpumarket.settlement import receipts
from gpumarket.testnet import audit, ledgers, plan
from gpumarket.testnet.network import Network
from gpumarket.testnet.plan import CLIENT, SCHEDULER, SHAPE_CLASSIFIER, TELEMETRY_ANOMALY, ModelPlan, ProviderPlan
from gpumarket.testnet.tensor_models import shapes, telemetry

CHEATER = "cheater"
JOBS_MAX = 30
ROWS = 24
pytestmark = pytest.mark.timeout(420)


@dataclass
class Market:
    network: Network
    images: list[InferResult] = field(default_factory=list)
    readings: InferResult | None = None
    documents: dict[str, Any] = field(default_factory=dict)

    def client_rows(self) -> Any:
        return ledgers.client_books(self.network.folder.state(CLIENT))

    @property
    def cheater(self) -> Any:
        return self.network.wallets[CHEATER].address


@asynccontextmanager
async def client_of(network: Network) -> AsyncIterator[Client]:
    file = network.client_config
    async with Client(load(ClientSettings, file=file, env={}), load(ChainSettings, file=file, env={})) as client:
        yield client


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    """Three honest sellers of both models, one cheaper than all that computes every other row; every job is checked."""
    honest = [
        ProviderPlan(f"provider-{n}", (ModelPlan(SHAPE_CLASSIFIER, f"0.50{n}"), ModelPlan(TELEMETRY_ANOMALY, f"0.50{n}")))
        for n in (1, 2, 3)
    ]
    cheater = ProviderPlan(CHEATER, (ModelPlan(SHAPE_CLASSIFIER, "0.10"),), "cut-prompt", {"checks": False})
    client = {"check_probability": 1.0, "check_share": 0.5, "job_seconds": 60, "reruns_max": 2}
    network = Network(
        tmp_path_factory.mktemp("tensors"), plan.Plan((*honest, cheater), {"check_seconds": 15, "claim_grace_seconds": 5}, client)
    )
    market = Market(network)
    try:
        asyncio.run(network.up())
        asyncio.run(buy(market))
        yield market
    finally:
        asyncio.run(network.down())


async def buy(market: Market) -> None:
    async with client_of(market.network) as client:
        for number in range(JOBS_MAX):
            images, _ = shapes(ROWS, 100 + number)
            market.images.append(await client.infer(SHAPE_CLASSIFIER, {"image": images}, max_cost="0.01"))
            if any(result.rejected for result in market.images):
                break
        readings, _ = telemetry(400, 5)
        market.readings = await client.infer(TELEMETRY_ANOMALY, {"telemetry": readings}, max_cost="0.01")
        market.documents["resumed"] = await client.resume(market.readings.job)
        market.documents["quote"] = await client.quote(SHAPE_CLASSIFIER, {"image": shapes(7, 1)[0]})
        market.documents["signature"] = await client.signature(SHAPE_CLASSIFIER)
        receipt = market.network.folder.root / "receipt.json"
        client.save_receipt(market.readings.job, receipt, content=True)
        market.documents["receipt"] = receipt
        with pytest.raises(OverMaxCost):
            await client.infer(SHAPE_CLASSIFIER, {"image": images}, max_cost="0.0000001")
        with pytest.raises(ConfigError, match="image"):
            await client.infer(SHAPE_CLASSIFIER, {"image": images.astype(np.complex64)})
        with pytest.raises(ConfigError, match="is for infer"):
            await client.embed(SHAPE_CLASSIFIER, ["a text"])


def test_images_bought_on_the_market_are_classified_right(market: Market) -> None:
    right = [result.outputs["label"] == shapes(ROWS, 100 + n)[1] for n, result in enumerate(market.images)]
    assert np.concatenate(right).mean() > 0.9
    for result in market.images:
        assert result.outputs["scores"].shape == (ROWS, 4) and result.outputs["scores"].dtype == np.float32
        np.testing.assert_allclose(result.outputs["scores"].sum(axis=1), 1, atol=1e-5)
        assert not result.outputs["scores"].flags.writeable
        assert result.usage.prompt_tokens == ROWS and result.receipt is not None and result.receipt.output_units == ROWS


def test_anomalies_planted_in_telemetry_are_found_and_checked(market: Market) -> None:
    assert market.readings is not None
    planted = telemetry(400, 5)[1]
    assert market.readings.outputs["anomaly"][planted].mean() > 0.9
    assert market.readings.outputs["anomaly"][~planted].mean() < 0.05
    assert market.readings.verdict.state is VerdictState.ACCEPTED


def test_provider_that_falsifies_rows_is_rejected_unpaid_and_its_client_gets_right_ones(market: Market) -> None:
    rejected = [r for result in market.images for r in result.rejected]
    assert rejected and {r.provider for r in rejected} == {market.cheater}
    books = ledgers.scheduler_books(market.network.folder.state(SCHEDULER))
    assert sum(row.vouchered for row in books.spokes if row.provider == market.cheater) == 0
    assert all(result.provider != market.cheater for result in market.images)
    (reputation,) = [row for row in books.reputations if row.provider == market.cheater]
    assert reputation.rejections > 0


def test_resumed_tensor_job_reads_the_same_arrays_from_the_journal(market: Market) -> None:
    resumed = market.documents["resumed"]
    assert isinstance(resumed, InferResult) and market.readings is not None
    for name, array in market.readings.outputs.items():
        np.testing.assert_array_equal(resumed.outputs[name], array)


def test_quote_of_tensors_counts_rows(market: Market) -> None:
    quote = market.documents["quote"]
    assert (quote.prompt_tokens, quote.max_output_tokens) == (7, 0)
    assert quote.maximum > 0


def test_signature_comes_from_verified_files(market: Market) -> None:
    signature = market.documents["signature"]
    assert signature.batched
    assert [(s.name, s.datatype, s.shape) for s in signature.inputs] == [("image", "FP32", (-1, 3, 32, 32))]
    assert [s.name for s in signature.outputs] == ["scores", "label"]


def test_receipt_of_a_tensor_job_proves_request_and_output(market: Market) -> None:
    path: Path = market.documents["receipt"]
    proof = receipts.verify(receipts.from_json(path.read_bytes()))
    assert proof.holds, [f for f in proof.findings if not f.holds]
    assert json.loads(path.read_text())["order"]["spec"]["task"] == int(Task.INFER)


def test_command_line_sends_tensors_and_saves_what_comes_back(market: Market, tmp_path: Path) -> None:
    images, labels = shapes(8, 500)
    np.save(tmp_path / "images.npy", images)
    words = ["run", SHAPE_CLASSIFIER, "--tensor", f"image=@{tmp_path}/images.npy", "--out", str(tmp_path / "out"), "-o", "json"]
    command = [sys.executable, "-m", "gpumarket.cli.main", *words, "--config", str(market.network.client_config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    saved = np.load(tmp_path / "out" / "1-label.npy")
    assert (saved == labels).mean() > 0.8
    assert document["outputs"]["label"] == saved.tolist()
    assert document["usage"]["prompt_tokens"] == 8


def test_market_of_tensors_holds_every_invariant(market: Market) -> None:
    report = asyncio.run(audit.audit(audit.of_folder(market.network.folder.root)))
    assert report.holds, report.as_json()
    assert report.figures["overpaid"] == report.figures["lost"] == 0

"""`gpumarket demo -o json`, as a stranger runs it: the whole market, a caught cheater, everything settled, nothing left running."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from integration.conftest import DemoRun

KEYS = {"jobs", "receipts", "verifications", "settlements", "cheater", "answer", "invariants", "seconds"}
SECONDS_MAX = 300


@pytest.fixture(scope="module")
def folder(demo_run: DemoRun) -> Path:
    return demo_run.folder


@pytest.fixture(scope="module")
def report(demo_run: DemoRun) -> dict[str, Any]:
    """The demo's document."""
    return demo_run.report


pytestmark = pytest.mark.timeout(SECONDS_MAX + 60)


def test_demo_has_the_documented_keys(report: dict[str, Any]) -> None:
    assert set(report) == KEYS
    for job in report["jobs"]:
        assert {"id", "task", "model", "provider", "state", "amount", "attempts"} <= set(job)
    assert all(set(receipt) == {"job", "valid"} for receipt in report["receipts"])
    assert all(set(line) == {"job", "provider", "verdict", "reason"} for line in report["verifications"])
    assert all(set(line) == {"payer", "payee", "amount", "tx", "gas"} for line in report["settlements"])
    assert set(report["cheater"]) == {"provider", "caught", "paid"}
    assert set(report["seconds"]) == {"up", "first_result", "total"}


def test_demo_answers_from_the_given_document(report: dict[str, Any]) -> None:
    assert report["answer"].startswith("The lighthouse on the northern cape was built of granite")


def test_demo_catches_the_cheater_pays_it_nothing_and_does_its_work_again(report: dict[str, Any]) -> None:
    cheater = report["cheater"]["provider"]
    assert report["cheater"]["caught"] is True
    assert report["cheater"]["paid"] == 0
    rejected = [line for line in report["verifications"] if line["verdict"] == "rejected"]
    assert rejected and {line["provider"] for line in rejected} == {cheater}
    again = [job for job in report["jobs"] if job["purpose"] == "rerun"]
    assert again and all(job["state"] == "done" and job["provider"] != cheater for job in again)
    assert cheater not in {line["payee"] for line in report["settlements"]}


def test_demo_checks_every_result_and_every_receipt(report: dict[str, Any]) -> None:
    bought = {job["id"] for job in report["jobs"] if job["purpose"] != "check"}
    assert bought == {line["job"] for line in report["verifications"]}
    assert {receipt["job"] for receipt in report["receipts"]} == {job["id"] for job in report["jobs"]}
    assert all(receipt["valid"] for receipt in report["receipts"])
    assert {job["task"] for job in report["jobs"]} >= {"embed", "generate", "check"}


def test_demo_settles_exactly_what_jobs_cost(report: dict[str, Any]) -> None:
    cost = sum(job["amount"] for job in report["jobs"] if job["state"] != "rejected")
    payers = {line["payer"] for line in report["settlements"]}
    to_scheduler = [line for line in report["settlements"] if line["payee"] in payers]
    to_providers = [line for line in report["settlements"] if line["payee"] not in payers]
    assert sum(line["amount"] for line in to_scheduler) == cost > 0
    assert 0 < sum(line["amount"] for line in to_providers) <= cost
    assert all(line["gas"] > 0 and line["tx"].startswith("0x") for line in report["settlements"])


def test_demo_holds_every_invariant(report: dict[str, Any]) -> None:
    assert report["invariants"] == {f"I{number}": True for number in range(1, 11)}


def test_demo_tells_its_times_in_order(report: dict[str, Any]) -> None:
    seconds = report["seconds"]
    assert 0 < seconds["up"] < seconds["first_result"] < seconds["total"]


def test_demo_leaves_nothing_running(report: dict[str, Any], folder: Path) -> None:
    assert report
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if any(str(folder) in word for word in p.info["cmdline"] or ())]
    assert left == []
    assert json.loads((folder / "processes.json").read_text()) == []


def test_demo_never_loads_torch_in_its_own_process() -> None:
    code = "import sys, gpumarket.testnet.demo, gpumarket.cli.demo; sys.exit('torch' in sys.modules or 'libp2p' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_demo_that_sigterm_ends_takes_the_market_down_and_exits_143(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    command = [sys.executable, "-m", "gpumarket.cli.main", "demo", "--dir", str(folder)]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "processes.json").exists() or not json.loads((folder / "processes.json").read_text()):
            assert demo.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        demo.terminate()
        out, err = demo.communicate(timeout=60)
    finally:
        demo.kill()
    assert (demo.returncode, out) == (143, ""), err
    assert "terminated" in err and "Traceback" not in err
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if any(str(folder) in word for word in p.info["cmdline"] or ())]
    assert left == []

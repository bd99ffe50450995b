"""`gpumarket testnet chaos`, as anybody runs it: every kind of fault under a steady load, and the auditor's word at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from reliability import record

from gpumarket.cli.main import run
from gpumarket.testnet.chaos_schedule import Kind, schedule

pytestmark = [pytest.mark.slow]
BOUND = "lost 0, paid twice 0, overpaid 0, without an end 0"
AROUND_SECONDS = 600
"""Coming up, ending every job and settling, on a machine that does other things too."""


def chaos(folder: Path, minutes: float, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "gpumarket.cli.main", "testnet", "chaos", "-o", "json"]
    command += ["--minutes", str(minutes), "--seed", str(seed), "--dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 * minutes + AROUND_SECONDS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if any(str(folder) in word for word in p.info["cmdline"] or ())]
    assert left == []
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["problems"] == []
    assert report["lost"] == report["overpaid"] == 0
    assert {name: one["holds"] for name, one in report["audit"]["invariants"].items()} == {f"I{n}": True for n in range(1, 7)}
    return report


def begun(folder: Path) -> list[tuple[str, str, float, float]]:
    """The faults that were inflicted or skipped, as they were planned."""
    lines = [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
    planned = [(one["kind"], one["target"], one["planned_at"], one["seconds"]) for one in lines if one["event"] in ("began", "skipped")]
    return sorted(planned, key=lambda one: one[2])


@pytest.mark.timeout(2 * AROUND_SECONDS)
def test_chaos_for_a_while_inflicts_what_its_seed_says_and_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    report = chaos(folder, 0.7, 7)
    planned = schedule(7, 42.0, ("provider-1", "provider-2", "provider-3"), ("client", "client-2"))
    assert begun(folder) == [(fault.kind, fault.target, fault.at_seconds, fault.seconds) for fault in planned]
    assert sum(report["faults"].values()) > 0
    assert report["jobs"]["done"] > 0
    assert json.loads((folder / "chaos.json").read_text()) == report


@pytest.mark.timeout(600 + 2 * AROUND_SECONDS)
def test_chaos_for_ten_minutes_loses_nothing_pays_nothing_twice_and_ends_every_job(tmp_path: Path) -> None:
    report = chaos(tmp_path / "net", 10, 11)
    rows = {
        "F14": [Kind.PROVIDER_ENDED],
        "F15": [Kind.LINK_CUT],
        "F16": [Kind.LINK_SLOW],
        "F17": [Kind.PROVIDER_HUNG],
        "F18": [Kind.SCHEDULER_CUT],
        "F31": [Kind.CHAIN_KILLED, Kind.CHAIN_CUT],
        "F60": [Kind.ENGINE_HUNG],
        "F01": [Kind.PROVIDER_KILLED],
        "F03": [Kind.SCHEDULER_KILLED],
    }
    assert set(Kind) >= {kind for kinds in rows.values() for kind in kinds}
    figure = f"process network under load, ten minutes: {report['jobs']['done']} jobs ended well, {report['failovers']} failovers"
    for row, kinds in rows.items():
        for kind in kinds:
            times = report["faults"].get(kind, 0)
            assert times > 0, f"{kind} never happened"
            record(row, times, f"{figure}; {kind}: {told(report, kind)}", BOUND)


def told(report: dict[str, Any], kind: Kind) -> str:
    """Of the attempts that ran, how many were given up and how soon, and when the next job was done."""
    running, noticed = report["running_by_kind"].get(kind, 0), report["detection_by_kind"].get(kind)
    reasons, after = report["reasons_by_kind"].get(kind, {}), report["recovery_by_kind"].get(kind)
    words = []
    if running:
        given_up = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
        words.append(f"{running} attempts ran, given up {given_up}")
    if noticed:
        words.append(f"after {noticed['p50']:.1f} s (p50), {noticed['p99']:.1f} s (p99)")
    if after:
        words.append(f"next job done {after['p50']:.1f} s (p50) after it")
    return ", ".join(words) or "nobody noticed"


def test_chaos_in_a_folder_with_something_in_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("precious")
    assert run(["testnet", "chaos", "-o", "json", "--dir", str(tmp_path)]) == 3
    assert "is not empty" in capsys.readouterr().out
    assert (tmp_path / "mine").read_text() == "precious"

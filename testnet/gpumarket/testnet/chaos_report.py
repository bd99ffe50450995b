"""What came of a chaos run, from the lines that it wrote and the auditor's report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpumarket.testnet.audit import AuditReport

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChaosReport:
    """Figures of one run. Times in seconds; `detection` and `recovery` by kind of fault."""

    seed: int
    seconds: float
    jobs: Mapping[str, int]
    """How many ended well, ended with a typed error (by code), or were taken up again by a restarted client."""
    faults: Mapping[str, int]
    failovers: int
    """Attempts that were lost, failed or refused, of jobs that ended well elsewhere."""
    detection: Mapping[str, Sequence[float]]
    recovery: Mapping[str, Sequence[float]]
    running: Mapping[str, int]
    """Attempts that ran at the victims when the faults came, by kind."""
    reasons: Mapping[str, Mapping[str, int]]
    """Why of these some ended otherwise than completed, by kind."""
    audit: AuditReport

    def problems(self) -> list[str]:
        """What does not hold; empty when the market came through."""
        figures = self.audit.figures
        found = [f"{name} does not hold: {'; '.join(f.problems[:3])}" for name, f in self.audit.findings.items() if not f.holds]
        found += [f"{figures[name]} {name}" for name in ("overpaid", "lost") if figures[name]]
        return found if self.jobs.get("done") else [*found, "no job ended well"]

    def as_json(self) -> dict[str, Any]:
        """The documented document."""
        every = [seconds for times in self.detection.values() for seconds in times]
        recoveries = [seconds for times in self.recovery.values() for seconds in times]
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "jobs": dict(self.jobs),
            "faults": dict(self.faults),
            "failovers": self.failovers,
            "detection_seconds": _summary(every),
            "detection_by_kind": {kind: _summary(times) for kind, times in self.detection.items()},
            "running_by_kind": dict(self.running),
            "reasons_by_kind": {kind: dict(reasons) for kind, reasons in self.reasons.items()},
            "recovery_seconds": _summary(recoveries),
            "recovery_by_kind": {kind: _summary(times) for kind, times in self.recovery.items()},
            "overpaid": self.audit.figures["overpaid"],
            "lost": self.audit.figures["lost"],
            "problems": self.problems(),
            "audit": self.audit.as_json(),
        }


def of_files(root: Path, seed: int, seconds: float, found: AuditReport) -> ChaosReport:
    """Read what the run wrote into its folder."""
    jobs, faults = _lines(root / "jobs.jsonl"), _lines(root / "faults.jsonl")
    ended = Counter[str]()
    for line in jobs:
        if line["event"] in ("done", "failed", "resumed"):
            ended[line["event"] if "code" not in line else f"{line['event']}: {line['code']}"] += 1
    healed = [line for line in faults if line["event"] == "healed"]
    running = Counter[str]()
    reasons: dict[str, Counter[str]] = {}
    for line in (line for line in faults if line["event"] == "noticed"):
        running[line["kind"]] += line["running"]
        reasons.setdefault(line["kind"], Counter()).update(line["reasons"])
    return ChaosReport(
        seed=seed,
        seconds=seconds,
        jobs=dict(ended),
        faults=dict(Counter(line["kind"] for line in faults if line["event"] == "began")),
        failovers=sum(attempt["outcome"] != "completed" for line in jobs for attempt in line.get("attempts", ())),
        detection=_by_kind((line["kind"], each) for line in faults if line["event"] == "noticed" for each in line["noticed_seconds"]),
        recovery=_by_kind((line["kind"], each) for line in healed for each in _recovery(line["at"], jobs)),
        running=dict(running),
        reasons=reasons,
        audit=found,
    )


def _summary(values: Sequence[float]) -> dict[str, float | None]:
    return {"count": len(values), "p50": percentile(values, 50), "p99": percentile(values, 99)}


def percentile(values: Sequence[float], percent: int) -> float | None:
    """The smallest value that so many percent of all do not pass; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else None


def _recovery(at: float, jobs: Sequence[Line]) -> list[float]:
    """From a fault's end to the end of the first job that began after it and ended well; nothing where none did."""
    ends = [line["at"] - at for line in jobs if line["event"] == "done" and line["at"] - line["seconds"] >= at]
    return [round(min(ends), 3)] if ends else []


def _by_kind(pairs: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for kind, seconds in pairs:
        found.setdefault(kind, []).append(seconds)
    return found


def _lines(file: Path) -> list[Line]:
    """Whole lines; a client that was killed may have left half of one."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []

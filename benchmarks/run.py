"""Runs every benchmark and writes results.json (for programs) and RESULTS.md (for people).

A benchmark is a file bench_*.py here with `run() -> list[dict]`, each dict {name, value, unit, compared_with}; it runs in a process of its
own, so that no benchmark's threads or memory weigh on the next. `python benchmarks/run.py NAME...` runs some and keeps the other results.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS, READABLE = HERE / "results.json", HERE / "RESULTS.md"
SECONDS_MAX = 1_800
BARS = {
    "match_inproc_100k_per_s": (">=", 20_000),
    "match_grpc_quote_ratio_to_echo": (">=", 0.6),
    "match_grpc_ratio_to_echo": (">=", 0.35),
    "embed_market_ratio_to_engine": (">=", 0.85),
    "voucher_sign_per_s": (">=", 20_000),
    "voucher_recover_per_s": (">=", 12_000),
    "slots_ratio_to_sequential": (">=", 4),
    "slots_ratio_to_hf_cb": (">=", 1.2),
    "demo_pss_mib": ("<=", 4_096),
    "demo_warm_s": ("<=", 60),
    "help_ms": ("<=", 150),
    "gateway_cpu_ratio_to_fastapi": ("<=", 8),
    "gateway_ratio_to_litellm": (">=", 10),
    "gateway_added_ttft_ms_p50": ("<=", 5),
    "gateway_excess_p99_ratio": ("<=", 1.5),
    "containers_up_settled_s": ("<=", 120),
    "containers_idle_share": ("<=", 0.15),
    "gas_redeem": ("<=", 61_500),
    "gas_redeem_batch100_each": ("<=", 19_300),
    "gas_push100_each": ("<=", 16_100),
    "gas_per_job_10k": ("<=", 6.2),
}
"""What we hold ourselves to. A result below its bar is reported, not hidden."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Run the benchmarks.")
    parser.add_argument("names", nargs="*", help="which (bench_NAME.py); all by default")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.child:
        print(json.dumps(_load(HERE / f"bench_{given.child}.py").run()))
        return 0
    wanted = given.names or sorted(file.stem.removeprefix("bench_") for file in HERE.glob("bench_*.py"))
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    measured = {name: _measure(name, results) for name in wanted}
    failed = [name for name, found in measured.items() if found is None]
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=2) + "\n")
    READABLE.write_text(_readable(results))
    missed = [name for found in measured.values() for name in found or () if _verdict(name, results[name]["value"]) == "missed"]
    print(f"wrote {RESULTS.name} and {READABLE.name}; failed: {failed or 'none'}; below the bar: {missed or 'none'}", file=sys.stderr)
    return 1 if failed or missed else 0


def machine() -> str:
    """The class of this machine: what a reader needs to compare, nothing that names it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.system()} {platform.machine()}, {_cpu_model()}, {cores} cores, Python {platform.python_version()}"


def _measure(name: str, results: dict[str, Any]) -> list[str] | None:
    """Run one benchmark and put its values into `results`; their names, or None when it failed."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    started = time.monotonic()
    command = [sys.executable, str(Path(__file__)), "--child", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SECONDS_MAX, check=False)
    if done.returncode != 0:
        print(f"{name} failed with exit code {done.returncode}", file=sys.stderr)
        return None
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    rows = json.loads(done.stdout.strip().splitlines()[-1])
    for row in rows:
        entry = {key: row[key] for key in ("value", "unit", "compared_with")}
        results[row["name"]] = {**entry, "machine": machine(), "date": today}
        print(f"  {row['name']}: {row['value']:,.4g} {row['unit']}", file=sys.stderr)
    print(f"{name} took {time.monotonic() - started:.0f} s", file=sys.stderr)
    return [row["name"] for row in rows]


def _load(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.exists():
        raise SystemExit(f"there is no benchmark {file.name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _verdict(name: str, value: float) -> str:
    if name not in BARS:
        return ""
    sign, bar = BARS[name]
    return "met" if (value >= bar if sign == ">=" else value <= bar) else "missed"


def _readable(results: dict[str, Any]) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`. A value is compared in the same run with what stands in its column: compare ratios, not machines.",
        "",
        "| name | value | unit | bar | | compared with | date |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in sorted(results.items()):
        sign, bar = BARS.get(name, ("", ""))
        value = f"{entry['value']:,.4g}" if abs(entry["value"]) < 1000 else f"{entry['value']:,.0f}"
        cells = (name, value, entry["unit"], f"{sign} {bar}", _verdict(name, entry["value"]), entry["compared_with"], entry["date"])
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Machines: " + "; ".join(sorted({entry["machine"] for entry in results.values()})) + ".", ""]
    return "\n".join(lines)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "CPU"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

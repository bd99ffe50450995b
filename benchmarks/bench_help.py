"""What `gpumarket --help` costs, from the start of its process to its end, and a Python that does nothing in the same run.

Counted in CPU time of that process, the smallest of many runs: it waits for nothing, so that this is what a clock shows on a quiet machine,
and other work counts little against it. The fastest run by the clock is told beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RUNS = 25


def run() -> list[dict[str, Any]]:
    """name, value, unit, compared_with."""
    shown, clock = _fastest([str(Path(sys.executable).with_name("gpumarket")), "--help"])
    nothing, _ = _fastest([sys.executable, "-c", "pass"])
    compared = f"python -c pass, same run: {nothing:.0f} ms; fastest by the clock: {clock:.0f} ms"
    return [{"name": "help_ms", "value": shown, "unit": "ms of CPU time", "compared_with": compared}]


def _fastest(command: list[str]) -> tuple[float, float]:
    """Milliseconds of CPU time, user and system, and by the clock."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as after an install
    subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=True)  # fills the caches
    cpu, clock = [], []
    for _ in range(RUNS):
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        clock.append(time.perf_counter() - started)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"{command} failed with exit code {process.returncode}")
        cpu.append(usage.ru_utime + usage.ru_stime)
    return 1_000 * min(cpu), 1_000 * min(clock)

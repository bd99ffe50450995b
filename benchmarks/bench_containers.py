"""The network in containers: sizes and build times of its images, from `up` to the demo job settled, and what it uses when idle.

Needs a container engine. What a wake-up costs on this machine goes with the idle figure: the same small work is timed in a row and after a
pause, and where memory grows cold within a third of a second, an idle network is charged for that and not for what it does.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
IMAGES = ("chain", "client", "scheduler", "provider")
SETTLE_SECONDS, IDLE_SECONDS = 20.0, 60.0
PAUSE_SECONDS = 0.33


def run() -> list[dict[str, Any]]:
    from compose.containers import Containers, engine_missing

    if why := engine_missing():
        raise SystemExit(f"no container engine: {why}")
    net = Containers()
    net.down("-v")
    try:
        cold = _timed(lambda: net.compose("--profile", "*", "build", "--no-cache", seconds=1800))
        again = _after_a_change(net)
        started = time.monotonic()
        up = net.up()
        assert json.loads(net.run("client", "testnet", "errand", "-o", "json"))["settled"]
        settled = time.monotonic() - started
        time.sleep(SETTLE_SECONDS)
        before = sum(net.cpu_seconds().values())
        time.sleep(IDLE_SECONDS)
        idle = (sum(net.cpu_seconds().values()) - before) / IDLE_SECONDS
        sizes = {image: int(net.docker("image", "inspect", "-f", "{{.Size}}", f"gpumarket-{image}")) for image in IMAGES}
    finally:
        net.down("-v")
    hot, waked = wake_up_ms()
    rows = [
        ("containers_build_s", cold, "s", "every image, no layer kept, dependencies from an index"),
        ("containers_rebuild_s", again, "s", "the same after a change of code"),
        ("containers_up_s", up, "s", "from nothing running to every health check green"),
        ("containers_up_settled_s", settled, "s", "a bar of 120 s, to the demo job settled"),
        (
            "containers_idle_share",
            idle,
            "of a core",
            f"a bar of 0.15; a wake-up costs {waked:.2f} ms here, the same work in a row {hot:.2f}",
        ),
    ]
    found = [{"name": n, "value": round(v, 3), "unit": u, "compared_with": c} for n, v, u, c in rows]
    return found + [
        {"name": f"image_{image}_mib", "value": round(size / 2**20), "unit": "MiB", "compared_with": "base image included"}
        for image, size in sizes.items()
    ]


def wake_up_ms() -> tuple[float, float]:
    """CPU milliseconds of the same small work: in a row, and after a pause of a third of a second (medians)."""

    def work() -> float:
        started = time.process_time()
        with open("/proc/self/statm") as file:
            sum(range(2_000), len(file.read()))
        return 1e3 * (time.process_time() - started)

    hot = sorted(work() for _ in range(31))[15]
    cold = []
    for _ in range(31):
        time.sleep(PAUSE_SECONDS)
        cold.append(work())
    return hot, sorted(cold)[15]


def _timed(work: Any) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _after_a_change(net: Any) -> float:
    """Build from a copy of the tree with a line more."""
    with tempfile.TemporaryDirectory(prefix="gpumarket-build-") as folder:
        copy = Path(folder) / "tree"
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        for name in filter(None, files):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
        with (copy / "core" / "gpumarket" / "core" / "units.py").open("a") as file:
            file.write("\n# changed\n")
        return _timed(lambda: net.compose("--profile", "*", "build", seconds=900, root=copy))

"""The demo, everything cached: wall time from nothing running to all settled, and the whole network's memory.

Memory is the largest sum of PSS (proportional set size: shared pages are counted once) over the demo's process tree.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil


def run() -> list[dict[str, Any]]:
    command = [str(Path(sys.executable).with_name("gpumarket")), "demo", "-o", "json"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)  # fills the caches
    peak = [0]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(demo.pid, peak, done))
    watcher.start()
    out, _ = demo.communicate()
    done.set()
    watcher.join()
    if demo.returncode != 0:
        raise SystemExit(f"the demo failed with exit code {demo.returncode}: {out[-2000:]}")
    return [
        {"name": "demo_warm_s", "value": json.loads(out)["seconds"]["total"], "unit": "s", "compared_with": "a bar of 60 s"},
        {"name": "demo_pss_mib", "value": peak[0] / 2**20, "unit": "MiB", "compared_with": "a bar of 4 GiB"},
    ]


def _watch(pid: int, peak: list[int], done: threading.Event) -> None:
    while not done.wait(1.0):
        peak[0] = max(peak[0], _pss_bytes(pid))


def _pss_bytes(pid: int) -> int:
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue  # it ended while we looked
    return total

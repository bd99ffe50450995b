"""Figures for docs/reliability.md: one JSON line a row, appended to the file that GPUMARKET_RELIABILITY names; nothing without it."""

from __future__ import annotations

import json
import os


def record(row: str, injected: int, figure: str, bound: str) -> None:
    """`row`: a fault (F54), an invariant (I9) or the issue's words; `injected`: how often; `figure`: what was found; `bound`: the bar."""
    target = os.environ.get("GPUMARKET_RELIABILITY")
    if target:
        with open(target, "a", encoding="utf-8") as file:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]  # "id (call)", and an id may hold spaces
            file.write(json.dumps({"row": row, "injected": injected, "figure": figure, "bound": bound, "test": test}) + "\n")

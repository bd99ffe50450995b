"""Dishonest providers for tests and the demo: the real daemon with an engine that does not do what was sold.

    python -m gpumarket.testnet.cheaters KIND --config FILE

The product has no switch for this: a cheater brings its own engine factory, as one in the field would.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gpumarket.core.errors import GpumarketError
from gpumarket.core.settings import ChainSettings, load
from gpumarket.core.terms import ModelManifest, Task

if TYPE_CHECKING:
    from gpumarket.node.engine.base import Engine


def lower_precision(manifest: ModelManifest, folder: Path, slots: int) -> Engine:
    """Computes in bfloat16 what it sells as float32: half the memory, twice the speed (measured on a CPU), other numbers."""
    from gpumarket.node.engine.process import EngineProcess

    return EngineProcess("embed" if manifest.task is Task.EMBED else "slots", folder, compute_dtype="bfloat16")


KINDS: Final[dict[str, Callable[[ModelManifest, Path, int], Engine]]] = {"lower-precision": lower_precision}
"""Kind → engine factory."""


def main(argv: Sequence[str]) -> int:
    """Run a cheating provider until it is told to stop; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gpumarket.testnet.cheaters", description="Run a dishonest provider.")
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--config", type=Path, required=True)
    given = parser.parse_args(argv)
    from gpumarket.node.daemon import main as serve
    from gpumarket.node.settings import ProviderSettings

    try:
        settings = load(ProviderSettings, file=given.config)
        serve(settings, load(ChainSettings, file=given.config), engine_factory=KINDS[given.kind])
    except GpumarketError as error:
        print(f"error: {error.message}\n  next: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

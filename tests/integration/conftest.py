"""One run of the demo for all who look at what it did and left behind: it takes most of a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

DEMO_SECONDS_MAX = 300


class DemoRun(NamedTuple):
    """Its folder, kept, with everything stopped, and the document that it printed."""

    folder: Path
    report: dict[str, Any]


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """`gpumarket demo -o json` on a text of its own; stdout holds nothing else."""
    folder = tmp_path_factory.mktemp("demo") / "net"
    document = folder.parent / "notes.txt"
    document.write_text(
        "The baker opens her shop at six in the morning and sells bread until noon.\n\n"
        "The lighthouse on the northern cape was built of granite and has a red lamp.\n\n"
        "Volcanic soil is rich in minerals, and vines grow deep roots in it.\n\n"
        "The night train leaves from the western station at a quarter past eleven.\n"
    )
    command = [sys.executable, "-m", "gpumarket.cli.main", "demo", "-o", "json", "--keep", "--dir", str(folder)]
    command += ["--file", str(document), "--question", "Of what stone is the lighthouse made?"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEMO_SECONDS_MAX)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return DemoRun(folder, json.loads(done.stdout))

"""The inventory through a real (if fake) NVML library: the code path of a machine with GPUs, and each way it can be half broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parent.parent / "fake_nvml" / "nvml.c"
REPORT = """
import dataclasses, json
from gpumarket.node.inventory import take_inventory
print(json.dumps(dataclasses.asdict(take_inventory())))
"""


def inventory(folder: Path, *defines: str) -> dict[str, Any]:
    """What a provider sees on a machine with this library, in a process of its own: a library is loaded once."""
    compiler = shutil.which("cc")
    assert compiler, "a C compiler is one of the system packages that the project names"
    flags = [f"-D{define}" for define in defines]
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", *flags, "-o", str(folder / "libnvidia-ml.so.1"), str(SOURCE)]
    subprocess.run(command, check=True, timeout=60)
    return seen(folder)


def seen(folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True, check=True, timeout=60)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_inventory_of_two_gpus_names_class_memory_and_capability(tmp_path: Path) -> None:
    found = inventory(tmp_path, "DEVICES=2")
    assert found["driver"] == "999.01"
    assert found["gpus"][0] == {
        "index": 0,
        "gpu_class": "NVIDIA Test 9000",
        "uuid": "GPU-0000-0",
        "vram_bytes": 24 << 30,
        "compute_capability": 90,
    }
    assert found["gpus"][1]["gpu_class"] == "NVIDIA Test 100"
    assert found["notes"] == []


def test_inventory_with_missing_symbols_keeps_the_gpu_and_notes_them(tmp_path: Path) -> None:
    found = inventory(tmp_path, "OLD_DRIVER")
    assert found["gpus"][0]["compute_capability"] == 0
    assert found["gpus"][0]["vram_bytes"] == 24 << 30
    assert [note.split(":")[1].strip() for note in found["notes"]] == ["compute capability", "MIG mode"]
    assert all("Function Not Found" in note for note in found["notes"])


def test_inventory_with_unsupported_memory_keeps_the_gpu_and_says_nothing_it_was_not_told(tmp_path: Path) -> None:
    found = inventory(tmp_path, "UNIFIED_MEMORY")
    assert (found["gpus"][0]["gpu_class"], found["gpus"][0]["vram_bytes"]) == ("NVIDIA Test 9000", 0)
    assert any("memory: Not Supported" in note for note in found["notes"])


def test_inventory_with_a_lost_gpu_offers_the_other(tmp_path: Path) -> None:
    found = inventory(tmp_path, "DEVICES=2", "LOST_GPU")
    assert [gpu["index"] for gpu in found["gpus"]] == [0]
    assert any(note.startswith("GPU 1: handle") for note in found["notes"])


def test_inventory_of_a_partitioned_gpu_says_so(tmp_path: Path) -> None:
    found = inventory(tmp_path, "MIG_ENABLED")
    assert any("partitioned" in note for note in found["notes"])


@pytest.mark.parametrize("define", ["NO_DRIVER", "DEVICES=0"])
def test_inventory_without_a_usable_gpu_is_a_cpu_labelled_so_with_the_reason(tmp_path: Path, define: str) -> None:
    found = inventory(tmp_path, define)
    assert [(gpu["gpu_class"], gpu["index"], gpu["uuid"]) for gpu in found["gpus"]] == [("CPU", -1, "")]
    assert any("offered as CPU" in note for note in found["notes"])


def test_inventory_without_the_library_is_a_cpu_and_names_the_library(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("no library at all")  # shadows the one of a machine that has GPUs
    found = seen(tmp_path)
    assert found["gpus"][0]["gpu_class"] == "CPU"
    assert any("NVML does not start" in note and "Not Found" in note for note in found["notes"])

"""What a GPU class can be: rates between a lax lowest and the peak, memory up to the largest board, and names as drivers give them."""

from __future__ import annotations

import pytest

from gpumarket.settlement.gpu_classes import ANY_PEAK_TFLOPS, OVERHEAD_SECONDS, class_of, flaw_of_memory, flaw_of_rate
from gpumarket.settlement.gpu_proof import operations

WORK = operations(4_096, 256)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 67.0),
        ("NVIDIA A100-SXM4-80GB", 19.5),
        ("NVIDIA A10", 31.2),
        ("NVIDIA A10G", 35.0),
        ("NVIDIA L4", 30.3),
        ("NVIDIA L40S", 91.6),
        ("NVIDIA Tesla T4", 8.1),
        ("Tesla V100-SXM2-16GB", 16.4),
        ("NVIDIA GeForce RTX 4080 SUPER", 52.2),
        ("NVIDIA GeForce RTX 3080", 30.6),
        ("NVIDIA RTX A6000", 38.7),
        ("NVIDIA XL400", ANY_PEAK_TFLOPS),
        ("CPU", 50.0),
    ],
)
def test_class_is_found_in_the_drivers_name(name: str, peak: float) -> None:
    assert class_of(name).peak_tflops == peak


def test_rate_above_the_peak_is_another_device_or_less_work() -> None:
    assert not flaw_of_rate("NVIDIA H200", 60_000_000, WORK)
    assert "ends at" in flaw_of_rate("NVIDIA H200", 80_000_000, WORK)
    assert "ends at" in flaw_of_rate("Tesla T4", 20_000_000, WORK), "a faster board that answers for a cheaper one"
    assert "ends at" in flaw_of_rate("CPU", 60_000_000, WORK)
    assert "ends at" in flaw_of_rate("NVIDIA XL400", 300_000_000, WORK)


def test_rate_that_no_slow_host_explains_is_too_low() -> None:
    slowest = WORK / (OVERHEAD_SECONDS + WORK / (0.25 * 67e12)) / 1e6
    assert not flaw_of_rate("NVIDIA H200", int(slowest * 1.01), WORK)
    assert "at least" in flaw_of_rate("NVIDIA H200", int(slowest * 0.99), WORK)
    assert not flaw_of_rate("CPU", 1, WORK), "a CPU says CPU and promises no rate"
    assert not flaw_of_rate("NVIDIA XL400", 1, WORK), "the scheduler's own floor holds for classes that are not known"


def test_memory_above_the_largest_board_is_refused() -> None:
    assert not flaw_of_memory("NVIDIA H200", 143_771 * 2**20)
    assert "the class ends at 141" in flaw_of_memory("NVIDIA H200", 160 * 2**30)
    assert not flaw_of_memory("NVIDIA XL400", 10**15)
    assert not flaw_of_memory("CPU", 10**15)

"""What a GPU class can be: the rates that are plausible for it, and the memory it comes with. Pure.

A measured rate above the class's peak was not measured on it; one so slow that even a slow host and a quarter of the peak do not explain
it was not either. Peaks are dense float32 without tensor cores (the proof refuses TF32), in TFLOP/s, from the makers' data sheets:

    H100, H200, B200   nvidia.com/en-us/data-center/{h100,h200,dgx-b200}          A100, A30, A10, A40, A2   .../{a100,a30,a10,a40,a2}
    L4, L40, L40S      .../{l4,l40,l40s}      V100, P100, T4   .../{v100,p100,tesla-t4}      MI210, MI250X, MI300X   amd.com/en/products
    GeForce, RTX       the architecture white papers of Turing, Ampere, Ada and Blackwell (images.nvidia.com)

The class is what the driver calls the device; a class that is not in the table is held to the general limits only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PEAK_MARGIN = 1.15
"""Boards that are clocked higher than the data sheet's."""
PEAK_SHARE = 0.25
"""Of the peak that any healthy device reaches in a large float32 product; 0.6 to 0.9 are usual."""
OVERHEAD_SECONDS = 8.0
"""Most that drawing the matrices, copying them and hashing the rows may take around the products, on a slow and busy host."""
MEMORY_MARGIN = 1.02
"""Drivers count some classes' memory a little above the label."""
ANY_PEAK_TFLOPS = 250.0
CPU_PEAK_TFLOPS = 50.0
"""Two sockets of 128 cores with 512 bit vectors at 3 GHz are below it."""
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class GpuClass:
    """A class: peak float32 rate in TFLOP/s, and the most memory that a device of it has, in GiB (0 is not known)."""

    peak_tflops: float
    memory_gib: float = 0.0


_ANY, _CPU = GpuClass(ANY_PEAK_TFLOPS), GpuClass(CPU_PEAK_TFLOPS)
_CLASSES = {
    "B200": GpuClass(80.0, 192),
    "H200": GpuClass(67.0, 141),
    "H100": GpuClass(67.0, 96),
    "GH200": GpuClass(67.0, 144),
    "A100": GpuClass(19.5, 80),
    "A40": GpuClass(37.4, 48),
    "A30": GpuClass(10.3, 24),
    "A10": GpuClass(31.2, 24),
    "A10G": GpuClass(35.0, 24),
    "A2": GpuClass(4.5, 16),
    "L40S": GpuClass(91.6, 48),
    "L40": GpuClass(90.5, 48),
    "L4": GpuClass(30.3, 24),
    "V100": GpuClass(16.4, 32),
    "P100": GpuClass(10.6, 16),
    "T4": GpuClass(8.1, 16),
    "RTX 6000 Ada Generation": GpuClass(91.1, 48),
    "RTX A6000": GpuClass(38.7, 48),
    "RTX 5090": GpuClass(104.8, 32),
    "RTX 5080": GpuClass(56.3, 16),
    "RTX 4090": GpuClass(82.6, 24),
    "RTX 4080 SUPER": GpuClass(52.2, 16),
    "RTX 4080": GpuClass(48.7, 16),
    "RTX 4070": GpuClass(44.1, 16),
    "RTX 3090 Ti": GpuClass(40.0, 24),
    "RTX 3090": GpuClass(35.6, 24),
    "RTX 3080 Ti": GpuClass(34.1, 12),
    "RTX 3080": GpuClass(30.6, 12),
    "RTX 2080 Ti": GpuClass(14.2, 11),
    "MI300X": GpuClass(163.4, 192),
    "MI250X": GpuClass(95.7, 128),
    "MI210": GpuClass(45.3, 64),
}
_NAMES = re.compile("|".join(rf"(?<![A-Za-z0-9]){re.escape(n)}(?![A-Za-z0-9])" for n in sorted(_CLASSES, key=len, reverse=True)))


def class_of(name: str) -> GpuClass:
    """The class that a driver's name belongs to; the general limits for a name that is not known."""
    if name == "CPU":
        return _CPU
    found = _NAMES.search(name)
    return _CLASSES[found.group()] if found else _ANY


def flaw_of_rate(name: str, mflops: int, operations: int) -> str:
    """What is wrong with a rate measured over a proof of so many float32 operations; empty when it is plausible for the class."""
    kind = class_of(name)
    highest = kind.peak_tflops * PEAK_MARGIN * 1e6
    if mflops > highest:
        return f"{mflops:,} MFLOP/s were measured on a device that says {name!r}; the class ends at {highest:,.0f}"
    if kind in (_ANY, _CPU):
        return ""
    seconds = OVERHEAD_SECONDS + operations / (PEAK_SHARE * kind.peak_tflops * 1e12)
    lowest = operations / seconds / 1e6
    if mflops < lowest:
        return f"{mflops:,} MFLOP/s were measured on a device that says {name!r}; the class shows at least {lowest:,.0f} in this proof"
    return ""


def flaw_of_memory(name: str, vram_bytes: int) -> str:
    """What is wrong with the memory that an offer states for a device of this class; empty when it may be so."""
    kind = class_of(name)
    if kind.memory_gib and vram_bytes > kind.memory_gib * _GIB * MEMORY_MARGIN:
        return f"{vram_bytes / _GIB:.1f} GiB are offered on {name!r}; the class ends at {kind.memory_gib:.0f}"
    return ""

"""Which GPUs are here, by NVML; where there is none, the CPU, labelled CPU.

Every getter is guarded by itself: drivers and libraries differ in what they know, and one missing answer must not hide a GPU. Invariant:
nothing falls back silently: whatever could not be read stands in `notes`, in words for the owner. Never: a name that the driver did not
say.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pynvml

T = TypeVar("T")
CPU_CLASS = "CPU"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device that can compute. `index` counts the driver's GPUs; -1 is the CPU."""

    index: int
    gpu_class: str
    uuid: str
    vram_bytes: int
    """0 when the driver does not say; for the CPU, the machine's memory."""
    compute_capability: int
    """major * 10 + minor; 0 where unknown or without meaning."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the machine has. `gpus` is never empty: the CPU stands there when no GPU does."""

    gpus: tuple[Gpu, ...]
    notes: tuple[str, ...]
    driver: str = ""

    @property
    def has_gpu(self) -> bool:
        return self.gpus[0].index >= 0

    def find(self, uuid: str) -> Gpu | None:
        """The device with this UUID; the CPU's is empty."""
        return next((gpu for gpu in self.gpus if gpu.uuid == uuid), None)


def take_inventory() -> Inventory:
    """Ask the driver. Never raises for hardware: what is missing is a note."""
    notes: list[str] = []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        notes.append(f"no NVIDIA GPU: NVML does not start ({_why(error)}); this machine is offered as {CPU_CLASS}")
        return Inventory((_cpu(notes),), tuple(notes))
    try:
        driver = _ask("driver version", pynvml.nvmlSystemGetDriverVersion, "", notes)
        count = _ask("device count", pynvml.nvmlDeviceGetCount, 0, notes)
        gpus = tuple(gpu for gpu in (_gpu(index, notes) for index in range(count)) if gpu is not None)
    finally:
        _ask("shutdown", pynvml.nvmlShutdown, None, notes)
    if not gpus:
        notes.append(f"NVML answers but shows no usable GPU; this machine is offered as {CPU_CLASS}")
        gpus = (_cpu(notes),)
    return Inventory(gpus, tuple(notes), _text(driver))


def _gpu(index: int, notes: list[str]) -> Gpu | None:
    what = f"GPU {index}"
    handle: Any = _ask(f"{what}: handle", lambda: pynvml.nvmlDeviceGetHandleByIndex(index), None, notes)
    if handle is None:
        return None
    name = _text(_ask(f"{what}: name", lambda: pynvml.nvmlDeviceGetName(handle), "", notes))
    if not name:
        notes.append(f"{what} has no name and is not offered: clients choose by class")
        return None
    uuid = _text(_ask(f"{what}: UUID", lambda: pynvml.nvmlDeviceGetUUID(handle), "", notes))
    memory = _ask(f"{what}: memory", lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).total), 0, notes)
    major, minor = _ask(f"{what}: compute capability", lambda: pynvml.nvmlDeviceGetCudaComputeCapability(handle), (0, 0), notes)
    mig = _ask(f"{what}: MIG mode", lambda: pynvml.nvmlDeviceGetMigMode(handle)[0], 0, notes)
    if mig:
        notes.append(f"{what} is partitioned (MIG): it is offered as a whole, with the memory of the whole")
    return Gpu(index, name if name.startswith("NVIDIA") else f"NVIDIA {name}", uuid, memory, major * 10 + minor)


def _ask(what: str, getter: Callable[[], T], missing: T, notes: list[str]) -> T:
    try:
        return getter()
    except pynvml.NVMLError as error:
        notes.append(f"{what}: {_why(error)}")
        return missing


def _why(error: pynvml.NVMLError) -> str:
    """The library's words, or the code where even its error strings are missing."""
    try:
        return str(error)
    except pynvml.NVMLError:
        return f"NVML error {error.value}"


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _cpu(notes: list[str]) -> Gpu:
    """The CPU as an honest device. Its model goes to the notes: the class is what clients filter by."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    notes.append(f"CPU: {model}, {os.cpu_count() or 1} cores")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in os.sysconf_names else 0
    return Gpu(-1, CPU_CLASS, "", memory, 0)

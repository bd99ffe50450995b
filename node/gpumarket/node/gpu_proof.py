"""The provider's side of a GPU proof: compute, commit to the rows, then answer for them. The arithmetic is `settlement.gpu_proof`.

Invariants: the commitment leaves before the vector is known; one proof at a time on this machine, and one per scheduler in a given
time, so that challenges cannot be used to keep the GPU busy (I8).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.errors import Busy, ProtocolError
from gpumarket.core.ports import Clock
from gpumarket.core.units import Address, Hash
from gpumarket.node.gpu_process import DeviceProcess
from gpumarket.node.inventory import Gpu, Inventory
from gpumarket.settlement.gpu_proof import Row, Tree, answer, commit, open_rows, operations, products, require_size

ROWS_MAX = 64
CPU_KEEP_BYTES = 64 << 20
"""Most that a challenge may fill where the device is the CPU: its memory is this machine's, and is not sold as VRAM."""
VRAM_SHARE_MAX = 0.9
"""Of a GPU's memory: its driver and contexts take the rest."""


@dataclass(slots=True)
class Commitment:
    """A computed product: its root, and what is needed to answer for it."""

    root: Hash
    gpu: Gpu
    _rows: NDArray[np.float32]
    _tree: Tree
    _device: DeviceProcess
    _kept: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    """On the CPU; a GPU's process holds them in the GPU's memory."""
    _challenge: int = 0

    async def read(self, links: Sequence[int], rows: Sequence[int]) -> list[bytes]:
        """Rows of kept products, float32 little-endian. Raises ProtocolError for what was not to be kept, Busy when it was dropped."""
        if len(links) != len(rows) or not 1 <= len(links) <= ROWS_MAX or max(rows) >= len(self._rows):
            raise ProtocolError(f"a read of {len(links)} products and {len(rows)} rows; at most {ROWS_MAX} of each, as many")
        if self.gpu.index >= 0:
            return await self._device.read(self._challenge, list(zip(links, rows, strict=True)), len(self._rows))
        if not set(links) <= self._kept.keys():
            raise ProtocolError("a read of a product that was not to be kept")
        return [self._kept[link][row].astype("<f4").tobytes() for link, row in zip(links, rows, strict=True)]

    async def release(self) -> None:
        """Give the memory back to the jobs."""
        self._kept.clear()
        if self.gpu.index >= 0:
            await self._device.drop(self._challenge)

    def open(self, vector_seed: bytes, indices: list[int]) -> tuple[bytes, list[Row]]:
        """C·r (float64 LE) and the asked rows. Raises ProtocolError for too many rows or one outside."""
        if len(vector_seed) != 32 or len(indices) > ROWS_MAX:
            raise ProtocolError(f"a GPU opening of {len(indices)} rows; at most {ROWS_MAX}, with a vector seed of 32 bytes")
        return answer(self._rows, vector_seed), open_rows(self._rows, self._tree, indices)


class Prover:
    """Answers challenges for the devices of this machine."""

    def __init__(self, inventory: Inventory, clock: Clock, *, pause_seconds: float, size_max: int) -> None:
        self.measured_mflops: dict[str, int] = {}
        """By UUID: million float32 operations per second of the last product, as measured here."""
        self._inventory, self._clock = inventory, clock
        self._pause_seconds, self._size_max = pause_seconds, size_max
        self._last: dict[Address, float] = {}
        self._one = asyncio.Lock()
        self._device = DeviceProcess()

    async def commit(self, scheduler: Address, seed: bytes, size: int, repeats: int, uuid: str, keep: int = 0) -> Commitment:
        """Compute and commit, with the last `keep` products held in the device's memory until `release`.

        Raises Busy for a scheduler that asks too often or while jobs have the memory, ProtocolError for an impossible challenge.
        """
        gpu = self._inventory.find(uuid)
        if gpu is None:
            raise ProtocolError(f"there is no GPU {uuid!r} here")
        if len(seed) != 32:
            raise ProtocolError("a GPU challenge's seed is 32 bytes")
        require_size(size, repeats)
        if size > self._size_max:
            raise ProtocolError(f"a GPU challenge of size {size}; this provider takes at most {self._size_max}")
        room = VRAM_SHARE_MAX * gpu.vram_bytes if gpu.index >= 0 else CPU_KEEP_BYTES
        if keep > repeats or keep * 4 * size * size > room:
            raise ProtocolError(f"a GPU challenge that keeps {keep} of {repeats} products of size {size}; there is room for {room:,.0f} B")
        self._limit(scheduler)
        async with self._one:
            made = Commitment(Hash(b""), gpu, np.empty((0, 0), np.float32), Tree(()), self._device)
            started = time.perf_counter()
            if gpu.index >= 0:
                made._challenge, made._rows = await self._device.multiply(seed, size, repeats, gpu.index, keep)
            else:  # with numpy: the same product without 220 MiB of torch
                made._kept = await asyncio.to_thread(products, seed, size, repeats, keep)
                made._rows = made._kept[repeats]
            seconds = time.perf_counter() - started
            self.measured_mflops[uuid] = int(operations(size, repeats) / max(seconds, 1e-9) / 1e6)
            made.root, made._tree = await asyncio.to_thread(commit, made._rows)
        return made

    async def start(self) -> None:
        """Load CUDA ahead of the first challenge where there is a GPU."""
        if self._inventory.has_gpu:
            await self._device.start()

    async def close(self) -> None:
        await self._device.close()

    def _limit(self, scheduler: Address) -> None:
        now = self._clock.monotonic()
        self._last = {who: at for who, at in self._last.items() if now - at < self._pause_seconds}
        at = self._last.get(scheduler)
        if at is not None:
            wait = self._pause_seconds - (now - at)
            raise Busy("a GPU proof was asked for a moment ago", retry_after_seconds=round(wait, 1), hint="ask less often")
        self._last[scheduler] = now

"""The provider's side of a GPU proof: compute, commit to the rows, then answer for them. The arithmetic is `settlement.gpu_proof`.

Invariants: the commitment leaves before the vector is known; one proof at a time on this machine, and one per scheduler in a given
time, so that challenges cannot be used to keep the GPU busy (I8).
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.errors import Busy, EngineFailed, ProtocolError
from gpumarket.core.ports import Clock
from gpumarket.core.units import Address, Hash
from gpumarket.node.gpu_device import REQUEST
from gpumarket.node.inventory import Gpu, Inventory
from gpumarket.settlement.gpu_proof import Row, Tree, answer, commit, open_rows, operations, product, require_size

ROWS_MAX = 64
PROOF_SECONDS_MAX = 120.0
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "PYTHONPATH")


@dataclass(frozen=True, slots=True)
class Commitment:
    """A computed product: its root, and what is needed to answer for it."""

    root: Hash
    gpu: Gpu
    _rows: NDArray[np.float32]
    _tree: Tree

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
        self._child: asyncio.subprocess.Process | None = None

    async def commit(self, scheduler: Address, seed: bytes, size: int, repeats: int, uuid: str) -> Commitment:
        """Compute and commit. Raises Busy for a scheduler that asks too often, ProtocolError for an impossible challenge."""
        gpu = self._inventory.find(uuid)
        if gpu is None:
            raise ProtocolError(f"there is no GPU {uuid!r} here")
        if len(seed) != 32:
            raise ProtocolError("a GPU challenge's seed is 32 bytes")
        require_size(size, repeats)
        if size > self._size_max:
            raise ProtocolError(f"a GPU challenge of size {size}; this provider takes at most {self._size_max}")
        self._limit(scheduler)
        async with self._one:
            started = time.perf_counter()
            rows = await self._multiply(gpu, seed, size, repeats)
            seconds = time.perf_counter() - started
            self.measured_mflops[uuid] = int(operations(size, repeats) / max(seconds, 1e-9) / 1e6)
            root, tree = await asyncio.to_thread(commit, rows)
        return Commitment(root, gpu, rows, tree)

    async def start(self) -> None:
        """Load CUDA ahead of the first challenge where there is a GPU."""
        if self._inventory.has_gpu:
            await self._device_process()

    async def close(self) -> None:
        if self._child is not None and self._child.returncode is None:
            self._child.kill()
            await self._child.wait()
        self._child = None

    def _limit(self, scheduler: Address) -> None:
        now = self._clock.monotonic()
        self._last = {who: at for who, at in self._last.items() if now - at < self._pause_seconds}
        at = self._last.get(scheduler)
        if at is not None:
            wait = self._pause_seconds - (now - at)
            raise Busy("a GPU proof was asked for a moment ago", retry_after_seconds=round(wait, 1), hint="ask less often")
        self._last[scheduler] = now

    async def _multiply(self, gpu: Gpu, seed: bytes, size: int, repeats: int) -> NDArray[np.float32]:
        """On a GPU in its process, with torch; on the CPU here, with numpy: the same product without 220 MiB of torch."""
        if gpu.index < 0:
            return await asyncio.to_thread(product, seed, size, repeats)
        child = await self._device_process()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(REQUEST.pack(seed, size, repeats, gpu.index))
            raw = await asyncio.wait_for(child.stdout.readexactly(4 * size * size), PROOF_SECONDS_MAX)
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            await self.close()
            raise EngineFailed(f"the GPU process did not compute the proof: {error}", hint="see the log and nvidia-smi") from error
        return np.frombuffer(raw, dtype="<f4").reshape(size, size)

    async def _device_process(self) -> asyncio.subprocess.Process:
        if self._child is None or self._child.returncode is not None:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "gpumarket.node.gpu_device",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                limit=1 << 24,
            )
        return self._child

"""The daemon's side of the process that computes GPU proofs (`gpu_device`): one request at a time, a death is an error and not ours.

Invariant: what one challenge keeps on a device is read and dropped under that challenge's number only; a newer one takes the memory.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.errors import Busy, EngineFailed
from gpumarket.node.gpu_device import DONE, DROP, MULTIPLY, NO_MEMORY, PLACE, READ, REQUEST, STATUS

PROOF_SECONDS_MAX = 120.0
RETRY_SECONDS = 10.0
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "PYTHONPATH")
_NO_SEED = bytes(32)


class DeviceProcess:
    """Started on first use. `close` at the end."""

    def __init__(self) -> None:
        self._child: asyncio.subprocess.Process | None = None
        self._one = asyncio.Lock()
        self._challenge = 0

    async def multiply(self, seed: bytes, size: int, repeats: int, index: int, keep: int) -> tuple[int, NDArray[np.float32]]:
        """(number of the challenge, last product [size, size]). Raises Busy while jobs have the memory, EngineFailed."""
        async with self._one:
            self._challenge += 1
            record = REQUEST.pack(MULTIPLY, seed, size, repeats, index, keep)
            status, raw = await self._ask(record, 4 * size * size)
            if status == NO_MEMORY:
                raise Busy("jobs have the GPU's memory now", retry_after_seconds=RETRY_SECONDS, hint="ask again when it is less busy")
            return self._challenge, np.frombuffer(raw, dtype="<f4").reshape(size, size)

    async def read(self, challenge: int, places: Sequence[tuple[int, int]], size: int) -> list[bytes]:
        """Rows (product, row) that the challenge keeps. Raises Busy when a newer challenge took the memory, EngineFailed."""
        async with self._one:
            record = REQUEST.pack(READ, _NO_SEED, len(places), 0, 0, 0) + b"".join(PLACE.pack(*place) for place in places)
            status, raw = (NO_MEMORY, b"") if challenge != self._challenge else await self._ask(record, 4 * size * len(places))
        if status != DONE:
            raise Busy("what this challenge kept was dropped for a newer one", retry_after_seconds=RETRY_SECONDS, hint="ask again")
        return [raw[at : at + 4 * size] for at in range(0, len(raw), 4 * size)]

    async def drop(self, challenge: int) -> None:
        """Free what the challenge keeps; nothing when a newer one has it."""
        async with self._one:
            if challenge == self._challenge and self._child is not None:
                await self._ask(REQUEST.pack(DROP, _NO_SEED, 0, 0, 0, 0), 0)

    async def start(self) -> asyncio.subprocess.Process:
        """Start it ahead of the first request."""
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

    async def close(self) -> None:
        """End it."""
        if self._child is not None and self._child.returncode is None:
            self._child.kill()
            await self._child.wait()
        self._child = None

    async def _ask(self, record: bytes, size: int) -> tuple[int, bytes]:
        child = await self.start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(record)
            (status,) = STATUS.unpack(await asyncio.wait_for(child.stdout.readexactly(STATUS.size), PROOF_SECONDS_MAX))
            raw = await asyncio.wait_for(child.stdout.readexactly(size), PROOF_SECONDS_MAX) if status == DONE else b""
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            await self.close()
            raise EngineFailed(f"the GPU process did not compute the proof: {error}", hint="see the log and nvidia-smi") from error
        except asyncio.CancelledError:
            await self.close()  # an answer that nobody waits for would be taken for the next one's
            raise
        return status, raw

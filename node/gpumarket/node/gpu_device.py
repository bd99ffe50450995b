"""The process that multiplies on a CUDA device for a GPU proof: `python -m gpumarket.node.gpu_device`.

It is kept running by the daemon, so that a challenge times the product and not the loading of CUDA, and so that a driver's crash does
not take the wallet's process along. Requests and answers are fixed binary records on stdin and stdout; it holds no key and reads no
setting. The products of the newest challenge that are to be kept stay on the device until they are dropped or the next one comes.
"""

from __future__ import annotations

import struct
import sys
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpumarket.settlement.gpu_proof import matrices, signs

REQUEST = struct.Struct("<B32sIIiI")
"""What is wanted, then for MULTIPLY: seed, n, products, device index (-1: the CPU), products to keep; for READ the number of rows first."""
MULTIPLY, READ, DROP = 1, 2, 3
PLACE = struct.Struct("<II")
"""After READ, for each row: product (from 1), row."""
STATUS = struct.Struct("<B")
DONE, NO_MEMORY, NOT_KEPT = 0, 1, 2


class Device:
    """One chain at a time, computed with torch on one device in full float32."""

    def __init__(self) -> None:
        self.kept: dict[int, Any] = {}

    def multiply(self, seed: bytes, n: int, repeats: int, index: int, keep: int) -> NDArray[np.float32]:
        """The last C of the chain of `settlement.gpu_proof`, float32 [n, n]. Raises torch.OutOfMemoryError with nothing kept."""
        import torch

        self.drop()
        torch.backends.cuda.matmul.allow_tf32 = False  # TF32 keeps 10 bits of mantissa; the checker refuses it
        device = torch.device("cpu") if index < 0 else torch.device("cuda", index)
        first, second = matrices(seed, n)
        try:
            a, c = torch.from_numpy(first).to(device), torch.from_numpy(second).to(device)
            for link in range(1, repeats + 1):
                c = a @ (torch.from_numpy(signs(seed, n, link)).to(device)[:, None] * c)
                if link > repeats - keep:
                    self.kept[link] = c
            return np.asarray(c.cpu().numpy(), dtype=np.float32)
        except torch.OutOfMemoryError:
            self.drop()
            raise

    def read(self, places: list[tuple[int, int]]) -> bytes:
        """Rows of kept products, float32 little-endian one after the other. Raises KeyError for one that is not kept."""
        rows = [self.kept[link][row] for link, row in places]
        return b"".join(np.asarray(row.cpu().numpy(), dtype="<f4").tobytes() for row in rows)

    def drop(self) -> None:
        """Give the memory back to the jobs."""
        self.kept.clear()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()  # torch would hold on to it, and an engine in another process could not have it


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer requests until the daemon closes the pipe."""
    device = Device()
    while len(record := source.read(REQUEST.size)) == REQUEST.size:
        kind, seed, first, repeats, index, keep = REQUEST.unpack(record)
        status, payload = DONE, b""
        if kind == MULTIPLY:
            status, payload = _multiplied(device, seed, first, repeats, index, keep)
        elif kind == READ:
            places = [PLACE.unpack(source.read(PLACE.size)) for _ in range(first)]
            try:
                payload = device.read(places)
            except (KeyError, IndexError):
                status = NOT_KEPT
        else:
            device.drop()
        sink.write(STATUS.pack(status) + payload)
        sink.flush()


def _multiplied(device: Device, seed: bytes, n: int, repeats: int, index: int, keep: int) -> tuple[int, bytes]:
    import torch

    try:
        return DONE, device.multiply(seed, n, repeats, index, keep).astype("<f4").tobytes()
    except torch.OutOfMemoryError:
        return NO_MEMORY, b""


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # create the context now, not while a challenge is timed
    serve(sys.stdin.buffer, sys.stdout.buffer)

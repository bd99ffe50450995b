"""The process that multiplies on a CUDA device for a GPU proof: `python -m gpumarket.node.gpu_device`.

It is kept running by the daemon, so that a challenge times the product and not the loading of CUDA, and so that a driver's crash does
not take the wallet's process along. Requests and answers are fixed binary records on stdin and stdout; it holds no key and reads no
setting.
"""

from __future__ import annotations

import struct
import sys
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpumarket.settlement.gpu_proof import matrices, signs

REQUEST = struct.Struct("<32sIIi")
"""seed, n, products, device index (-1: the CPU)."""


def chained(seed: bytes, n: int, repeats: int, index: int) -> NDArray[np.float32]:
    """The last C of the chain of `settlement.gpu_proof`, float32 [n, n], computed with torch on one device in full float32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False  # TF32 keeps 10 bits of mantissa; the checker refuses it
    device = torch.device("cpu") if index < 0 else torch.device("cuda", index)
    first, second = matrices(seed, n)
    a, c = torch.from_numpy(first).to(device), torch.from_numpy(second).to(device)
    for link in range(1, repeats + 1):
        c = a @ (torch.from_numpy(signs(seed, n, link)).to(device)[:, None] * c)
    return np.asarray(c.cpu().numpy(), dtype=np.float32)


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer requests until the daemon closes the pipe."""
    while len(record := source.read(REQUEST.size)) == REQUEST.size:
        seed, n, repeats, index = REQUEST.unpack(record)
        sink.write(chained(seed, n, repeats, index).astype("<f4").tobytes())
        sink.flush()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # create the context now, not while a challenge is timed
    serve(sys.stdin.buffer, sys.stdout.buffer)

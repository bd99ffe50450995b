"""The noise that provider and checker share: Philox4x32-10 on integers, and one table that maps it to Gumbel values.

Invariant: the same (seed, position, token) gives the same float32 bit for bit, in numpy and in torch, on any device and any
processor. Hence integers only up to the table's index, and a table whose every entry is the correctly rounded float32 (its checksum
is in `tests/vectors/sampling.json`), however good the platform's `log` is.

This module must never import torch: `philox4x32` only multiplies, shifts and masks, so it runs unchanged on torch int64 tensors.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); its published test vectors are asserted.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from decimal import Decimal, localcontext
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

SEED_BYTES: Final = 32
TABLE_BITS: Final = 20
TABLE_SIZE: Final = 1 << TABLE_BITS

_MASK: Final = 0xFFFFFFFF
_ROUNDS: Final = 10
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_DOMAIN: Final = b"gpumarket/gumbel/1"


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10. Words are ints, int64 arrays or int64 tensors (they broadcast), each in [0, 2^32).

    A product of two 32-bit words may pass 2^63 and wrap: its low 64 bits are right all the same, and a shift followed by a mask reads
    the high word correctly from a negative number. So int64, the one integer type that both libraries have, is enough.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@functools.lru_cache(maxsize=4096)
def seed_words(seed: bytes) -> tuple[int, int, int, int]:
    """A 32-byte seed as Philox's 64-bit key and the two free words of its counter. Raises ValueError on another length."""
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a sampling seed has {SEED_BYTES} bytes, not {len(seed)}")
    digest = hashlib.sha256(_DOMAIN + seed).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
    return words[0], words[1], words[2], words[3]


def noise_index(words: tuple[Any, Any, Any, Any], position: Any, tokens: Any) -> Any:
    """Index into the Gumbel table, in [0, 2^20), for each token id at its absolute position.

    All three broadcast together, so a batch of rows is one call: words and positions [N, 1], tokens [N, K], all int64.
    """
    word, _, _, _ = philox4x32((tokens, tokens * 0 + position, words[2], words[3]), (words[0], words[1]))
    return word >> (32 - TABLE_BITS)


def gumbel_noise(seeds: Sequence[bytes], positions: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Standard Gumbel noise, float32 [N, K], for token ids [N, K]; row n uses seeds[n] at the absolute positions[n]."""
    words = np.array([seed_words(seed) for seed in seeds], dtype=np.int64).reshape(-1, 4, 1)
    index = noise_index((words[:, 0], words[:, 1], words[:, 2], words[:, 3]), positions.reshape(-1, 1), tokens)
    values: NDArray[np.float32] = gumbel_table()[index]
    return values


@functools.cache
def gumbel_table() -> NDArray[np.float32]:
    """-ln(-ln((i + 1/2) / 2^20)) for i in [0, 2^20), each entry correctly rounded to float32. 4 MiB, built once, read-only."""
    index = np.arange(TABLE_SIZE, dtype=np.float64)
    wide = -np.log(-np.log((index + 0.5) / TABLE_SIZE))
    table = wide.astype(np.float32)
    for i in _near_midpoint(wide, table):
        table[i] = _round_exactly(int(i), table[i])
    table.flags.writeable = False
    return table


def _near_midpoint(wide: NDArray[np.float64], table: NDArray[np.float32]) -> NDArray[np.int64]:
    """Entries so near to the middle of two floats that a last-bit error of the platform's `log` could round them the other way."""
    tolerance = 1e-13 * np.maximum(1.0, np.abs(wide))
    near = np.zeros(len(wide), dtype=bool)
    for direction in (-np.inf, np.inf):
        neighbour = np.nextafter(table, np.float32(direction), dtype=np.float32)
        midpoint = (table.astype(np.float64) + neighbour.astype(np.float64)) / 2
        near |= np.abs(wide - midpoint) < tolerance
    found: NDArray[np.int64] = np.flatnonzero(near)
    return found


def _round_exactly(i: int, guess: np.float32) -> np.float32:
    """The float32 nearest to the entry, from 40 decimal digits. `guess` is within one step of it."""
    with localcontext() as context:
        context.prec = 40
        exact = -(-((Decimal(2 * i + 1) / Decimal(2 * TABLE_SIZE)).ln())).ln()
        steps = (np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf)))
        return min(steps, key=lambda step: abs(Decimal(float(step)) - exact))

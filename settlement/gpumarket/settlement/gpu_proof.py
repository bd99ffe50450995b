"""The arithmetic of a GPU proof, shared by the provider that answers and the scheduler that checks. Pure numpy.

The challenge is a chain of seeded products, C_0 = B and C_k = A · (s_k ∘ C_{k-1}), with fresh random signs s_k on the rows, so that the
chain cannot be shortened by squaring A. The provider commits to the rows of the last C; only then it learns a vector r and which rows to
open. Checking costs O(n²) a link: A · (s_k ∘ x) along the chain from x = B · r must give C · r (Freivalds 1979, "Fast probabilistic
algorithms"), and each opened row must be the committed one and agree with C · r. Whoever made up a share f
of the rows passes with (1 - f)^k for k rows opened.

Every random number is a raw Philox4x64 word, whose stream numpy never changes; nothing depends on a version of its distributions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.errors import BadProof, ProtocolError
from gpumarket.core.units import Hash

SIZE_MIN, SIZE_MAX = 64, 16_384
REPEATS_MAX = 4_096
RELATIVE_ERROR_MAX = 5e-5
"""Largest |answer - C·r| / |C·r| taken (Euclidean norms). Measured in float32: 9e-7 at n = 512 and 8 links, 2e-6 at 2,048 and 32; half
precision is off by 9e-4 and 2e-3, and even rounding only the last C to half by 2e-4: refused. (TF32 has the mantissa of half.)"""
ROW_ERROR_MAX = 2e-4
"""The same for one row, against the typical size of an element of C·r. Measured: 7e-6 at most."""


@dataclass(frozen=True, slots=True)
class Row:
    """One opened row: `values` float32 little-endian, `path` sibling hashes from the leaf up."""

    index: int
    values: bytes
    path: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class KeptRow:
    """One row of a product that was kept: `link` counts from 1, `values` float32 little-endian."""

    link: int
    index: int
    values: bytes


@dataclass(frozen=True, slots=True)
class Tree:
    """Merkle tree over the rows (RFC 6962 hashes): `levels[0]` are the leaves, the last level is the root alone."""

    levels: tuple[tuple[bytes, ...], ...]


def require_size(n: int, repeats: int) -> None:
    """Raises ProtocolError for a challenge that nobody has to answer: n is a power of two within limits, at least one link."""
    if not SIZE_MIN <= n <= SIZE_MAX or n & (n - 1) or not 1 <= repeats <= REPEATS_MAX:
        raise ProtocolError(f"a GPU challenge of size {n} with {repeats} products; sizes are powers of two, {SIZE_MIN} to {SIZE_MAX}")


def matrices(seed: bytes, n: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A and B, n x n float32, uniform with variance 1/n, so that a chain neither grows nor vanishes."""
    scale = np.float32((3.0 / n) ** 0.5)
    a, b = (_uniform(seed, label, n * n).astype(np.float32).reshape(n, n) * scale for label in (b"A", b"B"))
    return a, b


def signs(seed: bytes, n: int, link: int) -> NDArray[np.float32]:
    """The n signs (1 or -1) of one link, counted from 1."""
    raw = _words(seed, b"s" + link.to_bytes(4, "big"), -(-n // 64)).view(np.uint8)
    return np.unpackbits(raw)[:n].astype(np.float32) * 2 - 1


def vector(seed: bytes, n: int) -> NDArray[np.float64]:
    """r: n float64 in [-1, 1), drawn from a seed that is told after the commitment."""
    return _uniform(seed, b"r", n)


def product(seed: bytes, n: int, repeats: int) -> NDArray[np.float32]:
    """The last C of the chain, with numpy. A provider computes the same on its device."""
    return products(seed, n, repeats, 1)[repeats]


def products(seed: bytes, n: int, repeats: int, keep: int) -> dict[int, NDArray[np.float32]]:
    """The last `keep` products of the chain by link, with numpy; the last one always."""
    a, c = matrices(seed, n)
    kept = {}
    for link in range(1, repeats + 1):
        c = a @ (signs(seed, n, link)[:, None] * c)
        if link > repeats - max(1, keep):
            kept[link] = c
    return kept


def operations(n: int, repeats: int) -> int:
    """Floating point operations of the chain's products."""
    return 2 * n**3 * repeats


def commit(rows: NDArray[np.float32]) -> tuple[Hash, Tree]:
    """Merkle root over the rows' bytes (equal to core.terms.merkle_root of them), and the tree to open them from."""
    data = np.ascontiguousarray(rows, dtype="<f4")
    level = tuple(_leaf(row.tobytes()) for row in data)
    levels = [level]
    while len(level) > 1:
        level = tuple(_node(level[i], level[i + 1]) for i in range(0, len(level), 2))
        levels.append(level)
    return Hash(level[0]), Tree(tuple(levels))


def answer(rows: NDArray[np.float32], vector_seed: bytes) -> bytes:
    """C · r in float64 little-endian."""
    r = vector(vector_seed, rows.shape[0])
    return (rows.astype(np.float64) @ r).astype("<f8").tobytes()


def open_rows(rows: NDArray[np.float32], tree: Tree, indices: Sequence[int]) -> list[Row]:
    """The asked rows with their paths. Raises ProtocolError for an index outside."""
    opened = []
    for index in indices:
        if not 0 <= index < rows.shape[0]:
            raise ProtocolError(f"row {index} of {rows.shape[0]} was asked for")
        path = tuple(level[(index >> depth) ^ 1] for depth, level in enumerate(tree.levels[:-1]))
        opened.append(Row(index, rows[index].astype("<f4").tobytes(), path))
    return opened


def check(
    seed: bytes,
    n: int,
    repeats: int,
    root: bytes,
    vector_seed: bytes,
    asked: Sequence[int],
    answered: bytes,
    opened: Sequence[Row],
    kept: Sequence[KeptRow] = (),
) -> None:
    """Raises BadProof unless `answered` is C·r of the seeded chain, every asked row is committed to and agrees with it, and every row in
    `kept` is that of its product.
    """
    if len(answered) != 8 * n:
        raise BadProof(f"the product has {len(answered)} bytes, not {8 * n}")
    claimed = np.frombuffer(answered, dtype="<f8")
    r = vector(vector_seed, n)
    along = _chained(seed, n, repeats, r, {repeats, *(row.link for row in kept)})
    expected = along[repeats]
    scale = float(np.linalg.norm(expected))
    error = float(np.linalg.norm(claimed - expected)) / scale
    if not error <= RELATIVE_ERROR_MAX:  # NaN included
        raise BadProof(f"the product is off by {error:.2e} of its norm; float32 stays below {RELATIVE_ERROR_MAX:.0e}")
    if [row.index for row in opened] != list(asked):
        raise BadProof("other rows were opened than asked for")
    for row in opened:
        _check_row(row, n, root, r, float(claimed[row.index]), scale)
    for one in kept:
        _check_kept(one, n, r, along[one.link])


def _chained(seed: bytes, n: int, repeats: int, r: NDArray[np.float64], wanted: Set[int]) -> dict[int, NDArray[np.float64]]:
    """C_k · r of the wanted links k."""
    a, b = (m.astype(np.float64) for m in matrices(seed, n))
    x = b @ r
    along = {}
    for link in range(1, repeats + 1):
        x = a @ (signs(seed, n, link) * x)
        if link in wanted:
            along[link] = np.asarray(x, dtype=np.float64)
    return along


def _check_kept(row: KeptRow, n: int, r: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    if len(row.values) != 4 * n:
        raise BadProof(f"row {row.index} of product {row.link} has {len(row.values)} bytes, not {4 * n}")
    value = float(np.frombuffer(row.values, dtype="<f4").astype(np.float64) @ r)
    if not abs(value - expected[row.index]) <= ROW_ERROR_MAX * float(np.linalg.norm(expected)) / n**0.5:
        raise BadProof(f"row {row.index} of product {row.link}, read from memory, gives {value:.6g}, not {expected[row.index]:.6g}")


def _check_row(row: Row, n: int, root: bytes, r: NDArray[np.float64], claimed: float, scale: float) -> None:
    if len(row.values) != 4 * n or len(row.path) != n.bit_length() - 1:
        raise BadProof(f"row {row.index} is not a row of {n} numbers with its path")
    node = _leaf(row.values)
    for depth, sibling in enumerate(row.path):
        node = _node(sibling, node) if row.index >> depth & 1 else _node(node, sibling)
    if node != root:
        raise BadProof(f"row {row.index} is not the one committed to")
    value = float(np.frombuffer(row.values, dtype="<f4").astype(np.float64) @ r)
    if not abs(value - claimed) <= ROW_ERROR_MAX * scale / n**0.5:
        raise BadProof(f"row {row.index} gives {value:.6g}, the product says {claimed:.6g}")


def _uniform(seed: bytes, label: bytes, count: int) -> NDArray[np.float64]:
    words = _words(seed, label, -(-count // 2)).view("<u4")[:count]
    return (words >> np.uint32(8)).astype(np.float64) * 2.0**-23 - 1.0


def _words(seed: bytes, label: bytes, count: int) -> NDArray[np.uint64]:
    key = np.frombuffer(hashlib.sha256(seed + label).digest()[:16], dtype="<u8")
    return np.asarray(np.random.Philox(key=key).random_raw(count), dtype="<u8")


def _leaf(data: bytes) -> bytes:
    return hashlib.sha256(b"\0" + data).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()

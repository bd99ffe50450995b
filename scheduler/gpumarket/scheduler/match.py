"""The match: a pure function of the book, the job, a seed and the moment. Same in, same out.

Eight candidates are drawn at random from the index, filtered, scored, and one of them is drawn by score ("power of d choices", Mitzenmacher
2001): the cost does not grow with the book, load spreads, and two schedulers do not herd onto one provider. When none of the eight passes,
sixty-four more are drawn, then the whole index is scanned once. A share of the draws goes to newcomers among the candidates, whatever their
score. Reasons are counted only when nothing matched, or when asked (explain.py).
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.units import Address
from gpumarket.scheduler import score
from gpumarket.scheduler.book import Book, Col, ModelOnSale
from gpumarket.scheduler.filters import Mask, Moment, Rows, Wanted, bounds, costs, passing, stages

DRAWN_FIRST, DRAWN_NEXT = 8, 64
_WORDS = struct.Struct(f"<{2 + DRAWN_FIRST}I")
_UNIT = 2.0**-32


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the attempt goes."""

    provider: Address
    sale: ModelOnSale
    score: float
    explored: bool


@dataclass(frozen=True, slots=True)
class Removed:
    """How many providers one filter removed, with the numbers of one of them."""

    filter: str
    count: int
    example: str


@dataclass(frozen=True, slots=True)
class NoMatch:
    """Nobody passes. The counts sum to `considered`."""

    considered: int
    removed: tuple[Removed, ...]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rows that passed in one draw, with what scoring needs. `explored`: the draw goes to a newcomer."""

    rows: Rows
    table: NDArray[np.float64]
    cost: NDArray[np.float64]
    total: NDArray[np.float64]
    chosen: int
    explored: bool


def match(book: Book, wanted: Wanted, seed: bytes, moment: Moment, explore_share: float = 0.05) -> Plan | NoMatch:
    """The provider of this attempt, or how many each filter removed. `seed`: any bytes; `explore_share` in [0, 1]."""
    found = draw(book, wanted, seed, moment, explore_share)
    if found is None:
        return count(book, wanted, moment)
    row = int(found.rows[found.chosen])
    entry, sale = book.owners[row], book.sales[row]
    assert entry is not None
    assert sale is not None
    return Plan(entry.advert.provider, sale, float(found.total[found.chosen]), found.explored)


def draw(book: Book, wanted: Wanted, seed: bytes, moment: Moment, explore_share: float) -> Candidates | None:
    """The candidates that passed and which of them is chosen; None when nobody passes."""
    stream = hashlib.shake_128(seed)
    explore, choice, *words = _WORDS.unpack(stream.digest(_WORDS.size))
    low, high = bounds(book, wanted, moment)
    rows = _index(book, wanted)
    size = len(rows)
    if size > DRAWN_FIRST:
        picks = rows[[w * size >> 32 for w in words]]
        found = _passing(book, wanted, picks, low, high)
        if found is None and size > DRAWN_NEXT:
            more = np.frombuffer(stream.digest(_WORDS.size + 4 * DRAWN_NEXT)[_WORDS.size :], dtype="<u4").astype(np.uint64)
            found = _passing(book, wanted, rows[(more * np.uint64(size)) >> np.uint64(32)], low, high)
        if found is None:
            found = _passing(book, wanted, rows, low, high)
    else:
        found = _passing(book, wanted, rows, low, high)
    if found is None:
        return None
    return _choose(book, wanted, found, explore * _UNIT < explore_share, choice * _UNIT)


def count(book: Book, wanted: Wanted, moment: Moment) -> NoMatch:
    """How many providers each filter removes, in order. One vectorised pass over the sellers of the model."""
    low, high = bounds(book, wanted, moment)
    rows = book.pool(wanted.model).rows
    considered = len(book.entries)
    removed = []
    if considered > len(rows):
        removed.append(Removed("model", considered - len(rows), "it does not sell the model"))
    alive = np.ones(len(rows), dtype=np.bool_)
    for name, fails, text in stages(book, wanted, rows, low, high):
        gone = alive & fails
        number = int(gone.sum())
        if number:
            removed.append(Removed(name, number, text(int(gone.argmax()))))
            alive &= ~fails
    return NoMatch(considered, tuple(removed))


def _index(book: Book, wanted: Wanted) -> Rows:
    limits = wanted.limits
    if limits.require_provider is not None:
        row = book.row_of(limits.require_provider, wanted.model)
        return np.array([] if row is None else [row], dtype=np.int64)
    return book.pool(wanted.model, limits.gpu_class, limits.region).rows


_Passed = tuple[Rows, NDArray[np.float64], NDArray[np.float64]]


def _passing(book: Book, wanted: Wanted, rows: Rows, low: NDArray[np.float64], high: NDArray[np.float64]) -> _Passed | None:
    table = book.table[rows]
    cost = costs(table, wanted)
    good: Mask = passing(book, wanted, rows, table, cost, low, high)
    keep = good.nonzero()[0]
    if len(keep) == len(rows):
        return (rows, table, cost) if len(rows) else None
    if not len(keep):
        return None
    return rows[keep], table[keep], cost[keep]


def _choose(book: Book, wanted: Wanted, found: _Passed, explore: bool, choice: float) -> Candidates:
    rows, table, cost = found
    seconds = table[:, Col.QUEUE_SECONDS] + table[:, Col.SECONDS_PER_UNIT] * (wanted.output_units or wanted.prompt_units)
    total = score.total(book.weights, cost, seconds, table[:, Col.MERIT])
    if explore:
        newcomers = (table[:, Col.OBSERVATIONS] < score.NEWCOMER_OBSERVATIONS).nonzero()[0]
        if len(newcomers):
            return Candidates(rows, table, cost, total, int(newcomers[int(choice * len(newcomers))]), True)
    weight = (total**score.SHARPNESS).cumsum()
    chosen = int(weight.searchsorted(choice * weight[-1], side="right"))
    return Candidates(rows, table, cost, total, min(chosen, len(rows) - 1), False)

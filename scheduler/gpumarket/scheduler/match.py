"""The match: a pure function of the book, the job, a seed and the moment. Same in, same out.

Eight candidates are drawn at random from the index, filtered, scored, and one of them is drawn by score ("power of d choices", Mitzenmacher
2001): the cost does not grow with the book, load spreads, and two schedulers do not herd onto one provider. When none of the eight passes,
sixty-four more are filtered, then the whole index in one vectorised scan, and eight of those that pass are drawn. A share of the draws goes
to newcomers among the candidates, whatever their score. Reasons are counted only when nothing matched, or when asked (explain.py).
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from gpumarket.core.units import Address
from gpumarket.scheduler import score
from gpumarket.scheduler.book import Book, Col, ModelOnSale
from gpumarket.scheduler.filters import NAMES, Bound, Moment, Rows, Wanted, admitted, bounds, mask, stages

DRAWN, DRAWN_NEXT = 8, 64
_WORDS = struct.Struct(f"<{2 + DRAWN}I")
_UNIT = 2.0**-32
_Passed = tuple[list[int], list[list[float]], list[float]]
"""Rows, their columns, their costs."""


class Plan(NamedTuple):
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


NOBODY = "nobody"
"""Why nobody was found where nobody is known at all."""


def stopped_by(found: NoMatch) -> str:
    """The one word for why: the last filter, in their order, that removed anybody. Whoever came farthest failed there."""
    return max((removed.filter for removed in found.removed), key=NAMES.index, default=NOBODY)


class Candidates(NamedTuple):
    """Rows that passed in one draw, with what was scored of them. `explored`: the draw goes to a newcomer."""

    rows: list[int]
    costs: list[float]
    seconds: list[float]
    totals: list[float]
    chosen: int
    explored: bool


def match(book: Book, wanted: Wanted, seed: bytes, moment: Moment, explore_share: float = 0.05) -> Plan | NoMatch:
    """The provider of this attempt, or how many each filter removed. `seed`: any bytes; `explore_share` in [0, 1]."""
    found = draw(book, wanted, seed, moment, explore_share)
    if found is None:
        return count(book, wanted, moment)
    row = found.rows[found.chosen]
    entry, sale = book.owners[row], book.sales[row]
    assert entry is not None
    assert sale is not None
    return Plan(entry.advert.provider, sale, found.totals[found.chosen], found.explored)


def draw(book: Book, wanted: Wanted, seed: bytes, moment: Moment, explore_share: float) -> Candidates | None:
    """The candidates that passed and which of them is chosen; None when nobody passes."""
    explore, choice, *words = _WORDS.unpack(hashlib.blake2b(seed, digest_size=_WORDS.size).digest())
    low, high = bounds(book, wanted, moment)
    index = _index(book, wanted)
    size = len(index)
    picks = index[[w * size >> 32 for w in words]] if size > DRAWN else index
    found = _passing(book, wanted, picks, low, high)
    if not found[0] and size > DRAWN:
        found = _found_by_scan(book, wanted, index, seed, low, high)
    if not found[0]:
        return None
    return _choose(book, wanted, found, explore * _UNIT < explore_share, choice * _UNIT)


def count(book: Book, wanted: Wanted, moment: Moment) -> NoMatch:
    """How many providers each filter removes, in order. One vectorised pass over the sellers of the model."""
    low, high = bounds(book, wanted, moment)
    rows = book.pool(wanted.model).rows
    book.walked += len(rows)
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


def _passing(book: Book, wanted: Wanted, picks: Rows, low: Bound, high: Bound) -> _Passed:
    found: _Passed = ([], [], [])
    lines: list[list[float]] = book.table[picks].tolist()
    for row, line in zip(picks.tolist(), lines, strict=True):
        cost = admitted(book, wanted, line, low, high)
        if cost >= 0.0:
            found[0].append(row)
            found[1].append(line)
            found[2].append(cost)
    return found


def _found_by_scan(book: Book, wanted: Wanted, index: Rows, seed: bytes, low: Bound, high: Bound) -> _Passed:
    """Draw again from what passes: among more rows first, then among all of the index."""
    words = np.frombuffer(hashlib.shake_128(seed).digest(4 * (DRAWN_NEXT + DRAWN)), dtype="<u4").astype(np.uint64)
    if len(index) > DRAWN_NEXT:
        more = index[words[:DRAWN_NEXT] * np.uint64(len(index)) >> np.uint64(32)]
        found = more[mask(book, wanted, more, low, high)]
        if len(found):
            return _passing(book, wanted, found[:DRAWN], low, high)
    book.walked += len(index)
    found = index[mask(book, wanted, index, low, high)]
    if len(found) > DRAWN:
        found = found[words[DRAWN_NEXT:] * np.uint64(len(found)) >> np.uint64(32)]
    return _passing(book, wanted, found, low, high)


def _choose(book: Book, wanted: Wanted, found: _Passed, explore: bool, choice: float) -> Candidates:
    rows, lines, costs = found
    units = wanted.output_units or wanted.prompt_units
    seconds = [line[Col.QUEUE_SECONDS] + line[Col.SECONDS_PER_UNIT] * units for line in lines]
    totals = score.totals(book.weights, costs, seconds, [line[Col.MERIT] for line in lines])
    if explore:
        newcomers = [i for i, line in enumerate(lines) if line[Col.OBSERVATIONS] < score.NEWCOMER_OBSERVATIONS]
        if newcomers:
            return Candidates(rows, costs, seconds, totals, newcomers[int(choice * len(newcomers))], True)
    drawn = list(accumulate([t**score.SHARPNESS for t in totals]))
    return Candidates(rows, costs, seconds, totals, min(bisect_right(drawn, choice * drawn[-1]), len(rows) - 1), False)

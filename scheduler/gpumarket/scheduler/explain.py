"""Why an order goes where it goes: each rejected provider's filter and numbers, the candidates' scores. Pure, never on the hot path."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import islice

import numpy as np

from gpumarket.core.units import Address
from gpumarket.scheduler import score
from gpumarket.scheduler.book import Book, is_warm
from gpumarket.scheduler.filters import Moment, Wanted, bounds, stages
from gpumarket.scheduler.match import Candidates, Removed, count, draw

REJECTED_MAX = 200
"""Rejected providers told one by one; the counts cover all."""
LOOKED_AT_MAX = 4_096
"""Sellers and non-sellers looked at for those that are told; where more sell the model, they are drawn by the seed."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate of the draw. `parts` are weighted; their sum is `total`."""

    provider: Address
    total: float
    parts: dict[str, float]
    chosen: bool


@dataclass(frozen=True, slots=True)
class Turned:
    """A provider that a filter removed."""

    provider: Address
    filter: str
    reason: str


@dataclass(frozen=True, slots=True)
class Story:
    """The whole answer. `considered` providers are in the book, `removed` counts them by filter, `rejected` tells some of them."""

    considered: int
    candidates: tuple[Scored, ...]
    rejected: tuple[Turned, ...]
    removed: tuple[Removed, ...]
    explored: bool


def explain(book: Book, wanted: Wanted, seed: bytes, moment: Moment, explore_share: float) -> Story:
    """The match of the same arguments, told."""
    found = draw(book, wanted, seed, moment, explore_share)
    candidates = tuple(_scored(book, found)) if found is not None else ()
    counted = count(book, wanted, moment)
    rejected = tuple(_rejected(book, wanted, seed, moment))
    return Story(counted.considered, candidates, rejected, counted.removed, found is not None and found.explored)


def _scored(book: Book, found: Candidates) -> list[Scored]:
    weights = book.weights
    cheapest = min(found.costs)
    seen: dict[int, Scored] = {}
    for i, row in enumerate(found.rows):
        entry, sale = book.owners[row], book.sales[row]
        assert entry is not None
        assert sale is not None
        standing = entry.standing
        parts = {
            "price": weights.price * score.price_part(found.costs[i], cheapest),
            "latency": weights.latency * score.latency_part(found.seconds[i]),
            "reputation": weights.reputation * standing.reputation_low,
            "stake": weights.stake * score.stake_part(standing.stake),
            "warm": weights.warm * float(is_warm(standing, sale)),
        }
        if row not in seen or i == found.chosen:
            seen[row] = Scored(entry.advert.provider, found.totals[i], parts, i == found.chosen)
    return sorted(seen.values(), key=lambda s: -s.total)


def _rejected(book: Book, wanted: Wanted, seed: bytes, moment: Moment) -> list[Turned]:
    """Sellers first: that most providers sell other models is no news."""
    low, high = bounds(book, wanted, moment)
    rows = book.pool(wanted.model).rows
    if len(rows) > LOOKED_AT_MAX:
        words = np.frombuffer(hashlib.shake_128(seed).digest(4 * LOOKED_AT_MAX), dtype="<u4").astype(np.uint64)
        rows = rows[np.unique(words * np.uint64(len(rows)) >> np.uint64(32))]
    book.walked += len(rows)
    told: list[Turned] = []
    alive = np.ones(len(rows), dtype=np.bool_)
    for name, fails, text in stages(book, wanted, rows, low, high):
        for i in (alive & fails).nonzero()[0][: REJECTED_MAX - len(told)].tolist():
            entry = book.owners[int(rows[i])]
            assert entry is not None
            told.append(Turned(entry.advert.provider, name, text(i)))
        alive &= ~fails
    others = (p for p in islice(book.entries, LOOKED_AT_MAX) if book.row_of(p, wanted.model) is None)
    told += [Turned(p, "model", "it does not sell the model") for p in islice(others, REJECTED_MAX - len(told))]
    return told

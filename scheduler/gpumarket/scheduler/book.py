"""The book: every offer as rows of one matrix, indexed by model, GPU class and region. Soft state, rebuilt in seconds. Pure.

One row is one provider's sale of one model. What the hard filters compare are the first columns, one filter each, so that a match tests
candidates with two vector comparisons. Exact money stays in `ModelOnSale`; the matrix holds floats, good for filtering and scoring only:
what is reserved or promised is checked again in integers by the channel's state machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.units import Address, Hash, Money
from gpumarket.scheduler.score import Weights

NEVER = -1.0e18
UNKNOWN_TOKENS_PER_SECOND = 50.0
"""Assumed of a provider whose meter says nothing yet: slow, so that a number is worth having."""


class Col:
    """Columns of a row. Up to `FREE` each is the subject of one hard filter (filters.FILTERS). Plain numbers: enum members index slower."""

    TASK = 0
    PROFILE = 1
    CHECKS = 2
    GPU_CLASS = 3
    VRAM = 4
    REGION = 5
    SANDBOX = 6
    INPUT_TOKENS = 7
    PROMPT_PRICE = 8
    OUTPUT_PRICE = 9
    STAKE = 10
    REPUTATION = 11
    HEARTBEAT = 12
    OFFER_EXPIRES = 13
    PROVEN = 14
    JAILED_UNTIL = 15
    SPOKE_EXPIRES = 16
    FREE = 17
    SPOKE_FREE = 18
    STAKE_ROOM = 19
    QUEUE_SECONDS = 20
    SECONDS_PER_UNIT = 21
    MERIT = 22
    OBSERVATIONS = 23
    PROVIDER = 24
    OWNER = 25
    COUNT = 26


FILTER_COLUMNS = Col.FREE + 1


@dataclass(frozen=True, slots=True)
class ModelOnSale:
    """One model of an advert; prices in money per 1,000,000 units, speed in tokens per second (0 is unknown)."""

    model: Hash
    name: str
    task: int
    profile: Hash
    prompt_price: Money
    output_price: Money
    max_input_tokens: int
    tokens_per_second: float
    warm: bool


@dataclass(frozen=True, slots=True)
class Advert:
    """What an offer says, as the book reads it. The class of a provider with several GPUs is that of the one with most memory."""

    provider: Address
    owner: Address
    gpu_class: str
    vram_bytes: int
    region: str
    sandbox: int
    checks: bool
    capacity: int
    expires_at: int
    models: tuple[ModelOnSale, ...]


@dataclass(slots=True)
class Standing:
    """What is known of a provider beyond its advert. Places and money are net of reservations; times unix, `heartbeat` monotonic."""

    heartbeat: float = NEVER
    proven: bool = False
    jailed_until: int = 0
    stake: int = 0
    stake_room: int = 0
    spoke_free: int = 0
    spoke_expires: int = 0
    reputation_ppm: int = 0
    reputation_low: float = 0.0
    observations: float = 0.0
    free: int = 0
    places: dict[Hash, int] = field(default_factory=dict)
    """`free` by model, one that is missing has none; empty where the provider does not say: each model has `free`."""
    queued: int = 0
    round_trip_seconds: float = 0.0
    warm: frozenset[Hash] = frozenset()


@dataclass(slots=True)
class Entry:
    """A provider in the book."""

    advert: Advert
    standing: Standing
    rows: list[int] = field(default_factory=list)


class Pool:
    """Row numbers under one key, dense, with removal in constant time."""

    __slots__ = ("_at", "_rows", "size")

    def __init__(self) -> None:
        self._rows = np.empty(8, dtype=np.int64)
        self._at: dict[int, int] = {}
        self.size = 0

    @property
    def rows(self) -> NDArray[np.int64]:
        return self._rows[: self.size]

    def add(self, row: int) -> None:
        if self.size == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[self.size] = row
        self._at[row] = self.size
        self.size += 1

    def remove(self, row: int) -> None:
        at = self._at.pop(row)
        self.size -= 1
        last = int(self._rows[self.size])
        if last != row:
            self._rows[at] = last
            self._at[last] = at


class Interned:
    """Small numbers for labels, so that equality is a column comparison. Unknown labels match nothing.

    A label is known while a row uses it: labels are offers' own words, and whoever changes offers must not fill our memory (I8). A number
    is never given to another label, so that a comparison cannot mean something else than when it was made.
    """

    def __init__(self) -> None:
        self._ids: dict[object, int] = {}
        self._uses: dict[object, int] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._ids)

    def use(self, label: object) -> int:
        """The label's number, for one more row."""
        found = self._ids.get(label)
        if found is None:
            found = self._ids[label] = self._next
            self._next += 1
        self._uses[label] = self._uses.get(label, 0) + 1
        return found

    def leave(self, label: object) -> None:
        """One row fewer uses it."""
        self._uses[label] -= 1
        if not self._uses[label]:
            del self._ids[label], self._uses[label]

    def find(self, label: object) -> int:
        return self._ids.get(label, -1)


_NO_POOL = Pool()


class Book:
    """All offers known. Not safe across threads; one scheduler owns it."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.entries: dict[Address, Entry] = {}
        self.walked = 0
        """Rows that matches and explanations looked at beyond those first drawn, ever: the meter of `allowance`."""
        self.labels = Interned()
        self.table: NDArray[np.float64] = np.zeros((64, Col.COUNT))
        self.sales: list[ModelOnSale | None] = [None] * 64
        self.owners: list[Entry | None] = [None] * 64
        self._unused = list(range(63, -1, -1))
        self._pools: dict[tuple[Hash, str, str], Pool] = {}

    def put(self, advert: Advert) -> Entry:
        """List or replace an advert; the provider's standing is kept."""
        entry = self.entries.get(advert.provider)
        if entry is None:
            entry = self.entries[advert.provider] = Entry(advert, Standing())
        else:
            self._unlist(entry)
            entry.advert = advert
        for sale in advert.models:
            self._list(entry, sale)
        self.refresh(advert.provider)
        return entry

    def drop(self, provider: Address) -> None:
        """Forget a provider; unknown ones are ignored."""
        entry = self.entries.pop(provider, None)
        if entry is not None:
            self._unlist(entry)

    def refresh(self, provider: Address) -> None:
        """Write a changed standing into the provider's rows."""
        entry = self.entries[provider]
        standing = entry.standing
        for row in entry.rows:
            sale = self.sales[row]
            assert sale is not None
            line = self.table[row]
            line[Col.STAKE] = standing.stake
            line[Col.REPUTATION] = standing.reputation_ppm
            line[Col.HEARTBEAT] = standing.heartbeat
            line[Col.PROVEN] = standing.proven
            line[Col.JAILED_UNTIL] = standing.jailed_until
            line[Col.SPOKE_EXPIRES] = standing.spoke_expires
            line[Col.FREE] = free_of(standing, sale.model)
            line[Col.SPOKE_FREE] = standing.spoke_free
            line[Col.STAKE_ROOM] = standing.stake_room
            line[Col.QUEUE_SECONDS] = standing.queued / max(1, entry.advert.capacity) + standing.round_trip_seconds
            line[Col.OBSERVATIONS] = standing.observations
            line[Col.MERIT] = self.weights.merit(standing.reputation_low, standing.stake, is_warm(standing, sale))

    def move_places(self, provider: Address, model: Hash, places: int) -> None:
        """Take (negative) or give back reserved places of a model. A provider whose offer went away is ignored."""
        entry = self.entries.get(provider)
        if entry is None:
            return
        standing = entry.standing
        standing.free += places
        if standing.places:
            standing.places[model] = standing.places.get(model, 0) + places
        for row in entry.rows:
            sale = self.sales[row]
            assert sale is not None
            self.table[row, Col.FREE] = free_of(standing, sale.model)

    def set_money(self, provider: Address, spoke_free: int, stake_room: int) -> None:
        """What the provider's channel and stake still cover."""
        entry = self.entries.get(provider)
        if entry is None:
            return
        entry.standing.spoke_free, entry.standing.stake_room = spoke_free, stake_room
        for row in entry.rows:
            line = self.table[row]
            line[Col.SPOKE_FREE] = spoke_free
            line[Col.STAKE_ROOM] = stake_room

    def pool(self, model: Hash, gpu_class: str = "", region: str = "") -> Pool:
        """Rows that sell the model, of a class and in a region ("" is any)."""
        return self._pools.get((model, gpu_class, region), _NO_POOL)

    def row_of(self, provider: Address, model: Hash) -> int | None:
        """The row of one provider's sale of a model."""
        entry = self.entries.get(provider)
        for row in entry.rows if entry else ():
            sale = self.sales[row]
            if sale is not None and sale.model == model:
                return row
        return None

    def _list(self, entry: Entry, sale: ModelOnSale) -> None:
        if not self._unused:
            self._grow()
        row = self._unused.pop()
        advert, line, label = entry.advert, self.table[row], self.labels.use
        line[:] = 0.0
        line[Col.TASK] = sale.task
        line[Col.PROFILE] = label(sale.profile)
        line[Col.CHECKS] = advert.checks
        line[Col.GPU_CLASS] = label(advert.gpu_class)
        line[Col.VRAM] = advert.vram_bytes
        line[Col.REGION] = label(advert.region)
        line[Col.SANDBOX] = advert.sandbox
        line[Col.INPUT_TOKENS] = sale.max_input_tokens
        line[Col.PROMPT_PRICE] = sale.prompt_price
        line[Col.OUTPUT_PRICE] = sale.output_price
        line[Col.OFFER_EXPIRES] = advert.expires_at
        line[Col.SECONDS_PER_UNIT] = 1.0 / (sale.tokens_per_second or UNKNOWN_TOKENS_PER_SECOND)
        line[Col.PROVIDER] = label(advert.provider)
        line[Col.OWNER] = label(advert.owner)
        self.sales[row], self.owners[row] = sale, entry
        entry.rows.append(row)
        for key in _keys(advert, sale):
            self._pools.setdefault(key, Pool()).add(row)

    def _unlist(self, entry: Entry) -> None:
        for row in entry.rows:
            sale = self.sales[row]
            assert sale is not None
            for key in _keys(entry.advert, sale):
                pool = self._pools[key]
                pool.remove(row)
                if not pool.size:
                    del self._pools[key]
            for label in (sale.profile, entry.advert.gpu_class, entry.advert.region, entry.advert.provider, entry.advert.owner):
                self.labels.leave(label)
            self.sales[row] = self.owners[row] = None
            self._unused.append(row)
        entry.rows.clear()

    def _grow(self) -> None:
        size = len(self.table)
        self.table = np.concatenate([self.table, np.zeros_like(self.table)])
        self.sales.extend([None] * size)
        self.owners.extend([None] * size)
        self._unused.extend(range(2 * size - 1, size - 1, -1))


def _keys(advert: Advert, sale: ModelOnSale) -> Iterable[tuple[Hash, str, str]]:
    return {(sale.model, gpu_class, region) for gpu_class in ("", advert.gpu_class) for region in ("", advert.region)}


def free_of(standing: Standing, model: Hash) -> int:
    """Jobs of this model that could start now. Slots of another model are of no use to it."""
    return standing.places.get(model, 0) if standing.places else standing.free


def is_warm(standing: Standing, sale: ModelOnSale) -> bool:
    """Whether the model is loaded now: as the last heartbeat says, or the offer before the first one."""
    return sale.model in standing.warm or (standing.heartbeat == NEVER and sale.warm)

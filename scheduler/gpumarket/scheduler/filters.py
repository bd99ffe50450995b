"""The hard filters: what a provider must satisfy to be drawn at all, each with a name and numbers. Pure.

A filter is a column with a lowest and a highest value, or a rule on money that depends on the job's cost there. They are counted in the
order of `FILTERS`: a provider is removed by the first that it fails, so that the counts add up to the providers considered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import ge, le
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.terms import Task
from gpumarket.core.units import PER_MILLION, Address, Hash, Money, format_money
from gpumarket.scheduler.book import FILTER_COLUMNS, Book, Col

HEARTBEAT_SECONDS = 3.0
"""A provider silent for longer is not matched: three beats missed."""
_MANY = float("inf")
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]
Bound = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """The client's constraints, as far as the filters know them. Zero and empty mean any; no price limit is None."""

    gpu_class: str = ""
    min_vram_bytes: int = 0
    region: str = ""
    min_reputation_ppm: int = 0
    min_stake: int = 0
    max_prompt_price: int | None = None
    max_output_price: int | None = None
    min_sandbox: int = 0
    require_provider: Address | None = None
    exclude_providers: frozenset[Address] = frozenset()
    exclude_owners: frozenset[Address] = frozenset()


@dataclass(frozen=True, slots=True)
class Wanted:
    """One attempt to place. Units are what is left to do; `budget` is what the provider can be paid for it, the fee set aside."""

    task: Task
    model: Hash
    profile: Hash
    prompt_units: int
    output_units: int
    budget: Money
    deadline: int
    spoke_margin_seconds: int = 0
    longest_input: int = 0
    """Tokens that the model must take in one piece: a prompt with its answer. 0 where only the sum of all inputs is known."""
    limits: Limits = field(default_factory=Limits)


class Moment(NamedTuple):
    """Now, on both clocks: unix seconds for what is signed, monotonic seconds for heartbeats."""

    now: int
    monotonic: float


@dataclass(frozen=True, slots=True)
class Filter:
    """A named filter; `text` tells the numbers of one row that fails it."""

    name: str
    column: int
    text: Callable[[float, float, float], str]


def _money(value: float) -> str:
    return format_money(int(value))


FILTERS: tuple[Filter, ...] = (
    Filter("task", Col.TASK, lambda v, lo, hi: f"it sells the model for {_task(v)}, asked is {_task(lo)}"),
    Filter("profile", Col.PROFILE, lambda v, lo, hi: "it agrees to another verification profile"),
    Filter("checks", Col.CHECKS, lambda v, lo, hi: "it takes no check jobs"),
    Filter("gpu_class", Col.GPU_CLASS, lambda v, lo, hi: "another GPU class"),
    Filter("vram", Col.VRAM, lambda v, lo, hi: f"{v / 2**30:.1f} GiB, asked are {lo / 2**30:.1f}"),
    Filter("region", Col.REGION, lambda v, lo, hi: "another region"),
    Filter("sandbox", Col.SANDBOX, lambda v, lo, hi: f"sandbox tier {v:.0f}, asked is {lo:.0f}"),
    Filter("input_tokens", Col.INPUT_TOKENS, lambda v, lo, hi: f"inputs of at most {v:.0f} tokens, asked are {lo:.0f}"),
    Filter("prompt_price", Col.PROMPT_PRICE, lambda v, lo, hi: f"{_money(v)} per Mtok of input, the limit is {_money(hi)}"),
    Filter("output_price", Col.OUTPUT_PRICE, lambda v, lo, hi: f"{_money(v)} per Mtok of output, the limit is {_money(hi)}"),
    Filter("stake", Col.STAKE, lambda v, lo, hi: f"stake {_money(v)}, asked is {_money(lo)}"),
    Filter("reputation", Col.REPUTATION, lambda v, lo, hi: f"reputation {v / 1e6:.3f}, asked is {lo / 1e6:.3f}"),
    Filter("heartbeat", Col.HEARTBEAT, lambda v, lo, hi: f"no heartbeat within {HEARTBEAT_SECONDS:.0f} s"),
    Filter("offer_expired", Col.OFFER_EXPIRES, lambda v, lo, hi: f"its offer expired {lo - v:.0f} s ago"),
    Filter("gpu_proof", Col.PROVEN, lambda v, lo, hi: "its GPU proof is pending or did not hold"),
    Filter("jail", Col.JAILED_UNTIL, lambda v, lo, hi: f"jailed for {v - hi:.0f} s more"),
    Filter("spoke_expiry", Col.SPOKE_EXPIRES, lambda v, lo, hi: f"its channel expires {lo - v:.0f} s too early" if v else "no channel yet"),
    Filter("capacity", Col.FREE, lambda v, lo, hi: f"{max(0, int(v))} places free"),
)
MONEY_FILTERS = ("max_amount", "spoke", "exposure")
NAMES = ("model", "provider", "excluded", *(f.name for f in FILTERS), *MONEY_FILTERS)


def bounds(book: Book, wanted: Wanted, moment: Moment) -> tuple[Bound, Bound]:
    """Lowest and highest value of each filter column, in the order of `FILTERS`."""
    limits, find = wanted.limits, book.labels.find
    profile = float(find(wanted.profile))
    gpu = float(find(limits.gpu_class)) if limits.gpu_class else None
    region = float(find(limits.region)) if limits.region else None
    return _low(wanted, moment, profile, gpu, region), _high(wanted, moment, profile, gpu, region)


def _low(wanted: Wanted, moment: Moment, profile: float, gpu: float | None, region: float | None) -> Bound:
    limits, checking = wanted.limits, wanted.task is Task.CHECK
    return (  # floats throughout: comparing a float with an int takes four times as long
        0.0 if checking else float(wanted.task),
        profile,
        1.0 if checking else 0.0,
        -_MANY if gpu is None else gpu,
        float(limits.min_vram_bytes),
        -_MANY if region is None else region,
        float(limits.min_sandbox),
        float(wanted.longest_input),
        0.0,
        0.0,
        float(limits.min_stake),
        float(limits.min_reputation_ppm),
        moment.monotonic - HEARTBEAT_SECONDS,
        float(moment.now),
        1.0,
        -_MANY,
        float(wanted.deadline + wanted.spoke_margin_seconds),
        1.0,
    )


def _high(wanted: Wanted, moment: Moment, profile: float, gpu: float | None, region: float | None) -> Bound:
    limits = wanted.limits
    return (
        _MANY if wanted.task is Task.CHECK else float(wanted.task),
        profile,
        _MANY,
        _MANY if gpu is None else gpu,
        _MANY,
        _MANY if region is None else region,
        _MANY,
        _MANY,
        _MANY if limits.max_prompt_price is None else float(limits.max_prompt_price),
        _MANY if limits.max_output_price is None else float(limits.max_output_price),
        _MANY,
        _MANY,
        _MANY,
        _MANY,
        _MANY,
        float(moment.now),
        _MANY,
        _MANY,
    )


def admitted(book: Book, wanted: Wanted, line: list[float], low: Bound, high: Bound) -> float:
    """The cost at a row that passes every filter, else -1. `mask` says the same of many rows at once."""
    if not (all(map(le, low, line)) and all(map(ge, high, line))):
        return -1.0
    cost = (line[Col.PROMPT_PRICE] * wanted.prompt_units + line[Col.OUTPUT_PRICE] * wanted.output_units) / PER_MILLION
    if cost > line[Col.SPOKE_FREE] or cost > line[Col.STAKE_ROOM] or cost > wanted.budget:
        return -1.0
    limits = wanted.limits
    if limits.exclude_providers or limits.exclude_owners:
        find, provider, owner = book.labels.find, line[Col.PROVIDER], line[Col.OWNER]
        if any(find(p) == provider for p in limits.exclude_providers) or any(find(o) == owner for o in limits.exclude_owners):
            return -1.0
    return cost


def mask(book: Book, wanted: Wanted, rows: Rows, low: Bound, high: Bound) -> Mask:
    """Which of many rows pass every filter, in one vectorised scan."""
    table = book.table[rows]
    part = table[:, :FILTER_COLUMNS]
    good: Mask = np.logical_and.reduce((part >= np.array(low)) & (part <= np.array(high)), axis=1)
    room = np.minimum(table[:, Col.SPOKE_FREE], table[:, Col.STAKE_ROOM])
    good &= costs(table, wanted) <= np.minimum(room, wanted.budget)
    if wanted.limits.exclude_providers or wanted.limits.exclude_owners:
        good &= ~_excluded(book, wanted, table)
    return good


def costs(table: NDArray[np.float64], wanted: Wanted) -> NDArray[np.float64]:
    """What the attempt would cost at each row, fee not included: money as float."""
    prompt, output = table[:, Col.PROMPT_PRICE] * wanted.prompt_units, table[:, Col.OUTPUT_PRICE] * wanted.output_units
    return (prompt + output) / PER_MILLION  # the operations of `admitted`, in its order: both round alike


def stages(book: Book, wanted: Wanted, rows: Rows, low: Bound, high: Bound) -> Iterator[tuple[str, Mask, Callable[[int], str]]]:
    """(name, which fail it, numbers of row i) of every filter in order, over `rows`. For counting and explaining only."""
    table = book.table[rows]
    required = wanted.limits.require_provider
    if required is not None:
        yield "provider", table[:, Col.PROVIDER] != book.labels.find(required), lambda i: "another provider is required"
    yield "excluded", _excluded(book, wanted, table), lambda i: "excluded by the order"
    for k, rule in enumerate(FILTERS):
        values, lo, hi = table[:, rule.column], low[k], high[k]
        yield (
            rule.name,
            (values < lo) | (values > hi),
            lambda i, rule=rule, values=values, lo=lo, hi=hi: rule.text(values[i], lo, hi),  # type: ignore[misc]
        )
    cost = costs(table, wanted)
    yield (
        "max_amount",
        cost > wanted.budget,
        lambda i: f"the job would cost {_money(cost[i])}, at most {_money(float(wanted.budget))} is left for it",
    )
    spoke, room = table[:, Col.SPOKE_FREE], table[:, Col.STAKE_ROOM]
    yield "spoke", cost > spoke, lambda i: f"{_money(max(0.0, spoke[i]))} free in its channel, the job may earn {_money(cost[i])}"
    yield "exposure", cost > room, lambda i: f"its stake covers {_money(max(0.0, room[i]))} more, the job may earn {_money(cost[i])}"


def _excluded(book: Book, wanted: Wanted, table: NDArray[np.float64]) -> Mask:
    find, limits = book.labels.find, wanted.limits
    providers = [find(p) for p in limits.exclude_providers]
    owners = [find(o) for o in limits.exclude_owners]
    mask: Mask = np.isin(table[:, Col.PROVIDER], providers) | np.isin(table[:, Col.OWNER], owners)
    return mask


def _task(value: float) -> str:
    return Task(int(value)).name.lower() if int(value) in Task._value2member_map_ else "nothing"

"""What an audit looks at: rows of everybody's books, the chain's facts, and the signed statements inside the rows, opened once. Pure.

Invariant: nothing is believed because a row says it. A statement that does not verify is a flaw of its attempt, with its reason, and counts
for nothing. Shares no arithmetic and no state machine with the ledgers that it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from gpumarket.core.codec import open_ack, open_lease, open_order, open_receipt, parse
from gpumarket.core.errors import GpumarketError
from gpumarket.core.signing import Domain
from gpumarket.core.terms import Ack, JobSpec, Lease, Outcome, Receipt, Task, Term
from gpumarket.core.units import PER_MILLION, Hash, hex0x
from gpumarket.testnet.chain_facts import ChainFacts
from gpumarket.testnet.ledgers import ClientBooks, ProviderBooks, SchedulerBooks
from gpumarket.v1 import terms_pb2 as pb

T = TypeVar("T", bound=Term)


@dataclass(frozen=True, slots=True)
class OpenedAttempt:
    """A row of a scheduler's attempts with its statements. What is None is absent, or in `flaws`."""

    row: Any
    spec: JobSpec | None
    lease: Lease | None
    ack: Ack | None
    receipt: Receipt | None
    flaws: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"attempt {self.row.number} of job {short(self.row.job)}"

    @property
    def units(self) -> int:
        """What the client's own signature says that it got."""
        return self.ack.units if self.ack is not None else 0

    @property
    def complete(self) -> bool:
        """Whether the statements show a whole answer: the client says so, or the provider does and at most one window is not acked."""
        if self.ack is not None and self.ack.complete:
            return True
        if self.receipt is None or self.lease is None or self.receipt.outcome is not Outcome.COMPLETED:
            return False
        return self.receipt.output_units - self.units <= self.lease.window_units

    @property
    def worth(self) -> int:
        """The most that the statements can earn, in base units."""
        if self.lease is None or self.spec is None:
            return 0
        return earnings(self.lease, self.spec.prompt_units, self.units, complete=bool(self.row.complete) and self.complete)

    @property
    def cost(self) -> int:
        """What the client is charged for what the row says is earned: the fee comes on top, rounded down."""
        fee = self.lease.fee_ppm if self.lease is not None else 0
        return int(self.row.amount + self.row.amount * fee // PER_MILLION)


@dataclass(frozen=True, slots=True)
class HeldAttempt:
    """A row of a client's or a provider's attempts with its statements."""

    holder: str
    row: Any
    lease: Lease | None
    ack: Ack | None
    receipt: Receipt | None
    flaws: tuple[str, ...]

    @property
    def units(self) -> int:
        return self.ack.units if self.ack is not None else 0


@dataclass(frozen=True)
class Evidence:
    """Books by the name of whose they are; `exposure` is W of each client, where it is known."""

    domain: Domain
    channels_domain: Domain
    chain: ChainFacts
    schedulers: Mapping[str, SchedulerBooks]
    providers: Mapping[str, ProviderBooks]
    clients: Mapping[str, ClientBooks]
    exposure: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def attempts(self) -> Sequence[OpenedAttempt]:
        """Of all schedulers, opened and verified."""
        return [attempt for books in self.schedulers.values() for attempt in _opened_attempts(self.domain, books)]

    @cached_property
    def by_lease(self) -> Mapping[Hash, OpenedAttempt]:
        return {Hash(attempt.row.lease): attempt for attempt in self.attempts}

    @cached_property
    def held(self) -> Sequence[HeldAttempt]:
        """Of all clients and providers, opened and verified."""
        found = [_held(self.domain, name, row, row.lease, row.ack, row.receipt) for name, row in _rows(self.clients)]
        return found + [self._provided(name, row) for name, row in _rows(self.providers)]

    @cached_property
    def journaled(self) -> Mapping[Hash, HeldAttempt]:
        """Lease → what its provider's journal has of it."""
        return {a.lease.struct_hash: a for a in self.held if a.lease is not None and a.holder in self.providers}

    @cached_property
    def acked(self) -> Mapping[Hash, int]:
        """Lease → units of the newest ack that its client wrote down."""
        return {Hash(a.lease.struct_hash): a.units for a in self.held if a.lease is not None and a.holder in self.clients}

    def _provided(self, name: str, row: Any) -> HeldAttempt:
        return _held(self.domain, name, row, row.signed_lease, row.signed_ack, row.signed_receipt)


def earnings(lease: Lease, prompt_units: int, units: int, *, complete: bool) -> int:
    """What acked units are worth at the lease's prices (docs/protocol.md, "What is earned"), in base units."""
    if lease.task is not Task.GENERATE:
        earned = units * lease.prompt_price_per_mtok // PER_MILLION
    else:
        earned = units * lease.output_price_per_mtok // PER_MILLION
        earned += prompt_units * lease.prompt_price_per_mtok // PER_MILLION if complete else 0
    return min(earned, lease.maximum)


def short(key: bytes) -> str:
    """A hash for people."""
    return hex0x(key)[:12]


def _opened_attempts(domain: Domain, books: SchedulerBooks) -> Iterable[OpenedAttempt]:
    orders = {row.key: _opened(lambda raw: open_order(domain, parse(pb.JobOrder, raw))[0], row.job_order) for row in books.jobs}
    for row in books.attempts:
        yield _attempt(domain, row, *orders.get(row.job, (None, "its job is not in the ledger")))


def _attempt(domain: Domain, row: Any, spec: JobSpec | None, order_flaw: str) -> OpenedAttempt:
    held = _held(domain, "", row, row.signed_lease, row.ack, row.receipt)
    flaws = [f"order: {order_flaw}"] if order_flaw else []
    flaws += held.flaws
    if held.lease is not None:
        flaws += _mismatches(row, spec, held.lease, held.ack, held.receipt)
    return OpenedAttempt(row, spec, held.lease, held.ack, held.receipt, tuple(flaws))


def _held(domain: Domain, holder: str, row: Any, lease: bytes, ack: bytes | None, receipt: bytes | None) -> HeldAttempt:
    opened, flaw = _opened(lambda raw: open_lease(domain, parse(pb.SignedLease, raw)), lease)
    if opened is None:
        return HeldAttempt(holder, row, None, None, None, (f"lease: {flaw}",))
    client, provider, flaws = opened.client, opened.provider, list[str]()
    said: Ack | None = None
    shown: Receipt | None = None
    if ack:
        said, flaw = _opened(lambda raw: open_ack(domain, parse(pb.SignedAck, raw), client), ack)
        flaws += [f"ack: {flaw}"] if flaw else []
    if receipt:
        shown, flaw = _opened(lambda raw: open_receipt(domain, parse(pb.SignedReceipt, raw), provider), receipt)
        flaws += [f"receipt: {flaw}"] if flaw else []
    for name, statement in (("ack", said), ("receipt", shown)):
        if statement is not None and statement.lease != opened.struct_hash:
            flaws.append(f"the {name} is of another lease")
    return HeldAttempt(holder, row, opened, said, shown, tuple(flaws))


def _rows(books: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    return ((name, row) for name, each in books.items() for row in each.attempts)


def _mismatches(row: Any, spec: JobSpec | None, lease: Lease, ack: Ack | None, receipt: Receipt | None) -> list[str]:
    """Where the row, or one statement, speaks of something else than the lease does."""
    pairs: dict[str, tuple[object, object]] = {
        "lease's hash": (lease.struct_hash, Hash(row.lease)),
        "lease's job": (lease.job, row.job),
        "lease's number": (lease.attempt, row.number),
        "lease's provider": (lease.provider, row.provider),
    }
    if spec is not None:
        pairs["lease's order"] = (lease.spec, spec.struct_hash)
        pairs["lease's model"] = (lease.model, spec.model)
    if ack is not None:
        pairs["units acked"] = (ack.units, row.units)
    if receipt is not None:
        pairs["outcome"] = (int(receipt.outcome), row.outcome)
    if receipt is not None and spec is not None:
        pairs["receipt's request"] = (receipt.request_hash, spec.request_hash)
    return [f"the {what} is {_text(found)}, not {_text(wanted)}" for what, (found, wanted) in pairs.items() if found != wanted]


def _opened(opener: Callable[[bytes], T], raw: bytes) -> tuple[T | None, str]:
    """(the statement, "") or (None, why it does not verify)."""
    try:
        return opener(raw), ""
    except GpumarketError as error:
        return None, error.message


def _text(value: object) -> str:
    return short(value) if isinstance(value, bytes) else str(value)

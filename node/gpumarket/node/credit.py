"""How much one scheduler may owe this provider. Pure.

Invariant I4: what it owes, what it never paid of acked work, and one window of every open job together never pass the limit; and all that
open jobs can earn is covered by the free part of its channel's deposit. The limit starts at one window of every job that can be open at
once and grows with what was paid.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gpumarket.core.errors import Busy, OutOfFunds
from gpumarket.core.terms import Lease, Task
from gpumarket.core.units import Hash, Money, format_money, price_ceil

CREDIT_RETRY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class OpenJob:
    """A lease that is being served."""

    maximum: Money
    """Most that it can earn."""
    exposure: Money
    """Most that it can cost before an ack: its prompt and one window."""


def exposure(lease: Lease, prompt_units: int) -> Money:
    """Work done for a lease that no ack covers yet, at worst: the prompt of a text, and one window."""
    if lease.task is not Task.GENERATE:
        return min(lease.maximum, price_ceil(lease.window_units, lease.prompt_price_per_mtok))
    window = price_ceil(lease.window_units, lease.output_price_per_mtok) + price_ceil(prompt_units, lease.prompt_price_per_mtok)
    return min(lease.maximum, Money(window))


@dataclass(slots=True)
class Standing:
    """One scheduler's account with this provider. Changed only together with the journal."""

    open: dict[Hash, OpenJob] = field(default_factory=dict)
    unpaid: dict[Hash, Money] = field(default_factory=dict)
    """Earned by receipt and last ack, not yet under a voucher."""
    short: int = 0
    """What clients' acks prove as earned and final answers left out: base units. It stays owed."""
    paid: int = 0
    """Sum of the newest vouchers of all its channels: base units."""

    @property
    def owed(self) -> int:
        """What it owes, plus what open jobs could cost."""
        return self.short + sum(self.unpaid.values()) + sum(job.exposure for job in self.open.values())

    def limit(self, start: int, growth: float) -> int:
        """Credit limit in base units."""
        return start + int(self.paid * growth)


def require_credit(standing: Standing, job: OpenJob, limit: int) -> None:
    """Raises Busy when the scheduler would owe more than its limit: it pays first."""
    owed = standing.owed + job.exposure
    if owed > limit:
        raise Busy(
            f"the scheduler would owe {format_money(owed)} with this job; its credit here is {format_money(limit)} until it pays",
            retry_after_seconds=CREDIT_RETRY_SECONDS,
            hint="the scheduler settles claims, and the limit grows",
        )


def require_deposit(standing: Standing, job: OpenJob, deposit: int, vouchered: int, open_here: Iterable[OpenJob]) -> None:
    """Raises OutOfFunds when the channel's deposit does not cover everything that its open jobs can still earn."""
    promised = vouchered + sum(standing.unpaid.values()) + sum(other.maximum for other in open_here)
    if promised + job.maximum > deposit:
        raise OutOfFunds(
            f"the scheduler's channel to this provider holds {format_money(deposit)}, of which {format_money(promised)} is promised; "
            f"this lease can earn {format_money(job.maximum)}",
            hint="the scheduler tops the channel up; ask it for another provider meanwhile",
        )

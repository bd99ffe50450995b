"""An order, its attempts and the states of both, as the ledger keeps them. Pure values; what changes them is `lifecycle`."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from gpumarket.core.errors import ProtocolError
from gpumarket.core.terms import JobSpec, Lease
from gpumarket.core.units import Address, Hash
from gpumarket.settlement.pricing import client_amount


class AttemptState(enum.IntEnum):
    """See the table in `lifecycle`."""

    OPEN = 1
    HELD = 2
    OWED = 3
    REJECTED = 4
    CLOSED = 5
    EXPIRED = 6


class JobState(enum.IntEnum):
    """See the table in `lifecycle`; the names, in lower case, are those of `JobStatus.state`."""

    LEASED = 1
    DELIVERED = 2
    CHECKING = 3
    COMPLETED = 4
    REJECTED = 5
    CANCELLED = 6
    FAILED = 7
    EXPIRED = 8


LAPSED = (JobState.CANCELLED, JobState.FAILED, JobState.EXPIRED)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One lease and what became of it. `amount` is what the provider earns; serialized messages are kept as they were signed."""

    lease: Lease
    hash: Hash
    signed: bytes
    offer: bytes
    state: AttemptState = AttemptState.OPEN
    amount: int = 0
    units: int = 0
    complete: bool = False
    accepted: bool = False
    hold_until: int = 0
    receipt: bytes = b""
    ack: bytes = b""
    outcome: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """An order and its attempts. `open` is what stays reserved in the client's channel."""

    key: Hash
    spec: JobSpec
    order: bytes
    channel: Hash
    created_at: int
    state: JobState = JobState.LEASED
    open: int = 0
    attempts: tuple[Attempt, ...] = field(default=())

    @property
    def newest(self) -> Attempt:
        return self.attempts[-1]

    @property
    def spent(self) -> int:
        """What the client pays, fees included, for attempts that are held or owed."""
        return sum(charged(a) for a in self.attempts)

    def attempt(self, number: int) -> Attempt:
        """Raises ProtocolError for a number that was never leased."""
        if not 1 <= number <= len(self.attempts):
            raise ProtocolError(f"job 0x{self.key.hex()} has no attempt {number}")
        return self.attempts[number - 1]


def charged(attempt: Attempt) -> int:
    """What the client pays or may still pay for an attempt."""
    if attempt.state not in (AttemptState.HELD, AttemptState.OWED):
        return 0
    return client_amount(attempt.amount, attempt.lease.fee_ppm)


def lost_at(job: Job) -> frozenset[Address]:
    """Providers at which attempts of the job were lost, for whatever reason."""
    return frozenset(a.lease.provider for a in job.attempts if a.reason != "client-restart")


def barred_at(job: Job) -> frozenset[Address]:
    """Providers that get no further attempt of the job: where its newest was lost, and where the client calls the output bad."""
    barred = {a.lease.provider for a in job.attempts if a.reason == "bad-output"}
    return frozenset(barred) | (lost_at(job) & {job.newest.lease.provider})

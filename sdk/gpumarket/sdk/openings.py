"""What a rejection shows: the openings of the jobs that disagree, built from the journal. Pure but for reading it."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection

from gpumarket.core.codec import parse
from gpumarket.core.errors import JournalError
from gpumarket.core.seeds import drawing_seed
from gpumarket.core.terms import Task
from gpumarket.core.units import Address, Hash, Money
from gpumarket.sdk import store
from gpumarket.v1 import market_pb2 as mpb
from gpumarket.v1 import terms_pb2 as pb


@dataclass(frozen=True, slots=True)
class Delivered:
    """A delivered job as evidence: its opening, who did the deciding attempt, what that attempt cost (earlier ones are not judged)."""

    job: Hash
    attempt: int
    provider: Address
    cost: Money
    opening: mpb.Opening
    segments: tuple[pb.SeedSegment, ...]

    @property
    def output(self) -> list[bytes]:
        return list(self.opening.output)


def delivered(connection: Connection, job: Hash) -> Delivered:
    """The evidence of a delivered job. Raises JournalError for one that is not."""
    stored = store.load_job(connection, job)
    attempts = store.load_attempts(connection, job)
    if stored is None or not attempts or attempts[-1].signed_receipt is None or not stored.request:
        raise JournalError(f"job 0x{job.hex()} has no delivered result in this journal")
    last = attempts[-1]
    opening = mpb.Opening(
        lease=last.signed_lease,
        order=stored.order,
        receipt=last.signed_receipt,
        request=stored.request,
        salt=stored.salt,
        output=store.load_output(connection, job),
    )
    segments = seed_segments(parse(pb.GenerateRequest, stored.request), attempts) if stored.task is Task.GENERATE else ()
    return Delivered(job, last.number, last.lease.provider, last.amount, opening, segments)


def seed_segments(request: pb.GenerateRequest, attempts: list[store.StoredAttempt]) -> tuple[pb.SeedSegment, ...]:
    """Where in the output each attempt's sampling seed begins; attempts that delivered nothing leave none."""
    found: dict[int, bytes] = {}
    for attempt in attempts:
        if attempt.nonce is not None and attempt.units:
            found[attempt.lease.prefix_units] = drawing_seed(request, attempt.lease.struct_hash, attempt.nonce)
    return tuple(pb.SeedSegment(start=start, seed=seed) for start, seed in sorted(found.items()))

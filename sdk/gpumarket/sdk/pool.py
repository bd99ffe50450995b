"""What single checks let pass, counted together: a sequential test for each (provider, profile) over this client's checked text jobs.

One short answer, or int8 weights that hide inside the accept band, do not show in one job (`settlement.verification.pooled`). A provider
whose jobs together do not fit its profile gets no more orders from this client. It is no ground for a rejection: what was accepted stays
paid. The state is a replay of the journal's verdicts, so a restart forgets nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from sqlalchemy import Connection, select

from gpumarket.core.codec import parse
from gpumarket.core.terms import Task
from gpumarket.core.units import Address, Hash
from gpumarket.sdk.results import VerdictState
from gpumarket.sdk.tables import ATTEMPTS, JOBS
from gpumarket.settlement.verification import PROFILES, PooledTest
from gpumarket.settlement.verification import Verdict as Judged
from gpumarket.v1 import terms_pb2 as pb

_COUNTED = (VerdictState.ACCEPTED.value, VerdictState.GREY.value)


@dataclass(frozen=True, slots=True)
class Observation:
    """One checked text job: mean clipped gap over `units` tokens."""

    provider: Address
    profile: Hash
    mean_gap: float
    units: int


@dataclass(slots=True)
class Pool:
    """The tests of one client."""

    tests: dict[tuple[Address, Hash], PooledTest] = field(default_factory=dict)

    @classmethod
    def of(cls, observations: Iterable[Observation]) -> Pool:
        """The pool after these, oldest first."""
        pool = cls()
        for seen in observations:
            pool.observe(seen)
        return pool

    def observe(self, seen: Observation) -> Judged:
        """Count one job; the verdict over all of this provider's under the profile. A profile that is not shipped is not pooled."""
        profile = PROFILES.get(seen.profile)
        if profile is None:
            return Judged.ACCEPTED
        key = (seen.provider, seen.profile)
        self.tests[key] = self.tests.get(key, PooledTest(profile)).observe(seen.mean_gap, seen.units)
        return self.tests[key].verdict

    def distrusted(self, profile: Hash) -> frozenset[Address]:
        """Providers whose jobs under the profile do not fit it."""
        return frozenset(p for (p, d), test in self.tests.items() if d == profile and test.verdict is Judged.REJECTED)


def observations(connection: Connection) -> list[Observation]:
    """What the journal says of checked text jobs, oldest first."""
    query = (
        select(ATTEMPTS.c.provider, ATTEMPTS.c.lease, ATTEMPTS.c.units, JOBS.c.verdict_json)
        .join(JOBS, (JOBS.c.job == ATTEMPTS.c.job) & (JOBS.c.attempt == ATTEMPTS.c.number))
        .where(JOBS.c.task == int(Task.GENERATE), JOBS.c.verdict.in_(_COUNTED))
        .order_by(JOBS.c.ended_at, JOBS.c.job)
    )
    found = []
    for row in connection.execute(query):
        statistic = json.loads(row.verdict_json)["statistic"]
        if statistic is not None:
            profile = Hash(parse(pb.SignedLease, row.lease).lease.profile)
            found.append(Observation(Address(row.provider), profile, float(statistic), row.units))
    return found

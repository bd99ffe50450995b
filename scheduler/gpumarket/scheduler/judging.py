"""Judges reports beside the event loop: recomputing evidence is numbers and hashes, and a stranger chooses how many.

Measured: an opening of 1,000,000 one-token inputs (10 MiB) took 3.8 s of one core, 2,600 rows of 384 numbers (4 MiB) 0.01 s. So openings
are bounded in items, one report is judged at a time, and few of one client wait. Must never: let time make a result owed while the report
against it, which came in time, is being judged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gpumarket.core.errors import Busy
from gpumarket.core.signing import Domain
from gpumarket.core.units import Address, Hash
from gpumarket.scheduler.lifecycle import Job
from gpumarket.scheduler.reports import judge_report
from gpumarket.settlement.verification import Decision
from gpumarket.v1 import market_pb2 as pb

WAITING_MAX, WAITING_OF_CLIENT_MAX = 64, 4
"""Reports under way, of all clients and of one; of one job it is one. Whoever is refused sends it again."""
RETRY_SECONDS = 2.0


class Judging:
    """Carries `judge_report` out in a thread."""

    def __init__(self, domain: Domain, owner_of: Callable[[Address], Address]) -> None:
        self._domain, self._owner_of = domain, owner_of
        self._one = asyncio.Semaphore(1)
        self._under_way: dict[Hash, Address] = {}

    def concerns(self, job: Hash) -> bool:
        """Whether a report on this job is being judged."""
        return job in self._under_way

    async def judge(self, job: Job, number: int, request: pb.ReportRequest) -> Decision:
        """The verdict of the evidence. The job may have changed when this returns. Raises Busy, and what `judge_report` raises."""
        of_client = sum(1 for client in self._under_way.values() if client == job.spec.client)
        if job.key in self._under_way or of_client >= WAITING_OF_CLIENT_MAX or len(self._under_way) >= WAITING_MAX:
            raise Busy("other reports are being judged", retry_after_seconds=RETRY_SECONDS, hint="send it again")
        self._under_way[job.key] = job.spec.client
        try:
            async with self._one:
                return await asyncio.to_thread(judge_report, self._domain, job, number, request, self._owner_of)
        finally:
            del self._under_way[job.key]

"""Job ids that a caller made, so that it may ask again without paying twice: which job each stands for, and what was asked under it.

Invariant: an id stands for one request for ever. It is journaled in the transaction that journals its order, and the calls of one process
with the same id come one after another, so that the second one finds what the first one did.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select

from gpumarket.core.errors import ConfigError, JobIdReused
from gpumarket.core.terms import Task
from gpumarket.core.units import Hash, hex0x
from gpumarket.sdk.tables import JOB_IDS
from gpumarket.settlement.prepared import Prepared

JOB_ID_BYTES = 32
_CLAIM = Prepared(insert(JOB_IDS), JOB_IDS.c.keys())
_FIND = Prepared(select(JOB_IDS).where(JOB_IDS.c.job_id == bindparam("at")))


def job_id_of(value: bytes | None) -> Hash | None:
    """Raises ConfigError for an id of another length than 32 bytes."""
    if value is not None and len(value) != JOB_ID_BYTES:
        raise ConfigError(f"a job id of {len(value)} bytes; it has {JOB_ID_BYTES}", hint="hash what you have: sha256(key)")
    return None if value is None else Hash(value)


def fingerprint(model: Hash, task: Task, request: bytes, options: Mapping[str, Any]) -> Hash:
    """Of what is asked: model, task, request bytes and stop strings. What it may cost, and where it may run, is no part of it."""
    beside = json.dumps(options.get("stop", []))
    return Hash(hashlib.sha256(model + bytes([int(task)]) + hashlib.sha256(request).digest() + beside.encode()).digest())


def claim(connection: Connection, job_id: Hash, job: Hash, asked: Hash) -> None:
    """From now on the id stands for this job."""
    _CLAIM.run(connection, job_id=job_id, job=job, fingerprint=asked)


def find(connection: Connection, job_id: Hash, asked: Hash) -> Hash | None:
    """The job that the id stands for; None for a fresh one. Raises JobIdReused when something else was asked under it."""
    row = _FIND.first(connection, at=job_id)
    if row is None:
        return None
    if row["fingerprint"] != asked:
        raise JobIdReused(
            f"job id {hex0x(job_id)} was used for another request (job {hex0x(row['job'])})",
            hint="make a fresh id for each request, and give it again only with the very same one",
        )
    return Hash(row["job"])


@dataclass(slots=True)
class JobIdLocks:
    """Lets the calls with one id in one after another."""

    _held: dict[Hash, tuple[asyncio.Lock, list[None]]] = field(default_factory=dict)

    @asynccontextmanager
    async def one_at_a_time(self, job_id: Hash | None) -> AsyncIterator[None]:
        """Waits for an earlier call with the same id to end; None waits for nobody."""
        if job_id is None:
            yield
            return
        lock, users = self._held.setdefault(job_id, (asyncio.Lock(), []))
        users.append(None)
        try:
            async with lock:
                yield
        finally:
            users.pop()
            if not users:
                del self._held[job_id]

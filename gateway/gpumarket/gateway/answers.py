"""Idempotency-Key: the same key and request get the same answer and are paid once; the same key and another request are refused.

What is kept is a seed, from which the ids of the request's jobs follow; the client answers a job that it already has from its own
journal. Invariant: an Idempotency-Key belongs to one API key: nobody finds another's. A request that failed keeps nothing: its repetition
is a new one.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from gpumarket.core.ports import Clock, Random
from gpumarket.core.units import Hash
from gpumarket.gateway.keys import Key
from gpumarket.gateway.problems import Problem
from gpumarket.gateway.tables import ANSWERS
from gpumarket.settlement.journal import Journal

NAME_CHARACTERS_MAX = 255
IN_FLIGHT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a request's jobs and ids are made from. `created` is unix seconds."""

    seed: bytes
    created: int
    kept: bool = False
    """Whether the same request may come again and is to find the same jobs."""

    def job_id(self, index: int) -> Hash:
        return Hash(hashlib.sha256(self.seed + index.to_bytes(4, "big")).digest())

    def name(self, prefix: str) -> str:
        """An id for the answer, or a part of it: the same whenever it is asked for. Tells nothing of the jobs."""
        return prefix + hashlib.sha256(b"name" + prefix.encode() + self.seed).hexdigest()[:32]


class Answers:
    """The kept seeds of one gateway."""

    def __init__(self, journal: Journal, clock: Clock, random: Random, keep_seconds: int) -> None:
        self._journal, self._clock, self._random, self._keep = journal, clock, random, keep_seconds
        self._in_flight: set[tuple[str, bytes]] = set()

    @asynccontextmanager
    async def ticket(self, key: Key, name: str | None, path: str, body: bytes) -> AsyncIterator[Ticket]:
        """For one request; `name` is its Idempotency-Key. Raises Problem: 400, 422 for another request's, 409 while that runs."""
        if name is None:
            yield Ticket(self._random.token(32), self._clock.now())
            return
        if not 0 < len(name) <= NAME_CHARACTERS_MAX or not name.isascii() or not name.isprintable():
            told = f"an Idempotency-Key is 1 to {NAME_CHARACTERS_MAX} printable ASCII characters"
            raise Problem(400, "invalid_idempotency_key", told, param="Idempotency-Key")
        entry = (key.id, hashlib.sha256(name.encode()).digest())
        if entry in self._in_flight:
            told = "a request with this Idempotency-Key is under way"
            raise Problem(409, "idempotency_key_in_use", told, param="Idempotency-Key", again_seconds=IN_FLIGHT_SECONDS)
        self._in_flight.add(entry)
        try:
            yield await self._take(entry, hashlib.sha256(path.encode() + b"\0" + body).digest())
        except Problem as problem:
            if problem.code != "idempotency_key_reused":
                await self._forget(entry)
            raise
        except BaseException:
            await self._forget(entry)
            raise
        finally:
            self._in_flight.discard(entry)

    async def _take(self, entry: tuple[str, bytes], request: bytes) -> Ticket:
        now = self._clock.now()
        fresh = {"key": entry[0], "name": entry[1], "request": request, "seed": self._random.token(32), "created_at": now}

        def work(connection: Connection) -> Any:
            connection.execute(delete(ANSWERS).where(ANSWERS.c.created_at < now - self._keep))
            found = connection.execute(select(ANSWERS).where(*_is(entry))).mappings().first()
            if found is None:
                connection.execute(insert(ANSWERS), fresh)
            return dict(found or fresh)

        row = await self._journal.transact(work)
        if bytes(row["request"]) != request:
            told = "this Idempotency-Key was used for another request"
            raise Problem(422, "idempotency_key_reused", told, param="Idempotency-Key")
        return Ticket(bytes(row["seed"]), row["created_at"], kept=True)

    async def _forget(self, entry: tuple[str, bytes]) -> None:
        await self._journal.transact(lambda c: c.execute(delete(ANSWERS).where(*_is(entry))) and None)


def _is(entry: tuple[str, bytes]) -> tuple[Any, Any]:
    return ANSWERS.c.key == entry[0], ANSWERS.c.name == entry[1]

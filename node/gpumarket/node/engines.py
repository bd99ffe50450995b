"""The engines of the models on sale: started when needed, a bounded queue before each, started again after a death.

Invariants: at most `slots` jobs of a model run, at most `queue_limit` wait, the next one is refused with a time to come back (I8); an
engine that does not start is not tried again at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from gpumarket.core.errors import Busy, EngineFailed, GpumarketError
from gpumarket.core.ports import Clock
from gpumarket.core.terms import ModelManifest
from gpumarket.core.units import Hash, hex0x
from gpumarket.node.admission import OnSale
from gpumarket.node.engine.base import Engine
from gpumarket.node.pace import Pace

EngineFactory = Callable[[ModelManifest, Path, int], Engine]
"""(manifest, folder of the model, slots) -> an engine that is not started yet."""

_RESTART_SECONDS_MAX = 60.0
_log = structlog.get_logger()


class Seat:
    """One model's engine with its queue."""

    def __init__(self, model: OnSale, make: Callable[[], Engine], queue_limit: int, clock: Clock) -> None:
        self.model = model
        self.running = 0
        self.waiting = 0
        self.job_seconds = 1.0
        """Smoothed time that a job holds its slot."""
        self.pace = Pace()
        self.heard_at = clock.monotonic()
        """When the engine last gave something, or was last given nothing to do."""
        self.on_free: Callable[[], None] = lambda: None
        """A slot was given back: told before the job's receipt, so that its client's next order finds the place free."""
        self._make, self._queue_limit, self._clock = make, queue_limit, clock
        self._slots = asyncio.Semaphore(model.slots)
        self._changing = asyncio.Lock()
        self._start: asyncio.Task[Engine] | None = None
        self._engine: Engine | None = None
        self._deaths = 0
        self._not_before = 0.0

    @property
    def warm(self) -> bool:
        """Whether a started engine is there, as far as is known without asking it."""
        return self._engine is not None and _alive(self._engine)

    @property
    def free(self) -> int:
        """Jobs that could start now; none while the engine may not be tried again."""
        if not self.warm and self._not_before > self._clock.monotonic():
            return 0
        return max(0, self.model.slots - self.running - self.waiting)

    def enter(self) -> Place:
        """Take a place in the queue. Raises Busy when it is full, or while the engine may not be tried again."""
        ahead = self.running + self.waiting - self.model.slots
        if ahead >= self._queue_limit:
            wait = max(1.0, self.job_seconds * (ahead + 1) / self.model.slots)
            raise Busy(
                f"{self.model.manifest.name}: {self.waiting} jobs are waiting already", retry_after_seconds=round(min(wait, 60.0), 1)
            )
        pause = self._not_before - self._clock.monotonic()
        if not self.warm and pause > 0:
            raise Busy(
                f"the engine of {self.model.manifest.name} failed to start; it is tried again soon", retry_after_seconds=round(pause, 1)
            )
        self.waiting += 1
        return Place(self, max(0, ahead + 1))

    async def warm_up(self) -> Engine:
        """The started engine. Raises EngineFailed, and then not again before a pause that grows with each failure.

        Starting goes on when a caller is cancelled: a client that orders and leaves must not keep an engine from ever starting.
        """
        if self._engine is not None and _alive(self._engine):
            return self._engine
        if self._start is None or self._start.done():
            self._start = asyncio.create_task(self._start_engine())
        return await asyncio.shield(self._start)

    async def _start_engine(self) -> Engine:
        async with self._changing:
            if self._engine is not None:
                if _alive(self._engine):
                    return self._engine
                _log.warning("engine died between jobs", model=self.model.manifest.name)
                await self._put_away(self._engine)
            engine = self._make()
            try:
                await engine.start()
                device = (await engine.stats()).get("device", "")
            except BaseException as error:
                await engine.close()
                if isinstance(error, GpumarketError):
                    self._deaths += 1
                    self._not_before = self._clock.monotonic() + min(_RESTART_SECONDS_MAX, 2.0**self._deaths)
                raise
            self._engine, self._deaths = engine, 0
            _log.info("engine started", model=self.model.manifest.name, device=device)
            return engine

    async def check(self) -> None:
        """After a failed job: an engine that no longer answers is put away, and the next job starts another."""
        async with self._changing:
            engine = self._engine
            if engine is None:
                return
            try:
                await engine.stats()
            except EngineFailed as error:
                _log.warning("engine lost", model=self.model.manifest.name, reason=error.message)
                await self._put_away(engine)

    async def sandbox(self) -> str:
        """What is in force around the engine: "none", "process", "process+netns". "" while it is cold."""
        if self._engine is None or not _alive(self._engine):
            return ""
        try:
            return str((await self._engine.stats()).get("sandbox", "none"))
        except EngineFailed:
            return ""  # it has just died: nothing is in force around it

    async def close(self) -> None:
        """Stop the engine, or its start."""
        if self._start is not None and not self._start.done():
            self._start.cancel()
            await asyncio.wait([self._start])
        if self._engine is not None:
            await self._put_away(self._engine)

    async def _put_away(self, engine: Engine) -> None:
        self._engine = None
        await engine.close()

    async def wait_for_slot(self) -> None:
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        if not self.running:
            self.heard_at = self.now()
        self.running += 1

    def release(self, seconds: float) -> None:
        self.running -= 1
        self.job_seconds += 0.2 * (seconds - self.job_seconds)
        self._slots.release()
        self.on_free()

    def now(self) -> float:
        return self._clock.monotonic()


@dataclass(slots=True)
class Place:
    """A place in a seat's queue: used once, by `engine()`, or given up by `leave()`."""

    seat: Seat
    position: int
    """Jobs ahead of this one that have to end first."""
    used: bool = False

    @asynccontextmanager
    async def engine(self) -> AsyncIterator[Engine]:
        """Wait for a slot and hold it. Raises EngineFailed when the engine does not start."""
        self.used = True
        await self.seat.wait_for_slot()
        started = self.seat.now()
        try:
            yield await self.seat.warm_up()
        finally:
            self.seat.release(self.seat.now() - started)

    def leave(self) -> None:
        """Give the place up before it was used."""
        if not self.used:
            self.used = True
            self.seat.waiting -= 1


class Engines:
    """All seats of this provider, by model digest."""

    def __init__(self, seats: Mapping[Hash, Seat]) -> None:
        self.seats = seats

    @property
    def places(self) -> dict[Hash, int]:
        """Jobs that could start now, by model, where there are any: a place of one model is of no use to a job of another."""
        return {digest: seat.free for digest, seat in self.seats.items() if seat.free}

    @property
    def running(self) -> int:
        return sum(seat.running for seat in self.seats.values())

    @property
    def queued(self) -> int:
        return sum(seat.waiting for seat in self.seats.values())

    @property
    def capacity(self) -> int:
        return sum(seat.model.slots for seat in self.seats.values())

    @property
    def paces(self) -> dict[Hash, int]:
        """Measured units in 1,000 seconds of one job, by model; 0 is unknown."""
        return {digest: seat.pace.per_kilosecond for digest, seat in self.seats.items()}

    @property
    def warm(self) -> list[Hash]:
        return [digest for digest, seat in self.seats.items() if seat.warm]

    async def warm_up(self, digests: list[Hash]) -> None:
        """Start these, side by side. A failure is logged and left to the first job: the other models go on sale meanwhile."""
        for digest, result in zip(
            digests, await asyncio.gather(*(self.seats[d].warm_up() for d in digests), return_exceptions=True), strict=True
        ):
            if isinstance(result, GpumarketError):
                _log.error("engine does not start", model=hex0x(digest), reason=result.message, hint=result.hint)
            elif isinstance(result, BaseException):
                raise result

    async def sandbox(self) -> str:
        """The weakest tier in force around a running engine; "none" while none runs, so that nothing is claimed unseen."""
        tiers = [tier for tier in [await seat.sandbox() for seat in self.seats.values()] if tier]
        order = ["none", "process", "process+netns"]
        return min(tiers, key=lambda t: order.index(t) if t in order else 0, default="none")

    async def close(self) -> None:
        await asyncio.gather(*(seat.close() for seat in self.seats.values()))


def _alive(engine: Engine) -> bool:
    """An engine in a process of its own knows whether that process lives; any other one counts as alive until a call fails."""
    return bool(getattr(engine, "running", True))

"""Virtual time for whole processes: each has an event loop of its own that never waits, and a crash is a loop that is never run again.

`Timeline.run(seconds)` runs what is ready, then jumps to the next timer or world event, until the time is up. Everything is one thread and
one order: the same inputs give the same history. A killed process runs no `finally`, no cancellation and no callback: what it had in
memory is gone, what it had committed (`medium.Medium`) is there for the next process.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from asyncio import events
from collections.abc import Callable, Coroutine
from typing import Any

from gpumarket.core.errors import GpumarketError, JournalError

START = 1_800_000_000
"""Unix seconds at virtual time 0."""


class Timeline:
    """The world's clock and agenda."""

    def __init__(self) -> None:
        self.now = 0.0
        self.processes: list[Process] = []
        self.defects: list[str] = []
        """What no role may ever do: assertions of its own, exceptions outside the error tree."""
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, seconds: float, work: Callable[[], None]) -> None:
        """Do this later, in the world: a delivery, a commit, a block."""
        heapq.heappush(self._agenda, (self.now + seconds, next(self._order), work))

    def run(self, seconds: float) -> None:
        """Let virtual time pass."""
        end = self.now + seconds
        while True:
            self._drain()
            following = self._next()
            if following is None or following > end:
                break
            self.now = following
            while self._agenda and self._agenda[0][0] <= self.now:
                heapq.heappop(self._agenda)[2]()
        self.now = end

    def _next(self) -> float | None:
        times = [t for t in (p.next_timer() for p in self.processes) if t is not None]
        if self._agenda:
            times.append(self._agenda[0][0])
        return max(self.now, min(times)) if times else None

    def _drain(self) -> None:
        busy = True
        while busy:
            busy = False
            for process in list(self.processes):
                busy |= process.turn()


class Process:
    """One role's process: a loop, its tasks, and whether it lives. `services` are the rpc servicers that it listens with."""

    def __init__(self, timeline: Timeline, name: str) -> None:
        self.timeline, self.name = timeline, name
        self.alive = True
        self.services: dict[str, Any] = {}
        self.loop = _Loop(timeline, self)
        self._tasks: set[asyncio.Task[Any]] = set()
        timeline.processes.append(self)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine in this process."""
        return self.loop.create_task(work)

    def live(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run what the daemon does for ever: any error but a broken journal's that ends it is a defect, since it ends the daemon."""
        task = self.spawn(work)
        task.add_done_callback(self._died)
        return task

    def call(self, work: Callable[[], object]) -> None:
        """Run a function in this process's loop, if it lives."""
        if self.alive:
            self.loop.call_soon(work)

    def kill(self) -> None:
        """SIGKILL. Its coroutines are thrown away; whatever they try on the way out reaches nobody, since every port asks `alive`."""
        if not self.alive:
            return
        self.alive = False
        self.timeline.processes.remove(self)
        for task in list(self._tasks):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            _discard(task.get_coro())
        self._tasks.clear()
        self.loop.drop()

    def next_timer(self) -> float | None:
        return self.loop.next_timer()

    def turn(self) -> bool:
        """Run what is ready now; whether anything was."""
        return self.loop.turn()

    def watch(self, task: asyncio.Task[Any]) -> None:
        """Remember a task of this process, and note the defect that ends it."""
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or not self.alive:
            return
        for error in _flat(task.exception()):
            if not isinstance(error, GpumarketError | asyncio.CancelledError | PeerError):
                self.timeline.defects.append(f"{self.name}: {type(error).__name__}: {error} (in {_where(error)})")

    def _died(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled() or not self.alive:
            return
        for error in _flat(task.exception()):
            if isinstance(error, GpumarketError) and not isinstance(error, JournalError):
                self.timeline.defects.append(f"{self.name} died: {type(error).__name__}: {error} (in {_where(error)})")


class PeerError(Exception):
    """An error that a handler answers its peer with: no defect."""


class _Loop(asyncio.BaseEventLoop):
    """An asyncio loop whose time is the timeline's and which is turned by it."""

    def __init__(self, timeline: Timeline, process: Process) -> None:
        super().__init__()
        self._timeline, self.process = timeline, process
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self._timeline.now

    def turn(self) -> bool:
        self._due()
        if not self._ready:  # type: ignore[attr-defined]
            return False
        ran = False
        events._set_running_loop(self)
        try:
            while self._ready and self.process.alive:  # type: ignore[attr-defined]
                handle = self._ready.popleft()  # type: ignore[attr-defined]
                if not handle._cancelled:
                    handle._run()
                ran = True
        finally:
            events._set_running_loop(None)
        return ran

    def next_timer(self) -> float | None:
        timers = self._scheduled  # type: ignore[attr-defined]
        while timers and timers[0]._cancelled:
            heapq.heappop(timers)._scheduled = False
        return timers[0]._when if timers else None

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """In this thread, at once: another one's pace would not be virtual."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def drop(self) -> None:
        self._ready.clear()  # type: ignore[attr-defined]
        self._scheduled.clear()  # type: ignore[attr-defined]

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if self.process.alive and error is not None and not isinstance(error, GpumarketError | PeerError):
            self._timeline.defects.append(f"{self.process.name}: {context.get('message')}: {error!r}")

    def _due(self) -> None:
        timers = self._scheduled  # type: ignore[attr-defined]
        while timers and timers[0]._when <= self._timeline.now:
            handle = heapq.heappop(timers)
            handle._scheduled = False
            if not handle._cancelled:
                self._ready.append(handle)  # type: ignore[attr-defined]

    def _make_task(self, loop: asyncio.AbstractEventLoop, work: Any, **more: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, **more)
        self.process.watch(task)
        return task

    def _write_to_self(self) -> None:
        """Nobody sleeps in a selector."""


class SimClock:
    """Both clocks of a process; `skew` seconds off."""

    def __init__(self, timeline: Timeline, skew: int = 0) -> None:
        self._timeline, self.skew = timeline, skew

    def now(self) -> int:
        return int(START + self._timeline.now) + self.skew

    def monotonic(self) -> float:
        return self._timeline.now


def running_process() -> Process:
    """The process whose code runs now."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, _Loop)
    return loop.process


def _discard(coroutine: Any) -> None:
    """Let go of a suspended coroutine: one that awaits on its way out is closed again until it is over."""
    for _ in range(50):
        with contextlib.suppress(Exception, asyncio.CancelledError, GeneratorExit, BaseExceptionGroup):
            coroutine.close()
            return


def _flat(error: BaseException | None) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _flat(part)]
    return [error] if error is not None else []


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}" if trace is not None else "?"

"""Readings that take a wait: the chain's answer, another process's. Taken when somebody looks, kept for a while, left out when they fail.

Invariant: one source that hangs or fails costs a look its own readings and a bounded wait, and is counted; it never costs the others.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog

from gpumarket.core.errors import GpumarketError
from gpumarket.telemetry.metrics import Exposition, Metric, Reading, counter
from gpumarket.telemetry.window import Recent

Readings = Mapping[str, Reading]
Sources = Mapping[str, tuple[Callable[[], Awaitable[Readings]], float]]
"""By name: how to ask, and for how many seconds an answer serves."""
WAIT_SECONDS = 3.0
_log = structlog.get_logger()


class Measuring:
    """The sources of one process."""

    def __init__(self, sources: Sources) -> None:
        self._sources = {name: Recent(ask, seconds) for name, (ask, seconds) in sources.items()}
        self.failures: Counter[str] = Counter()

    @property
    def metric(self) -> Metric:
        """What counts the failures, by source."""
        return counter("measurements_failed_total", "Measurements that failed or took too long.", "source", sorted(self._sources))

    async def take(self) -> dict[str, Reading]:
        """All readings that can be had now."""
        answers = await asyncio.gather(*(self._ask(name, source) for name, source in self._sources.items()))
        return {name: reading for answer in answers for name, reading in answer.items()} | {self.metric.name: dict(self.failures)}

    async def close(self) -> None:
        """Stop what is being asked."""
        await asyncio.gather(*(source.close() for source in self._sources.values()))

    async def _ask(self, name: str, source: Recent[Readings]) -> Readings:
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                return await source.get()
        except (GpumarketError, TimeoutError) as error:
            self.failures[name] += 1
            _log.info("measurement_failed", source=name, reason=str(error) or "it took too long")
            return {}


class ProcessMetrics(ABC):
    """The metrics of a process, some of them measured. `text` is what Prometheus reads."""

    def __init__(self, sources: Sources, metrics_of: Callable[[Metric], Sequence[Metric]]) -> None:
        """`metrics_of` makes the table, given the metric that counts failed measurements."""
        self._measuring = Measuring(sources)
        self._measured: Readings = {}
        self.exposition = Exposition(metrics_of(self._measuring.metric), lambda: {**self.read(), **self._measured})

    @abstractmethod
    def read(self) -> Readings:
        """What needs no wait, now."""

    async def text(self) -> bytes:
        """All of it, now."""
        self._measured = await self._measuring.take()
        return self.exposition.text()

    async def close(self) -> None:
        """Stop measuring."""
        await self._measuring.close()

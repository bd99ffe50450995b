"""Offers on their way to a daemon's reader: bounded, newest kept.

Invariant: a slow reader costs nobody else anything; what it loses is counted.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable


class OfferStream(AsyncIterator[bytes]):
    """An async iterator over a bounded queue that drops its oldest."""

    def __init__(self, queue_max: int, on_end: Callable[[OfferStream], None]) -> None:
        self._queue: deque[bytes] = deque(maxlen=queue_max)
        self._on_end = on_end
        self._ready = asyncio.Event()
        self._ended = False
        self.dropped = 0
        """Offers that the reader was too slow for."""

    def put(self, offer: bytes) -> None:
        """Queues an offer; the oldest goes when there is no room."""
        self.dropped += len(self._queue) == self._queue.maxlen
        self._queue.append(offer)
        self._ready.set()

    def end(self) -> None:
        """The reader gets what is queued, then stops."""
        self._ended = True
        self._ready.set()
        self._on_end(self)

    async def aclose(self) -> None:
        """A reader that has had enough."""
        self._queue.clear()
        self.end()

    async def __anext__(self) -> bytes:
        while not self._queue:
            if self._ended:
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        return self._queue.popleft()


class NewestSequence:
    """The highest sequence seen per provider, so that a restarted process does not tell the same news twice."""

    def __init__(self, providers_max: int) -> None:
        self._providers_max = providers_max
        self._newest: OrderedDict[bytes, int] = OrderedDict()

    def rises(self, provider: bytes, sequence: int) -> bool:
        """Whether `sequence` is higher than all before it; remembers it then."""
        if self._newest.get(provider, -1) >= sequence:
            return False
        self._newest[provider] = sequence
        self._newest.move_to_end(provider)
        if len(self._newest) > self._providers_max:
            self._newest.popitem(last=False)
        return True

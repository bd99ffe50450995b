"""Where keys buy: admission, a reservation before each order, and the real cost after each end, whoever leaves in between.

Invariants: no order without a durable reservation that covers all it may cost; every job that holds one is seen to its end, so that the
reservation ends, too; more than `jobs_max` jobs never run at once, and what comes on top hears so at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from gpumarket.core.errors import GpumarketError, OverMaxCost, ResultRejected
from gpumarket.core.ports import Clock
from gpumarket.core.terms import Task
from gpumarket.core.units import Hash, Money, format_money, hex0x
from gpumarket.gateway.keys import Key
from gpumarket.gateway.ledger import Ledger
from gpumarket.gateway.problems import Problem
from gpumarket.gateway.settings import GatewaySettings
from gpumarket.sdk import Client
from gpumarket.sdk.ordering import HEADROOM, Terms
from gpumarket.sdk.results import ChatResult, InputTruncated, JobOutcome, Piece
from gpumarket.sdk.streaming import ChatStream

Approve = Callable[[Terms], Awaitable[Money]]
Ordered = Callable[[Approve], ChatStream]
AGAIN_SECONDS = 5.0
"""Between two tries to bring a job to its end whose scheduler does not answer."""
FULL_SECONDS = 1.0
_log = structlog.get_logger()


class Counter:
    """Buys on the market for API keys."""

    def __init__(self, client: Client, ledger: Ledger, settings: GatewaySettings, clock: Clock) -> None:
        self.client, self.ledger, self._settings, self._clock = client, ledger, settings, clock
        self.running = 0
        """Jobs under way."""
        self.idle = asyncio.Event()
        """Set while no job runs."""
        self.idle.set()
        self.turned_away = 0
        self.draining = False
        self._tasks: set[asyncio.Task[None]] = set()

    @contextmanager
    def admitted(self, jobs: int) -> Iterator[None]:
        """Places for some jobs while inside. Raises Problem (429) when there are not as many, (503) while the gateway drains."""
        if self.draining:
            raise Problem(503, "draining", "the gateway is being stopped", again_seconds=FULL_SECONDS)
        if self.running + jobs > self._settings.jobs_max:
            self.turned_away += 1
            raise Problem(429, "rate_limit_exceeded", "the gateway runs as many jobs as it may", again_seconds=FULL_SECONDS)
        self.running += jobs
        self.idle.clear()
        try:
            yield
        finally:
            self.running -= jobs
            if not self.running:
                self.idle.set()

    def text(self, key: Key, order: Ordered) -> TextJob:
        """A text job for a key; nothing happens until its pieces are read."""
        return TextJob(self, key, order)

    async def whole(self, key: Key, order: Callable[[Approve], Awaitable[Any]]) -> Any:
        """The result of a job that is not streamed; billed to the key."""
        held = Held(self, key)
        result = None
        try:
            result = await order(held.approve)
            return result
        finally:
            held.conclude(result)

    def recover(self) -> None:
        """See the jobs that an earlier process left to their end. Call once, after `Ledger.load`."""
        for left in self.ledger.load():
            self.later(self.see_to_end(left.job))

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the background; `close` waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait for what is being settled. What cannot be (a scheduler is away) stays reserved until the next start."""
        pending = list(self._tasks)
        if pending:
            _, late = await asyncio.wait(pending, timeout=AGAIN_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def see_to_end(self, job: Hash) -> None:
        """Settle a job by the client's journal; one that still runs there is brought to its end first."""
        while (spent := self.client.spent(job)) is not None and not spent.over:
            try:
                await self.client.resume(job)
            except GpumarketError as error:
                if error.retryable:
                    _log.info("job_unfinished", job=hex0x(job), reason=error.code, again_seconds=AGAIN_SECONDS)
                    await asyncio.sleep(AGAIN_SECONDS)
                    continue
                spent = self.client.spent(job)
                break
        await self.ledger.settle(job, spent.amount if spent is not None else Money(0))


class Held:
    """The reservation of one purchase. `approve` is asked by the client between quote and order."""

    def __init__(self, counter: Counter, key: Key) -> None:
        self._counter, self._key = counter, key
        self._job: Hash | None = None

    async def approve(self, terms: Terms) -> Money:
        """What the purchase may cost. Raises Problem or InvalidRequest: then nothing is ordered."""
        cut = next((w for w in terms.warnings if isinstance(w, InputTruncated)), None)
        if cut is not None:
            told = f"an input has {cut.tokens} tokens; the model takes {cut.kept} beside the output that was asked for"
            raise Problem(400, "context_length_exceeded", told, param="input" if terms.task is Task.EMBED else "messages")
        least, cap = terms.quote.maximum, self._counter._settings.job_cost_limit
        if least > cap:
            raise OverMaxCost(f"this may cost {format_money(least)}; the gateway's owner allows {format_money(cap)} a job")
        self._job = terms.job
        return await self._counter.ledger.reserve(self._key, terms.job, least, Money(min(cap, HEADROOM * least)))

    def conclude(self, result: JobOutcome | None) -> None:
        """The purchase is over: book what it cost, in the background."""
        if self._job is None:
            return  # nothing was ordered, or it was an answer that had been bought before
        if result is not None:
            self._counter.later(self._counter.ledger.settle(self._job, result.total_cost))
        else:
            self._counter.later(self._counter.see_to_end(self._job))


class TextJob:
    """One job of text: read `pieces`, then `result`. `void` once a check refused what was streamed: `result` is then another's answer."""

    def __init__(self, counter: Counter, key: Key, order: Ordered) -> None:
        self._counter, self._key, self._order = counter, key, order
        self._result: ChatResult | None = None
        self.void = False

    @property
    def result(self) -> ChatResult:
        assert self._result is not None, "read the pieces first"
        return self._result

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """As they come. Leaving early, or being cancelled, stops the provider; what came is billed."""
        held = Held(self._counter, self._key)
        stream = self._order(held.approve)
        try:
            async for piece in stream.pieces():
                yield piece
            self._result = stream.result
        except ResultRejected as error:
            self._result = _replacement(stream, error)
            self.void = True
        finally:
            await stream.aclose()
            held.conclude(self._result)


def _replacement(stream: ChatStream, error: ResultRejected) -> ChatResult:
    """Another provider's answer to a job that was rejected. Raises `error` where there is none."""
    try:
        return stream.result
    except GpumarketError:
        raise error from None

"""Embeddings that one key asks for at the same time ride on one job: one match, one receipt and one bill for all of them.

A request leaves at once while fewer jobs of its kind run than may; what comes meanwhile leaves together, when one of those has ended and
its callers had a moment to ask again, or when it fills a job. So a lone request never waits. A job costs its client about the same for
one text as for sixteen (benchmarks/RESULTS.md, `gateway_cpu_ms`).

Invariants: only requests of one API key, model and kind of input share, so no tenant's input can spoil another's answer. Each pays its
tokens' part of the job, and the parts add up to what the job cost. What is refused before anything was ordered (an input too long, a
budget that covers some of them) is asked again one by one: each then hears its own answer. Not so where nobody answers, or all are busy.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

from gpumarket.core.errors import Busy, NetworkError
from gpumarket.core.units import Money
from gpumarket.gateway.counter import Approve, Counter
from gpumarket.gateway.keys import Key
from gpumarket.gateway.openai.inputs import Inputs
from gpumarket.sdk.ordering import Terms
from gpumarket.sdk.results import NOTHING, EmbedResult, Usage

INPUTS_MAX, INPUTS_OF_REQUEST_MAX = 256, 32
"""Of one shared job, and of a request in it: a larger one has a job of its own, as has one whose job is to have an id that stays."""
MOMENT_SECONDS = 0.005
"""Who asks again at the end of a shared job comes within this: else the first of them would leave alone, and the others wait for it."""


class _Kind(NamedTuple):
    key: str
    model: str
    texts: bool


@dataclass(slots=True, eq=False)
class _Rider:
    key: Key
    inputs: Inputs
    answer: asyncio.Future[EmbedResult]


@dataclass(slots=True, eq=False)
class _Line:
    waiting: deque[_Rider] = field(default_factory=deque)
    jobs: int = 0

    @property
    def fills_a_job(self) -> bool:
        return sum(len(rider.inputs) for rider in self.waiting) >= INPUTS_MAX


class Sharing:
    """Buys embeddings for requests that may share; at most `jobs_max` shared jobs of a kind run at once."""

    def __init__(self, counter: Counter, jobs_max: int) -> None:
        self._counter, self._jobs_max = counter, jobs_max
        self._lines: dict[_Kind, _Line] = {}
        self.shared = 0
        """Results whose job was another's, too."""

    def takes(self, inputs: Inputs) -> bool:
        """Whether a request of these inputs may share its job."""
        return self._jobs_max > 0 and len(inputs) <= INPUTS_OF_REQUEST_MAX

    async def embed(self, key: Key, model: str, inputs: Inputs) -> EmbedResult:
        """This request's part of a job: its vectors, its tokens, and its part of the cost, checks included. Raises as Client.embed."""
        kind = _Kind(key.id, model, isinstance(inputs[0], str))
        line = self._lines.setdefault(kind, _Line())
        rider = _Rider(key, inputs, asyncio.get_running_loop().create_future())
        line.waiting.append(rider)
        self._depart(kind, line)
        try:
            return await rider.answer
        finally:
            rider.answer.cancel()  # whoever waits no longer is left behind, and the job stopped with its last rider

    def _depart(self, kind: _Kind, line: _Line) -> None:
        while (line.jobs < self._jobs_max or line.fills_a_job) and (riders := _boarding(line)):
            line.jobs += 1
            self._counter.later(self._ride(kind, line, riders))
        if not line.jobs and self._lines.get(kind) is line:
            del self._lines[kind]

    async def _ride(self, kind: _Kind, line: _Line, riders: list[_Rider]) -> None:
        job = asyncio.create_task(self._buy(kind.model, riders))
        try:
            for rider in riders:
                rider.answer.add_done_callback(lambda _: job.cancel() if all(r.answer.cancelled() for r in riders) else None)
            await asyncio.wait({job})
            if len(riders) > 1 or line.waiting:
                await asyncio.sleep(MOMENT_SECONDS)
        finally:
            job.cancel()
            for rider in riders:
                rider.answer.cancel()  # nobody has one left to wait for, unless the gateway is being closed
            line.jobs -= 1
            self._depart(kind, line)

    async def _buy(self, model: str, riders: list[_Rider]) -> None:
        """One job for all; each rider has its answer, or the error, when this returns."""
        ordered = False

        async def order(approve: Approve) -> EmbedResult:
            async def approved(terms: Terms) -> Money:
                nonlocal ordered
                limit = await approve(terms)
                ordered = True
                return limit

            inputs = cast("Inputs", [each for rider in riders for each in rider.inputs])  # of one kind
            return await self._counter.client.embed(model, inputs, approve=approved)

        try:
            result: EmbedResult = await self._counter.whole(riders[0].key, order)
        except Exception as error:
            if len(riders) > 1 and not ordered and not isinstance(error, NetworkError | Busy):
                await asyncio.gather(*(self._buy(model, [rider]) for rider in riders if not rider.answer.done()))
                return
            for rider in riders:
                if not rider.answer.done():
                    rider.answer.set_exception(error)
            return
        if len(riders) > 1:
            self.shared += len(riders)
        for rider, part in zip(riders, parts(result, [len(rider.inputs) for rider in riders]), strict=True):
            if not rider.answer.done():
                rider.answer.set_result(part)


def parts(result: EmbedResult, sizes: Sequence[int]) -> list[EmbedResult]:
    """A job's result cut into consecutive runs of inputs. Cost is split by tokens; what does not divide evenly falls to the later ones,
    so that the parts add up. A result that is not divided is returned as it is."""
    assert sum(sizes) == len(result.input_tokens), (sizes, len(result.input_tokens))
    if len(sizes) == 1:
        return [result]
    total, cost = sum(result.input_tokens), result.total_cost
    found, first, tokens_before = [], 0, 0
    for size in sizes:
        counts = result.input_tokens[first : first + size]
        tokens = tokens_before + sum(counts)
        part = Money(cost * tokens // total - cost * tokens_before // total)
        found.append(
            replace(
                result,
                vectors=result.vectors[first : first + size],
                input_tokens=counts,
                usage=Usage(tokens - tokens_before, 0),
                cost=part,
                check_cost=NOTHING,
                rejected=(),
            )
        )
        first, tokens_before = first + size, tokens
    return found


def _boarding(line: _Line) -> list[_Rider]:
    """Who leaves next: in order, as many as one job takes. Who has left meanwhile is passed over."""
    riders: list[_Rider] = []
    inputs = 0
    while line.waiting and inputs + len(line.waiting[0].inputs) <= INPUTS_MAX:
        rider = line.waiting.popleft()
        if not rider.answer.done():
            riders.append(rider)
            inputs += len(rider.inputs)
    return riders

"""A text that is read while it is written.

Invariant: what is not read is not acked, so a slow reader holds a window of tokens and no more; whoever leaves, in whatever way, pays for
what was delivered, and `end` says how much that was.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field
from types import AsyncGeneratorType
from typing import cast

from gpumarket.core.errors import JobFailed, ResultRejected
from gpumarket.core.terms import Receipt
from gpumarket.core.units import Address, Hash
from gpumarket.sdk.buying import Bought, Purchase
from gpumarket.sdk.reading import TextReader
from gpumarket.sdk.results import ChatResult, Piece, StreamEnd, Usage


@dataclass(frozen=True, slots=True)
class Begun:
    """A text that is ordered when it is first read, or, under a job id that was used before, has been: `bought` is then its end."""

    purchase: Purchase | None
    reader: TextReader
    bought: Bought | None = None


Begin = Callable[[], AbstractAsyncContextManager[Begun]]
"""Entered when the stream is first read, left when it has ended: the tokenizer comes with the model, and a job id is held meanwhile."""
Build = Callable[[Bought], ChatResult]
EndOf = Callable[[Purchase], StreamEnd]
"""How the purchase's first job stands in the journal."""


@dataclass(slots=True)
class _Reading:
    """What the generator and its stream both know. It knows neither of them, so that a stream that nobody holds is closed at once."""

    begin: Begin
    build: Build
    end_of: EndOf
    purchase: Purchase | None = None
    result: ChatResult | None = None
    end: StreamEnd | None = None
    begun: bool = False
    left: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def leave(self) -> None:
        self.left = True
        if self.purchase is not None:
            self.purchase.leave()


class ChatStream:
    """Pieces of text: `async for piece in stream`. After the end, `stream.result` is the whole, and `stream.end` says what it cost.

    `aclose`, leaving the `async with`, and cancelling the task that reads stop the provider within a second; what was delivered is paid.
    So does leaving the loop, once nobody holds the stream any more; a stream that is held can be read on. When the answer is drawn for a
    check and found wrong, the iteration ends with ResultRejected: the text that came is void, and `result` holds the answer of another
    provider where one could be had.
    """

    def __init__(self, begin: Begin, build: Build, end_of: EndOf) -> None:
        self._reading = _Reading(begin, build, end_of)
        self._pieces = _run(self._reading)
        self._texts = _texts(self._pieces)

    def __aiter__(self) -> AsyncIterator[str]:
        return self._texts

    def pieces(self) -> AsyncIterator[Piece]:
        """Every piece as it came, with its tokens and, where they were asked for, their logprobs. To be iterated instead of the stream."""
        return self._pieces

    async def __aenter__(self) -> ChatStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def result(self) -> ChatResult:
        """The whole answer with receipt, verdict and cost. Raises JobFailed before the stream has ended, and where it was left."""
        if self._reading.result is None:
            raise JobFailed("the stream has not ended: there is no result yet", hint="read it to its end first")
        return self._reading.result

    @property
    def end(self) -> StreamEnd | None:
        """How the job ended and what was billed for it, also where it was left. None before, and for one that never was ordered."""
        return self._reading.end

    @property
    def job(self) -> Hash | None:
        """The job's key, from its order on."""
        if self._reading.end is not None:
            return self._reading.end.job
        run = self._reading.purchase.run if self._reading.purchase is not None else None
        return run.job.job if run is not None else None

    @property
    def provider(self) -> Address | None:
        """Who answers now, or did last; None before a lease."""
        if self._reading.end is not None:
            return self._reading.end.provider
        run = self._reading.purchase.run if self._reading.purchase is not None else None
        return run.progress.lease.provider if run is not None and run.progress.lease is not None else None

    @property
    def usage(self) -> Usage | None:
        """Tokens of the prompt and of the answer, after the end."""
        return self._reading.end.usage if self._reading.end is not None else None

    @property
    def receipt(self) -> Receipt | None:
        """The provider's statement, after the end."""
        return self._reading.end.receipt if self._reading.end is not None else None

    async def aclose(self) -> None:
        """Stop the provider, unless the answer is whole; may be called while another task reads. Returns when the job is over and billed:
        a second at most where the provider says nothing, or, for an answer that is whole, when its check is."""
        if not cast("AsyncGeneratorType[Piece, None]", self._pieces).ag_running:
            await self._pieces.aclose()
        self._reading.leave()
        if self._reading.begun:
            await self._reading.over.wait()


async def _texts(pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[str, None]:
    async with aclosing(pieces):
        async for piece in pieces:
            if piece.text:
                yield piece.text


async def _run(reading: _Reading) -> AsyncGenerator[Piece, None]:
    reading.begun = True
    try:
        async with reading.begin() as begun:
            if begun.purchase is None:
                assert begun.bought is not None
                yield _told(reading, begun.bought)
                return
            reading.purchase = begun.purchase
            if reading.left:
                return  # while the model was looked up: nothing is ordered
            async with aclosing(_follow(begun.purchase, begun.reader)) as pieces:
                async for piece in pieces:
                    yield piece
            _conclude(reading, begun.purchase, begun.reader.stopped)
    finally:
        try:
            if reading.end is None and reading.purchase is not None and reading.purchase.run is not None:
                reading.end = reading.end_of(reading.purchase)
        finally:
            reading.over.set()


async def _follow(purchase: Purchase, reader: TextReader) -> AsyncGenerator[Piece, None]:
    """Pieces until the answer is whole, its check included, or ends at a stop string."""
    seen = 0
    async with aclosing(purchase.items()) as output:
        async for items in output:
            run = purchase.run
            assert run is not None
            piece = reader.push(items, run.logprobs[seen : seen + len(items)])
            seen += len(items)
            if piece.text or piece.tokens:
                yield piece
            if reader.stopped and not run.answered:
                run.leave("stop")
    rest = reader.finish()
    if rest.text:
        yield rest


async def read_to_end(purchase: Purchase, reader: TextReader) -> Bought:
    """As a stream that nobody watches: to the end, or to a stop string."""
    async with aclosing(_follow(purchase, reader)) as pieces:
        async for _ in pieces:
            pass
    return purchase.outcome or purchase.stopped()


def _conclude(reading: _Reading, purchase: Purchase, stopped: bool) -> None:
    """The result of what ended by itself, or at a stop string. Raises ResultRejected."""
    if purchase.outcome is None and (reading.left or not stopped):
        return  # its reader left it
    bought = purchase.outcome or purchase.stopped()
    reading.result = reading.build(bought)
    if purchase.rejected:
        told = purchase.rejected[-1]
        raise ResultRejected(
            f"the text streamed by 0x{told.provider.hex()} was rejected and is not paid: {told.reason}",
            hint="the stream's `result` holds the answer of another provider",
        )
    reading.end = _end_of(reading.result)


def _told(reading: _Reading, bought: Bought) -> Piece:
    """A text that was bought before, whole."""
    result = reading.result = reading.build(bought)
    reading.end = _end_of(result)
    return Piece(result.text, result.tokens, result.logprobs)


def _end_of(result: ChatResult) -> StreamEnd:
    return StreamEnd(
        "completed",
        result.job,
        result.provider,
        result.usage,
        result.usage.output_tokens,
        result.cost,
        result.receipt,
        result.signed_receipt,
        result.finish_reason,
    )

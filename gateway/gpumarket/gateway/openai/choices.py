"""The jobs of one request, side by side: one a choice. One that fails ends them all; what was delivered of the others is paid."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from gpumarket.gateway.counter import TextJob
from gpumarket.sdk.results import ChatResult, Piece, TokenLogprob

TOP_P_MIN = 1e-6
"""The market's smallest; OpenAI's 0 keeps the likeliest token alone, and so does this."""


@dataclass(frozen=True, slots=True)
class Told:
    """A choice at its end."""

    result: ChatResult
    logprobs: tuple[TokenLogprob, ...] | None


async def gathered(jobs: Sequence[TextJob]) -> list[Told]:
    """All choices, each at its end."""
    if len(jobs) == 1:
        return [await _whole(jobs[0])]
    tasks = [asyncio.create_task(_whole(job)) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _end(tasks)


async def merged(jobs: Sequence[TextJob]) -> AsyncGenerator[tuple[int, Piece | None], None]:
    """(choice, piece) as they come; a choice's None is its end. No job runs further ahead of the reader than one piece."""
    if len(jobs) == 1:
        async with aclosing(jobs[0].pieces()) as pieces:
            async for piece in pieces:
                yield 0, piece
        yield 0, None
        return
    ready: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue(maxsize=1)
    tasks = [asyncio.create_task(_feed(ready, index, job)) for index, job in enumerate(jobs)]
    try:
        left = len(jobs)
        while left:
            index, item = await ready.get()
            if isinstance(item, Exception):
                raise item
            left -= item is None
            yield index, item
    finally:
        await _end(tasks)


def seed_of(seed: int | None, choice: int) -> int | None:
    """Each choice draws on its own; the first one as a request for one would. 64 bits, signed."""
    if seed is None or not choice:
        return seed
    own = seed.to_bytes(8, "big", signed=True) + choice.to_bytes(4, "big")
    return int.from_bytes(hashlib.sha256(own).digest()[:8], "big", signed=True)


async def _whole(job: TextJob) -> Told:
    found: list[TokenLogprob] = []
    known = False
    async with aclosing(job.pieces()) as pieces:
        async for piece in pieces:
            if piece.logprobs is not None:
                known = True
                found.extend(piece.logprobs)
    if job.void:
        return Told(job.result, job.result.logprobs)
    return Told(job.result, tuple(found) if known else None)


async def _feed(ready: asyncio.Queue[tuple[int, Piece | Exception | None]], index: int, job: TextJob) -> None:
    try:
        async with aclosing(job.pieces()) as pieces:
            async for piece in pieces:
                await ready.put((index, piece))
        await ready.put((index, None))
    except Exception as error:  # the reader raises it
        await ready.put((index, error))


async def _end(tasks: Sequence[asyncio.Task[object]] | Sequence[asyncio.Task[None]] | Sequence[asyncio.Task[Told]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

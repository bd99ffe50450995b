"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from aiohttp import web

from gpumarket.core.terms import Task
from gpumarket.gateway.answers import Ticket
from gpumarket.gateway.call import Call, market_object
from gpumarket.gateway.counter import Approve, Ordered, TextJob
from gpumarket.gateway.openai.choices import TOP_P_MIN, gathered, merged, seed_of
from gpumarket.gateway.openai.inputs import Input, inputs_of
from gpumarket.gateway.openai.tables import CompletionRequest
from gpumarket.gateway.openai.wording import DONE, REJECTED, VOID, usage_of
from gpumarket.gateway.problems import Problem, invalid
from gpumarket.sdk.options import TextOptions
from gpumarket.sdk.results import TokenLogprob
from gpumarket.sdk.streaming import ChatStream

MAX_TOKENS = 16
"""OpenAI's default here."""


async def create(call: Call) -> web.StreamResponse:
    """Continue prompts: `n` choices of each, in the order of the prompts. Raises Problem."""
    asked = await call.read(CompletionRequest)
    if asked.stream_options is not None and not asked.stream:
        raise invalid("stream_options needs stream to be true", "stream_options")
    call.room.catalog.find(call.key, asked.model, Task.GENERATE)
    prompts: list[Input] = [*inputs_of(asked.prompt, "prompt")]
    count = asked.n or 1
    async with call.buying(count * len(prompts), "n" if count > 1 else "prompt", logprobs=asked.logprobs is not None) as ticket:
        orders = [
            _order(call, asked, prompt, ticket, place * count + choice, choice)
            for place, prompt in enumerate(prompts)
            for choice in range(count)
        ]
        jobs = [call.room.counter.text(call.key, order) for order in orders]
        return await _stream(call, asked, ticket, jobs) if asked.stream else await _whole(call, asked, ticket, jobs)


def _order(call: Call, asked: CompletionRequest, prompt: Input, ticket: Ticket, index: int, choice: int) -> Ordered:
    options: TextOptions = {
        "max_tokens": asked.max_tokens or MAX_TOKENS,
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "top_p": max(TOP_P_MIN, 1.0 if asked.top_p is None else asked.top_p),
        "stop": asked.stop,
        "seed": seed_of(asked.seed, choice),
        "logprobs": asked.logprobs,
        "job_id": ticket.job_id(index),
    }

    def order(approve: Approve) -> ChatStream:
        return call.room.counter.client.complete(asked.model, prompt, stream=True, **(options | {"approve": approve}))

    return order


async def _whole(call: Call, asked: CompletionRequest, ticket: Ticket, jobs: Sequence[TextJob]) -> web.Response:
    told = await gathered(jobs)
    results = [one.result for one in told]
    choices = [_choice(index, one.result.text, one.logprobs, one.result.finish_reason) for index, one in enumerate(told)]
    return call.answer({**_head(asked, ticket), "choices": choices, "usage": usage_of(results)}, results)


async def _stream(call: Call, asked: CompletionRequest, ticket: Ticket, jobs: Sequence[TextJob]) -> web.StreamResponse:
    events = call.events()
    head = _head(asked, ticket)
    wants_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    if wants_usage:
        head["usage"] = None
    lengths = [0] * len(jobs)
    async with aclosing(merged(jobs)) as pieces:
        async for index, piece in pieces:
            if piece is None:
                if jobs[index].void:
                    raise Problem(502, REJECTED, VOID)
                last = _choice(index, "", None, jobs[index].result.finish_reason)
                await events.send({**head, "choices": [last], "gpumarket": market_object(jobs[index].result)})
            elif piece.text or piece.logprobs:
                await events.send({**head, "choices": [_choice(index, piece.text, piece.logprobs, None, lengths[index])]})
                lengths[index] += len(piece.text)
    results = [job.result for job in jobs]
    call.room.tally.bought(results)
    if wants_usage:
        await events.send({**head, "choices": [], "usage": usage_of(results)})
    await events.send_raw(DONE)
    return await events.end()


def _choice(index: int, text: str, logprobs: Sequence[TokenLogprob] | None, finish_reason: str | None, offset: int = 0) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": _logprobs(logprobs, offset), "finish_reason": finish_reason}


def _logprobs(tokens: Sequence[TokenLogprob] | None, offset: int) -> dict[str, Any] | None:
    """The older shape: lists side by side. `text_offset` counts characters from the beginning of the choice's text."""
    if tokens is None:
        return None
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{t.text: t.logprob for t in token.top} for token in tokens],
        "text_offset": offsets,
    }


def _head(asked: CompletionRequest, ticket: Ticket) -> dict[str, Any]:
    return {"id": ticket.name("cmpl-"), "object": "text_completion", "created": ticket.created, "model": asked.model}

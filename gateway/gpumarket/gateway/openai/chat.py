"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from aiohttp import web

from gpumarket.core.terms import Task
from gpumarket.gateway.answers import Ticket
from gpumarket.gateway.call import Call, Events, market_object
from gpumarket.gateway.counter import Approve, Ordered, TextJob
from gpumarket.gateway.openai.choices import TOP_P_MIN, gathered, merged, seed_of
from gpumarket.gateway.openai.tables import ChatRequest, Message, TextPart
from gpumarket.gateway.openai.wording import DONE, REJECTED, VOID, chat_logprobs, usage_of
from gpumarket.gateway.problems import Problem, invalid
from gpumarket.sdk.options import ChatOptions
from gpumarket.sdk.results import Piece
from gpumarket.sdk.streaming import ChatStream

SYSTEM = {"developer": "system"}
"""A developer's message is what was a system's before."""


async def create(call: Call) -> web.StreamResponse:
    """Answer a conversation. Raises Problem."""
    asked = await call.read(ChatRequest)
    _check(asked)
    call.room.catalog.find(call.key, asked.model, Task.GENERATE)
    count = asked.n or 1
    async with call.buying(count, "n", logprobs=bool(asked.logprobs)) as ticket:
        jobs = [call.room.counter.text(call.key, _order(call, asked, ticket, index)) for index in range(count)]
        return await _stream(call, asked, ticket, jobs) if asked.stream else await _whole(call, asked, ticket, jobs)


def _check(asked: ChatRequest) -> None:
    """What no single parameter shows."""
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        raise invalid("give max_completion_tokens or max_tokens, not both", "max_tokens")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    if asked.stream_options is not None and not asked.stream:
        raise invalid("stream_options needs stream to be true", "stream_options")


def text_of(content: str | Sequence[TextPart]) -> str:
    """A message's text."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def spoken(message: Message) -> dict[str, str]:
    """A message as the model's template takes it."""
    role = str(message.__struct_config__.tag)
    return {"role": SYSTEM.get(role, role), "content": text_of(message.content)}


def _order(call: Call, asked: ChatRequest, ticket: Ticket, index: int) -> Ordered:
    limit = asked.max_completion_tokens or asked.max_tokens or call.room.settings.output_tokens_default
    options: ChatOptions = {
        "messages": [spoken(message) for message in asked.messages],
        "max_tokens": limit,
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "top_p": max(TOP_P_MIN, 1.0 if asked.top_p is None else asked.top_p),
        "stop": asked.stop,
        "seed": seed_of(asked.seed, index),
        "logprobs": (asked.top_logprobs or 0) if asked.logprobs else None,
        "job_id": ticket.job_id(index),
    }

    def order(approve: Approve) -> ChatStream:
        return call.room.counter.client.chat(asked.model, stream=True, **(options | {"approve": approve}))

    return order


async def _whole(call: Call, asked: ChatRequest, ticket: Ticket, jobs: Sequence[TextJob]) -> web.Response:
    told = await gathered(jobs)
    results = [one.result for one in told]
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": one.result.text, "refusal": None},
            "logprobs": chat_logprobs(one.logprobs),
            "finish_reason": one.result.finish_reason,
        }
        for index, one in enumerate(told)
    ]
    head = _head(asked, ticket, "chat.completion")
    return call.answer({**head, "choices": choices, "usage": usage_of(results)}, results)


async def _stream(call: Call, asked: ChatRequest, ticket: Ticket, jobs: Sequence[TextJob]) -> web.StreamResponse:
    events = call.events()
    head = _head(asked, ticket, "chat.completion.chunk")
    wants_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    if wants_usage:
        head["usage"] = None
    begun: set[int] = set()
    async with aclosing(merged(jobs)) as pieces:
        async for index, piece in pieces:
            if index not in begun:
                begun.add(index)
                await events.send({**head, "choices": [_delta(index, {"role": "assistant", "content": "", "refusal": None})]})
            if piece is None:
                await _finish(events, head, index, jobs[index])
            elif piece.text or piece.logprobs:
                await events.send({**head, "choices": [_delta(index, {"content": piece.text}, piece)]})
    results = [job.result for job in jobs]
    call.room.tally.bought(results)
    if wants_usage:
        await events.send({**head, "choices": [], "usage": usage_of(results)})
    await events.send_raw(DONE)
    return await events.end()


async def _finish(events: Events, head: dict[str, Any], index: int, job: TextJob) -> None:
    """The last chunk of a choice, with what the market says of it. Raises Problem for one that a check refused."""
    if job.void:
        raise Problem(502, REJECTED, VOID)
    choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": job.result.finish_reason}
    await events.send({**head, "choices": [choice], "gpumarket": market_object(job.result)})


def _delta(index: int, delta: dict[str, Any], piece: Piece | None = None) -> dict[str, Any]:
    logprobs = chat_logprobs(piece.logprobs) if piece is not None else None
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _head(asked: ChatRequest, ticket: Ticket, kind: str) -> dict[str, Any]:
    return {"id": ticket.name("chatcmpl-"), "object": kind, "created": ticket.created, "model": asked.model}

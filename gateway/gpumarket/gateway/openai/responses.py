"""POST /v1/responses: created, whole or as a stream of its event types; nothing is stored."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from gpumarket.core.terms import Task
from gpumarket.gateway.answers import Ticket
from gpumarket.gateway.call import Call, Events, market_object
from gpumarket.gateway.counter import Approve, Ordered, TextJob
from gpumarket.gateway.openai.choices import TOP_P_MIN, gathered
from gpumarket.gateway.openai.tables import InputMessage, ResponseRequest
from gpumarket.gateway.openai.wording import REJECTED, VOID, token_entry
from gpumarket.gateway.problems import Problem, invalid
from gpumarket.sdk.options import ChatOptions
from gpumarket.sdk.results import ChatResult, Piece, TokenLogprob
from gpumarket.sdk.streaming import ChatStream

SYSTEM = {"developer": "system"}


async def create(call: Call) -> web.StreamResponse:
    """Answer an input. Raises Problem."""
    asked = await call.read(ResponseRequest)
    if asked.stream_options is not None and not asked.stream:
        raise invalid("stream_options needs stream to be true", "stream_options")
    call.room.catalog.find(call.key, asked.model, Task.GENERATE)
    async with call.buying(1, "input", logprobs=_wants_logprobs(asked)) as ticket:
        job = call.room.counter.text(call.key, _order(call, asked, ticket))
        words = _Words(asked, ticket)
        if asked.stream:
            return await _stream(call, words, job)
        told = (await gathered([job]))[0]
        return call.answer(words.whole(told.result, told.logprobs or ()), [told.result])


def _conversation(asked: ResponseRequest) -> list[dict[str, str]]:
    talk = [] if asked.instructions is None else [{"role": "system", "content": asked.instructions}]
    if isinstance(asked.input, str):
        return [*talk, {"role": "user", "content": asked.input}]
    return talk + [{"role": SYSTEM.get(m.role, m.role), "content": _text(m)} for m in asked.input]


def _text(message: InputMessage) -> str:
    return message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)


def _wants_logprobs(asked: ResponseRequest) -> bool:
    return bool(asked.include) or asked.top_logprobs is not None


def _order(call: Call, asked: ResponseRequest, ticket: Ticket) -> Ordered:
    options: ChatOptions = {
        "messages": _conversation(asked),
        "max_tokens": asked.max_output_tokens or call.room.settings.output_tokens_default,
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "top_p": max(TOP_P_MIN, 1.0 if asked.top_p is None else asked.top_p),
        "logprobs": (asked.top_logprobs or 0) if _wants_logprobs(asked) else None,
        "job_id": ticket.job_id(0),
    }

    def order(approve: Approve) -> ChatStream:
        return call.room.counter.client.chat(asked.model, stream=True, **(options | {"approve": approve}))

    return order


@dataclass(slots=True)
class _Words:
    """The documents of one response."""

    asked: ResponseRequest
    ticket: Ticket
    sequence: int = field(default=0)

    @property
    def message_id(self) -> str:
        return self.ticket.name("msg_")

    @property
    def place(self) -> dict[str, Any]:
        """Where a piece of text belongs."""
        return {"item_id": self.message_id, "output_index": 0, "content_index": 0}

    def response(self, status: str, output: list[Any], **more: Any) -> dict[str, Any]:
        """The response object in one of its states."""
        asked = self.asked
        return {
            "id": self.ticket.name("resp_"),
            "object": "response",
            "created_at": self.ticket.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": asked.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": None,
            "metadata": {},
            **more,
        }

    def message(self, status: str, content: list[Any]) -> dict[str, Any]:
        return {"id": self.message_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def part(self, text: str, logprobs: tuple[TokenLogprob, ...] | list[TokenLogprob]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": [token_entry(token) for token in logprobs]}

    def whole(self, result: ChatResult, logprobs: tuple[TokenLogprob, ...] | list[TokenLogprob]) -> dict[str, Any]:
        """At its end; one that max_output_tokens cut off is incomplete."""
        cut = result.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        more: dict[str, Any] = {"usage": _usage(result), "gpumarket": market_object(result)}
        if cut:
            more["incomplete_details"] = {"reason": "max_output_tokens"}
        return self.response(status, [self.message(status, [self.part(result.text, logprobs)])], **more)

    async def tell(self, events: Events, kind: str, **more: Any) -> None:
        """One event."""
        await events.send({"type": kind, "sequence_number": self.sequence, **more}, kind)
        self.sequence += 1


async def _stream(call: Call, words: _Words, job: TextJob) -> web.StreamResponse:
    events = call.events("error")
    text: list[str] = []
    logprobs: list[TokenLogprob] = []
    async with aclosing(job.pieces()) as pieces:
        first = await anext(pieces, None)  # what fails before it is told as a status
        await _begin(events, words)
        if first is not None:
            await _delta(events, words, first, text, logprobs)
        async for piece in pieces:
            await _delta(events, words, piece, text, logprobs)
    if job.void:
        raise Problem(502, REJECTED, VOID)
    call.room.tally.bought([job.result])
    await _finish(events, words, job.result, "".join(text), logprobs)
    return await events.end()


async def _begin(events: Events, words: _Words) -> None:
    started = words.response("in_progress", [])
    await words.tell(events, "response.created", response=started)
    await words.tell(events, "response.in_progress", response=started)
    await words.tell(events, "response.output_item.added", output_index=0, item=words.message("in_progress", []))
    await words.tell(events, "response.content_part.added", **words.place, part=words.part("", ()))


async def _delta(events: Events, words: _Words, piece: Piece, text: list[str], logprobs: list[TokenLogprob]) -> None:
    if not piece.text and not piece.logprobs:
        return
    text.append(piece.text)
    logprobs.extend(piece.logprobs or ())
    told = [token_entry(token) for token in piece.logprobs or ()]
    await words.tell(events, "response.output_text.delta", **words.place, delta=piece.text, logprobs=told)


async def _finish(events: Events, words: _Words, result: ChatResult, text: str, logprobs: list[TokenLogprob]) -> None:
    told = [token_entry(token) for token in logprobs]
    end = words.whole(result, logprobs)
    part = words.part(text, logprobs)
    await words.tell(events, "response.output_text.done", **words.place, text=text, logprobs=told)
    await words.tell(events, "response.content_part.done", **words.place, part=part)
    await words.tell(events, "response.output_item.done", output_index=0, item=words.message(end["status"], [part]))
    await words.tell(events, f"response.{end['status']}", response=end)


def _usage(result: ChatResult) -> dict[str, Any]:
    prompt, output = result.usage.prompt_tokens, result.usage.output_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + output,
    }

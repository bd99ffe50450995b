"""One HTTP request of a caller who is known: its key, its body, and the two ways to answer it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import Struct

from gpumarket.core.units import Money, format_money, hex0x
from gpumarket.gateway.answers import Answers, Ticket
from gpumarket.gateway.catalog import Catalog
from gpumarket.gateway.counter import Counter
from gpumarket.gateway.keys import Key
from gpumarket.gateway.openai.reading import Reader, reader_of
from gpumarket.gateway.problems import Problem, invalid
from gpumarket.gateway.settings import GatewaySettings
from gpumarket.gateway.sharing import Sharing
from gpumarket.gateway.tally import Tally
from gpumarket.sdk.results import JobOutcome

T = TypeVar("T", bound=Struct)
JSON = "application/json"
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Room:
    """What every endpoint needs."""

    settings: GatewaySettings
    counter: Counter
    answers: Answers
    catalog: Catalog
    sharing: Sharing
    tally: Tally


@dataclass(slots=True)
class Call:
    """A request. `id` is what the answer names as x-request-id."""

    room: Room
    request: web.Request
    key: Key
    id: str
    started: float = field(default_factory=time.perf_counter)
    raw: bytes = b""
    stream: Events | None = None
    """Once the answer has begun as a stream: an error can no longer be a status."""

    async def read(self, table: type[T]) -> T:
        """The body. Raises Problem: 400, 408, 413 or 415."""
        await self.read_raw((JSON,))
        reader: Reader[T] = reader_of(table)
        return reader.read(self.raw)

    async def read_raw(self, types: Sequence[str]) -> bytes:
        """The body as it came. Raises Problem: 408, 413 or 415."""
        if self.request.headers.get("content-encoding", "identity") != "identity":
            raise Problem(415, "unsupported_media_type", "compressed bodies are not taken", param="Content-Encoding")
        if self.request.content_type not in types:
            raise Problem(415, "unsupported_media_type", f"the body must be {types[0]}", param="Content-Type")
        try:
            async with asyncio.timeout(self.room.settings.body_seconds):
                self.raw = await self.request.read()
        except web.HTTPRequestEntityTooLarge:
            told = f"the body is larger than {self.room.settings.body_bytes_max} bytes"
            raise Problem(413, "request_too_large", told) from None
        except TimeoutError:
            raise Problem(408, "request_timeout", "the body did not come in time") from None
        except web.RequestPayloadError:
            raise invalid("the body is not what its headers say", code="invalid_body") from None
        return self.raw

    @asynccontextmanager
    async def buying(self, jobs: int, param: str, *, logprobs: bool = False) -> AsyncIterator[Ticket]:
        """Places for `jobs` jobs and the ids that they are to have. Raises Problem: 400, 409, 422, 429, 503."""
        if jobs > self.room.settings.choices_max:
            told = f"that makes {jobs} jobs; the gateway takes at most {self.room.settings.choices_max} in one request"
            raise invalid(told, param)
        name = self.request.headers.get("idempotency-key")
        if name is not None and logprobs:
            raise invalid("logprobs are not kept: a request with an Idempotency-Key is made without them", "logprobs")
        with self.room.counter.admitted(jobs):
            async with self.room.answers.ticket(self.key, name, self.request.path, self.raw) as ticket:
                yield ticket

    def answer(self, document: Any, results: Sequence[JobOutcome] = ()) -> web.Response:
        """A whole answer. `results` are the jobs it came from: told in the headers."""
        self.room.tally.bought(results)
        self.room.tally.observe_whole(time.perf_counter() - self.started)
        return web.Response(body=_encode(document), content_type=JSON, headers={**self.headers, **market_headers(results)})

    @property
    def headers(self) -> dict[str, str]:
        return {"x-request-id": self.id}

    def events(self, error_event: str = "") -> Events:
        """A streamed answer; `error_event` names its event of failure, where events have names."""
        return Events(self, error_event)


class Events:
    """Server-sent events. The head goes out with the first of them: until then an error is a status.

    `send` waits while the caller reads slowly; nothing is read ahead, so a stream holds one socket's buffer and one piece.
    """

    def __init__(self, call: Call, error_event: str) -> None:
        self._call, self.error_event = call, error_event
        self._response = web.StreamResponse(
            headers={
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-store",
                "x-accel-buffering": "no",
                **call.headers,
            }
        )

    async def send(self, document: Any, event: str = "") -> None:
        """One event, a JSON document as its data."""
        head = f"event: {event}\n".encode() if event else b""
        await self.send_raw(head + b"data: " + _encode(document) + b"\n\n")

    async def send_raw(self, data: bytes) -> None:
        if self._call.stream is None:
            self._call.room.tally.observe_first(time.perf_counter() - self._call.started)
            await self._response.prepare(self._call.request)
            self._call.stream = self
        await self._response.write(data)

    async def end(self) -> web.StreamResponse:
        await self._response.write_eof()
        self._call.room.tally.observe_whole(time.perf_counter() - self._call.started)
        return self._response

    @property
    def response(self) -> web.StreamResponse:
        return self._response

    async def fail(self, problem: Problem) -> web.StreamResponse:
        """The last event: official clients raise an error for it. Whatever came before is not the whole answer."""
        await self.send(problem.document, self.error_event)
        return await self.end()


def market_object(result: JobOutcome) -> dict[str, Any]:
    """What the market says of one result. Without a receipt: a text that ended at a stop string, whose provider said no more."""
    receipt = result.receipt
    return {
        "job": hex0x(result.job),
        "receipt": None if receipt is None else hex0x(receipt.struct_hash),
        "provider": hex0x(result.provider),
        "cost": format_money(result.total_cost),
        "verdict": result.verdict.state.value,
    }


def market_headers(results: Sequence[JobOutcome]) -> Mapping[str, str]:
    """The same of all results, as headers: lists in the order of the choices, the costs added up."""
    if not results:
        return {}
    each = [market_object(result) for result in results]
    found = {f"x-gpumarket-{name}": ", ".join(one[name] or "none" for one in each) for name in ("job", "receipt", "provider", "verdict")}
    return found | {"x-gpumarket-cost": format_money(Money(sum(result.total_cost for result in results)))}

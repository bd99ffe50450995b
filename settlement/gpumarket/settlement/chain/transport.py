"""HTTP to a chain node that may be slow, overloaded or wrong: bounded, polite, and never mistaken for an answer.

A response is read up to RESPONSE_BYTES_MAX and must be a JSON object, else it is `Nonsense`; after a 429 nothing is sent until the time
that the node asked for is over. Never: a retry of its own (callers know whether a call may be repeated), a body kept beyond its bound.
"""

from __future__ import annotations

import time
from typing import Any, cast

from aiohttp import ClientResponse, ClientSession, ClientTimeout, TCPConnector
from web3 import AsyncHTTPProvider
from web3.exceptions import BadResponseFormat
from web3.types import RPCEndpoint, RPCResponse

from gpumarket.core import hostile_json

RESPONSE_BYTES_MAX = 64 << 20
"""2,000 blocks full of this market's events stay below it."""
PAUSE_SECONDS_MAX = 120.0
"""Longest Retry-After that is obeyed; without one, PAUSE_SECONDS."""
PAUSE_SECONDS = 2.0
KEEPALIVE_SECONDS = 4.0
"""Of a connection that nothing is asked on: shorter than what nodes and their proxies allow (5 s and more), so that it is ours to end."""


class Overloaded(OSError):
    """The node asked for a pause (HTTP 429 or 503 with Retry-After)."""


class Nonsense(BadResponseFormat):
    """The node's answer is no JSON-RPC answer."""


class BoundedProvider(AsyncHTTPProvider):
    """web3's HTTP provider with the three rules above. `timeout` in seconds, for a whole request."""

    def __init__(self, url: str, *, timeout: float, response_bytes_max: int = RESPONSE_BYTES_MAX) -> None:
        super().__init__(url, request_kwargs={"timeout": timeout}, exception_retry_configuration=None)
        self.timeout, self._response_bytes_max = timeout, response_bytes_max
        self._silent_until = 0.0
        self._session: ClientSession | None = None

    async def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """One call. Raises Overloaded, Nonsense, TimeoutError or aiohttp's ClientError."""
        wait = self._silent_until - time.monotonic()
        if wait > 0:
            raise Overloaded(f"it asked for a pause, of which {wait:.0f} s are left")
        request = self.encode_rpc_request(method, params)
        options: dict[str, Any] = {"headers": self.get_request_headers(), "timeout": ClientTimeout(self.timeout)}
        response = await self._opened().post(str(self.endpoint_uri), data=request, **options)
        try:
            self._heed(response)
            response.raise_for_status()
            body = await self._body(response)
        except BaseException:
            response.close()  # with its connection: the rest of the answer is still to come
            raise
        response.release()
        return _decoded(body, response)

    async def disconnect(self) -> None:
        """Close what is open; the next request opens it again."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _opened(self) -> ClientSession:
        """Our own session. web3 keeps its sessions under a lock that it takes in a thread: a request cancelled while it waits there leaves
        the lock taken, and every later request of the process hangs."""
        if self._session is None or self._session.closed:
            self._session = ClientSession(connector=TCPConnector(keepalive_timeout=KEEPALIVE_SECONDS))
        return self._session

    def _heed(self, response: ClientResponse) -> None:
        asked = response.headers.get("Retry-After", "")
        if response.status == 429 or (response.status == 503 and asked):
            seconds = float(asked) if asked.isascii() and asked.isdigit() else PAUSE_SECONDS
            seconds = min(seconds, PAUSE_SECONDS_MAX)
            self._silent_until = time.monotonic() + seconds
            raise Overloaded(f"HTTP {response.status}: it is overloaded and asks for {seconds:.0f} s of silence")

    async def _body(self, response: ClientResponse) -> bytes:
        parts, size = [], 0
        async for part in response.content.iter_any():
            size += len(part)
            if size > self._response_bytes_max:
                raise Nonsense(f"a response of more than {self._response_bytes_max} bytes")
            parts.append(part)
        return b"".join(parts)


def _decoded(body: bytes, response: ClientResponse) -> RPCResponse:
    try:
        found = hostile_json.loads(body)
    except ValueError as error:
        kind = response.headers.get("Content-Type", "no content type")[:60]
        raise Nonsense(f"{len(body)} bytes of {kind} that are not JSON, beginning with {body[:40]!r}") from error
    if not isinstance(found, dict) or ("result" in found) == ("error" in found):
        raise Nonsense(f"JSON that is no JSON-RPC answer, beginning with {body[:40]!r}")
    return cast(RPCResponse, found)

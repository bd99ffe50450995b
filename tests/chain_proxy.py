"""An HTTP JSON-RPC proxy between our code and a chain node that tells scripted lies, after Core Lightning's BitcoinRpcProxy.

    with ChainProxy(anvil.url) as proxy:
        proxy.lie("eth_getLogs", lambda call, answer: [])          # a result instead of the node's
        proxy.lie("eth_blockNumber", raw(429, b"", {"Retry-After": "1"}))
        proxy.honest()

A lie gets the call's parameters and the node's true result and returns another result, a `Raw` HTTP response, or raises `Cut` (the
connection is closed without an answer). `calls` counts requests by method. It lives in threads of its own, on loopback.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit


class Cut(Exception):
    """The connection ends without an answer."""


@dataclass(frozen=True)
class Raw:
    """An HTTP response as it goes out. `promised`: the Content-Length to claim, when it is not the body's. `seconds`: wait first."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    promised: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class RpcError:
    """A JSON-RPC error in place of a result."""

    code: int
    message: str


Lie = Callable[[list[Any], Any], Any]


def always(answer: Any) -> Lie:
    """The same answer to every call."""
    return lambda params, truth: answer


class ChainProxy:
    """A context manager; `url` is what our code is pointed at."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._lies: dict[str, Lie] = {}
        self._lock = threading.Lock()
        self.calls: Counter[str] = Counter()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                proxy._serve(self)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: the tests speak."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def lie(self, method: str, lie: Lie) -> None:
        """From now on, answer `method` with this; "*" is every method without a lie of its own."""
        with self._lock:
            self._lies[method] = lie

    def honest(self, *methods: str) -> None:
        """The truth again, about some methods or all."""
        with self._lock:
            for method in methods or list(self._lies):
                self._lies.pop(method, None)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        request = json.loads(body)
        with self._lock:
            self.calls[request["method"]] += 1
            lie = self._lies.get(request["method"], self._lies.get("*"))
        try:
            raw = self._answer(request, body, lie)
        except Cut:
            handler.close_connection = True
            return
        time.sleep(raw.seconds)
        try:
            handler.send_response(raw.status)
            for name, value in {"Content-Type": "application/json", **raw.headers}.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(raw.body) if raw.promised is None else raw.promised))
            handler.end_headers()
            handler.wfile.write(raw.body)
        except OSError:
            handler.close_connection = True  # who asked has hung up
        if raw.promised is not None:
            handler.close_connection = True

    def _answer(self, request: dict[str, Any], body: bytes, lie: Lie | None) -> Raw:
        answer = self._ask(body)
        if lie is None or ("error" in answer and request["method"] != "eth_sendRawTransaction"):
            return Raw(body=json.dumps(answer).encode())
        told = lie(request.get("params", []), answer.get("result"))
        if isinstance(told, Raw):
            return told
        frame = {"jsonrpc": "2.0", "id": request["id"]}
        if isinstance(told, RpcError):
            return Raw(body=json.dumps({**frame, "error": {"code": told.code, "message": told.message}}).encode())
        return Raw(body=json.dumps({**frame, "result": told}).encode())

    def _ask(self, body: bytes) -> dict[str, Any]:
        connection = http.client.HTTPConnection(*self._upstream, timeout=30)
        try:
            connection.request("POST", "/", body, {"Content-Type": "application/json"})
            found: dict[str, Any] = json.loads(connection.getresponse().read())
        except OSError as error:
            raise Cut from error  # the node is down: so are we
        finally:
            connection.close()
        return found

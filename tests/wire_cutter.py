"""A TLS relay that cuts a connection, or swallows all that follows, at the n-th gRPC message of one direction.

In the spirit of Core Lightning's `dev_disconnect`: what lies between two messages of a protocol is a place where a link can break. It holds
the server's own TLS key, so that it sees HTTP/2 frames and counts messages, not packets. It runs in a thread and loop of its own, so that
what is under test cannot hold it up.
"""

from __future__ import annotations

import asyncio
import enum
import socket
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

FRAME_HEADER = 9
"""HTTP/2 frame header: length (3), type, flags, stream (4), RFC 9113 section 4.1."""
PREFACE = 24
"""What a client's connection begins with, section 3.4."""
MESSAGE_HEADER = 5
"""gRPC: compressed or not (1), length (4), before each message in a stream's DATA frames."""
_DATA, _PADDED = 0, 8


class Mode(enum.Enum):
    CUT = "cut"
    """Both directions end at once, as when a router resets the connection."""
    SWALLOW = "swallow"
    """Nothing more arrives in either direction, and nobody is told."""


@dataclass(slots=True)
class Order:
    """Break the connection that carries the message `at` (counted from 1, over all connections of its kind) towards the server, or from it.

    The message itself does not arrive. `ours`: of connections that this process made, else of those that others did.
    """

    mode: Mode
    towards_server: bool
    at: int
    ours: bool = True
    seen: int = 0
    done: bool = False


@dataclass(slots=True)
class Messages:
    """Counts whole messages in one direction of a connection."""

    count: int = 0
    _open: dict[bytes, bytearray] = field(default_factory=dict)

    def take(self, header: bytes, body: bytes) -> None:
        """One more frame."""
        if header[3] != _DATA:
            return
        data = body[1 : len(body) - body[0]] if header[4] & _PADDED else body
        held = self._open.setdefault(header[5:9], bytearray())
        held += data
        while len(held) >= MESSAGE_HEADER and len(held) >= (size := MESSAGE_HEADER + int.from_bytes(held[1:5], "big")):
            del held[:size]
            self.count += 1


class WireCutter:
    """A relay to `target` (host:port) of the server whose TLS key lies in `identity`, listening on a loopback port of its own."""

    def __init__(self, target: str, identity: Path) -> None:
        host, _, port = target.rpartition(":")
        self._target, self._identity = (host, int(port)), identity
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.order: Order | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="wire cutter", daemon=True)

    def __enter__(self) -> WireCutter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._listener.setblocking(False)
        self._loop.create_task(self._accept(), name="accept")
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _accept(self) -> None:
        relays = set[asyncio.Task[None]]()
        while True:
            connection, (_, port) = await self._loop.sock_accept(self._listener)
            relay = self._loop.create_task(self._relay(connection, port))
            relays.add(relay)
            relay.add_done_callback(relays.discard)

    async def _relay(self, connection: socket.socket, port: int) -> None:
        link, writers = _Link(self, _is_ours(port)), list[asyncio.StreamWriter]()
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._target, ssl=_towards_server())
            writers.append(up_writer)
            reader, writer = await self._shake_hands(connection)
            writers.append(writer)
            both = (link.pump(reader, up_writer, True), link.pump(up_reader, writer, False))
            tasks = [asyncio.create_task(pump) for pump in both]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        except (OSError, ssl.SSLError):
            return  # the server is not there, or whoever came went away: so is this connection
        finally:
            for each in writers:
                each.transport.abort()  # a close would first have the other side agree, by TLS
            if len(writers) < 2:
                connection.close()  # no transport has it

    async def _shake_hands(self, connection: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, connection, ssl=_as_server(self._identity))
        return reader, asyncio.StreamWriter(transport, protocol, reader, self._loop)


@dataclass(slots=True)
class _Link:
    """One connection through the relay."""

    cutter: WireCutter
    ours: bool
    broken: bool = False

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, towards_server: bool) -> None:
        messages = Messages()
        try:
            if towards_server:
                writer.write(await reader.readexactly(PREFACE))
            while True:
                header = await reader.readexactly(FRAME_HEADER)
                body = await reader.readexactly(int.from_bytes(header[:3], "big"))
                before = messages.count
                messages.take(header, body)
                if self._breaks(towards_server, messages.count - before):
                    self.broken = True
                    if self.cutter.order is not None and self.cutter.order.mode is Mode.CUT:
                        return
                if not self.broken:
                    writer.write(header + body)
                    await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            return

    def _breaks(self, towards_server: bool, more: int) -> bool:
        order = self.cutter.order
        if order is None or order.done or order.towards_server is not towards_server or order.ours is not self.ours:
            return False
        order.seen += more
        order.done = order.seen >= order.at
        return order.done


def _is_ours(port: int) -> bool:
    """Whether this process has a connection from this local port."""
    return any(connection.laddr and connection.laddr.port == port for connection in psutil.Process().net_connections("tcp"))


def _as_server(identity: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity / "tls.crt", identity / "tls.key")
    context.set_alpn_protocols(["h2"])
    return context


def _towards_server() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # a relay: whoever asks checks the key
    context.set_alpn_protocols(["h2"])
    return context

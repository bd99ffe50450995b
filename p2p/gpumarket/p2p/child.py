"""One life of the p2p process, seen from the daemon: start it, call it, hear its news, know when it is gone.

asyncio, and no libp2p. Invariant: when the process is gone, every pending call has got P2PUnavailable and no file descriptor, task or
process is left. The process gets one inherited socket, a scrubbed environment and no argument that says anything.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Callable

from google.protobuf.message import DecodeError

from gpumarket.core.errors import P2PUnavailable, ProtocolError, by_code
from gpumarket.p2p.wire import FrameDecoder, encode_frame
from gpumarket.v1 import p2p_pb2 as pb

_log = logging.getLogger(__name__)
_process_log = logging.getLogger("gpumarket.p2p.process")

CALL_SECONDS_MAX = 30.0
_READ_BYTES = 64 * 1024
_LAST_LINES = 20
_EXIT_SECONDS_MAX = 3.0
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "TMPDIR", "TZ", "VIRTUAL_ENV")


class Child:
    """A running p2p process. Made by `start`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_seen: Callable[[pb.SeenOffer], None],
    ) -> None:
        self._process, self._reader, self._writer, self._on_seen = process, reader, writer, on_seen
        self._calls: dict[int, asyncio.Queue[pb.HostEvent]] = {}
        self._ids = itertools.count(1)
        self._gone = False
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._tasks = [asyncio.create_task(self._read_events()), asyncio.create_task(self._read_log())]

    @classmethod
    async def start(cls, on_seen: Callable[[pb.SeenOffer], None]) -> Child:
        """Spawns the process. It does nothing before it is told `configure`. Raises P2PUnavailable."""
        ours, theirs = socket.socketpair()  # OSError only when this process is out of descriptors
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "gpumarket.p2p.host", "--fd", str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=scrubbed_environment(),
            )
        except OSError as error:
            ours.close()
            raise P2PUnavailable(f"the p2p process does not start: {error}", hint="gpumarket doctor") from error
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, reader, writer, on_seen)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def call(self, command: pb.HostCommand, seconds_max: float = CALL_SECONDS_MAX) -> pb.HostEvent:
        """The answer to a command that has one. Raises what the process refuses with, P2PUnavailable when it is gone or silent."""
        return (await self.call_many(command, seconds_max))[0]

    async def call_many(self, command: pb.HostCommand, seconds_max: float = CALL_SECONDS_MAX) -> list[pb.HostEvent]:
        """Answers up to and including the one without `more`."""
        command.call_id = next(self._ids)
        answers: asyncio.Queue[pb.HostEvent] = asyncio.Queue()
        if self._gone:
            raise self._unavailable()
        self._calls[command.call_id] = answers
        events: list[pb.HostEvent] = []
        try:
            async with asyncio.timeout(seconds_max):
                self._writer.write(encode_frame(command))
                await self._writer.drain()
                while not events or events[-1].offers.more:
                    events.append(_raise_failure(await answers.get()))
        except TimeoutError:
            what = command.WhichOneof("command")
            raise P2PUnavailable(f"the p2p process did not answer {what} within {seconds_max:g} s", hint="try again") from None
        except ConnectionError:
            raise self._unavailable() from None
        finally:
            self._calls.pop(command.call_id, None)
        return events

    async def wait(self) -> int:
        """Exit status, once the process is gone and its pending calls have been refused."""
        status = await self._process.wait()
        await asyncio.gather(*self._tasks)
        return status

    async def stop(self) -> None:
        """Closes the socket, which ends the process; kills it when it lingers."""
        self._writer.close()
        try:
            async with asyncio.timeout(_EXIT_SECONDS_MAX):
                await self.wait()
        except TimeoutError:
            _log.warning("the p2p process %d did not end by itself: killed", self.pid)
            self.kill()
            await self.wait()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self._process.returncode is None:
            self._process.kill()

    def last_words(self) -> str:
        """The end of its log: why it died."""
        return "; ".join(self._last_lines)

    async def _read_events(self) -> None:
        decoder = FrameDecoder()
        try:
            while chunk := await self._reader.read(_READ_BYTES):
                for frame in decoder.feed(chunk):
                    self._deliver(pb.HostEvent.FromString(frame))
        except ConnectionError as error:
            _log.info("the wire to the p2p process broke: %s", error)
        except (DecodeError, ProtocolError):
            _log.exception("the p2p process sent what is no event: killed")
            self.kill()
        finally:
            self._gone = True
            self._writer.close()
            gone = pb.HostEvent(failed=pb.HostFailed(code=P2PUnavailable.code, message=str(self._unavailable()), hint="try again"))
            for answers in self._calls.values():
                answers.put_nowait(gone)

    def _deliver(self, event: pb.HostEvent) -> None:
        if event.WhichOneof("event") == "seen":
            self._on_seen(event.seen)
        elif (answers := self._calls.get(event.call_id)) is not None:
            answers.put_nowait(event)

    async def _read_log(self) -> None:
        assert self._process.stderr is not None
        while True:
            try:
                line = await self._process.stderr.readline()
            except ValueError:  # longer than the stream's limit; asyncio has dropped it
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._last_lines.append(text)
            _process_log.info("%s", text)

    def _unavailable(self) -> P2PUnavailable:
        return P2PUnavailable("the p2p process is not running; it is being restarted", hint="try again in a second")


def scrubbed_environment() -> dict[str, str]:
    """What the process may know: no keys, no passwords, no GPUMARKET_* settings."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return kept | {"MALLOC_ARENA_MAX": "2", "PYTHONUNBUFFERED": "1"}


def _raise_failure(event: pb.HostEvent) -> pb.HostEvent:
    if event.WhichOneof("event") != "failed":
        return event
    failure = event.failed
    raise by_code().get(failure.code, P2PUnavailable)(failure.message, hint=failure.hint)

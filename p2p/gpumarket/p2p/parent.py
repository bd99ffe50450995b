"""The p2p process's end of the socket pair: commands in, answers and news out.

Invariant: a daemon that reads slowly never stops the gossip. Answers wait for room; news (`seen`) are dropped and counted instead,
because the daemon can ask for a snapshot.
"""

from __future__ import annotations

from collections import deque

import trio

from gpumarket.p2p.wire import FrameDecoder, encode_frame
from gpumarket.v1 import p2p_pb2 as pb

_QUEUE_EVENTS_MAX = 1024
_READ_BYTES = 64 * 1024
_FLUSH_SECONDS_MAX = 2.0


class ParentWire:
    """Frames over the inherited socket. `write_forever` must run for anything to leave."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._decoder = FrameDecoder()
        self._frames: deque[bytes] = deque()
        self._outbox, self._pending = trio.open_memory_channel[pb.HostEvent](_QUEUE_EVENTS_MAX)
        self.dropped = 0
        """News that found no room."""

    async def next_command(self) -> pb.HostCommand | None:
        """The next command; None when the parent has closed. Raises ProtocolError or DecodeError for anything that is none."""
        while not self._frames:
            chunk = await self._stream.receive_some(_READ_BYTES)
            if not chunk:
                return None
            self._frames.extend(self._decoder.feed(bytes(chunk)))
        return pb.HostCommand.FromString(self._frames.popleft())

    async def answer(self, event: pb.HostEvent) -> None:
        """Queues an answer; waits when the queue is full."""
        await self._outbox.send(event)

    def tell(self, event: pb.HostEvent) -> None:
        """Queues news, or drops and counts them."""
        try:
            self._outbox.send_nowait(event)
        except trio.WouldBlock:
            self.dropped += 1

    async def write_forever(self) -> None:
        async for event in self._pending:
            await self._stream.send_all(encode_frame(event))

    async def last_word(self, event: pb.HostEvent) -> None:
        """Sends past the queue, when `write_forever` has ended and the process is about to. Gives up after two seconds."""
        with trio.move_on_after(_FLUSH_SECONDS_MAX):
            await self._stream.send_all(encode_frame(event))

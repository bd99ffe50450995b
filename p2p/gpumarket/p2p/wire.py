"""Framing between a daemon and its p2p process: uvarint length, then one protobuf message.

Sans I/O: bytes in, frames out, so that the asyncio side and the trio side share it. Invariant: no frame above `FRAME_BYTES_MAX` is
ever buffered, whoever sends it. It must never parse a message: an offer passes here as opaque bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import Message

from gpumarket.core.errors import ProtocolError

OFFER_BYTES_MAX = 64 * 1024
"""Largest serialized SignedOffer that is published, accepted or remembered, bytes."""

PAGE_BYTES_MAX = 1_000_000
"""Offers in one snapshot answer, bytes. libp2p's message limit is 1 MiB (measured: 1,000,000 B delivered, 1,048,576 B silently lost)."""

FRAME_BYTES_MAX = 1 << 20
"""Largest frame on either wire, bytes."""

_LENGTH_BYTES_MAX = 5


def encode_frame(message: Message) -> bytes:
    """One message as its uvarint length and its bytes. Raises ProtocolError when it is above `FRAME_BYTES_MAX`."""
    payload = message.SerializeToString()
    if len(payload) > FRAME_BYTES_MAX:
        raise ProtocolError(f"a p2p frame of {len(payload)} bytes is above the limit of {FRAME_BYTES_MAX}")
    return _encode_uvarint(len(payload)) + payload


class FrameDecoder:
    """Cuts a byte stream into frames; one per direction of a connection."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Frames that `data` completes. Raises ProtocolError on a length above `FRAME_BYTES_MAX`: the stream is then unusable."""
        self._buffer += data
        while True:
            header = _decode_uvarint(self._buffer)
            if header is None:
                return
            length, start = header
            if length > FRAME_BYTES_MAX:
                raise ProtocolError(f"the other side announces a p2p frame of {length} bytes; the limit is {FRAME_BYTES_MAX}")
            if len(self._buffer) < start + length:
                return
            frame = bytes(self._buffer[start : start + length])
            del self._buffer[: start + length]
            yield frame


def _encode_uvarint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _decode_uvarint(buffer: bytearray) -> tuple[int, int] | None:
    """(value, bytes used), or None while incomplete."""
    value = 0
    for index in range(min(len(buffer), _LENGTH_BYTES_MAX)):
        value |= (buffer[index] & 0x7F) << (7 * index)
        if buffer[index] < 0x80:
            return value, index + 1
    if len(buffer) >= _LENGTH_BYTES_MAX:
        raise ProtocolError("the other side sends a length prefix that is not a uvarint of at most 5 bytes")
    return None

"""SQLite's write-ahead log, read beside SQLite: its pages, and whether commits are missing (sqlite.org/fileformat2.html#walformat).

SQLite takes the log as far as its checksums hold and silently forgets the rest: right after a power failure, where the rest was never
acknowledged, wrong where a bit flipped in the middle. Two things tell them apart: the shared memory of a killed process still says how many
frames were committed, and at most one commit is ever unsynced (synchronous=FULL). Never writes.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_LITTLE, _BIG = 0x377F0682, 0x377F0683
_HEADER, _FRAME, _SHARED = 32, 24, 96


@dataclass(frozen=True, slots=True)
class Log:
    """What a log holds: numbers of the pages in its committed frames, and what is wrong with it (empty when nothing is)."""

    pages: frozenset[int]
    broken: str


@dataclass(frozen=True, slots=True)
class Due:
    """What a checkpoint of the whole log will make of the file."""

    sums: Mapping[int, int]
    """Page → CRC-32 of its newest committed content."""
    count: int
    """Pages of the file afterwards; 0 when nothing is committed in the log."""


def read_log(file: Path) -> Log | None:
    """The log at `file` (`-wal`) as a recovery would take it; None when there is none or it is empty."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    if not data:
        return None
    order = _order(data)
    if order is None:
        return Log(frozenset(), "its header is damaged")
    size, salts = int.from_bytes(data[8:12], "big"), data[16:24]
    step, pages, committed, valid = _FRAME + size, list[int](), 0, 0
    sums = _checksum(order, data[:24], (0, 0))
    for at in range(_HEADER, len(data) - step + 1, step):
        sums = _checksum(order, data[at : at + 8] + data[at + _FRAME : at + step], sums)
        if data[at + 8 : at + 16] != salts or struct.pack(">II", *sums) != data[at + 16 : at + 24]:
            break
        valid += 1
        pages.append(int.from_bytes(data[at : at + 4], "big"))
        if data[at + 4 : at + 8] != bytes(4):
            committed = valid
    rest = range(_HEADER + valid * step, len(data) - step + 1, step)
    later = sum(data[at + 8 : at + 16] == salts and data[at + 4 : at + 8] != bytes(4) for at in rest)
    return Log(frozenset(pages[:committed]), _missing(committed, later, _shared_frames(file, salts)))


def logged_pages(file: Path) -> set[int]:
    """Numbers of the pages in a log that is in use, by its frames' headers; more than are committed may be among them."""
    data = file.read_bytes()
    salts, step = data[16:24], _FRAME + int.from_bytes(data[8:12], "big")
    starts = range(_HEADER, len(data) - step + 1, step)
    return {int.from_bytes(data[at : at + 4], "big") for at in starts if data[at + 8 : at + 16] == salts}


def due_pages(file: Path, frames: int) -> Due:
    """The first `frames` frames of a log in use: those that are committed (`frames_in_use`)."""
    sums, count = dict[int, int](), 0
    with file.open("rb") as log:
        size = int.from_bytes(log.read(_HEADER)[8:12], "big")
        for _ in range(frames):
            frame, page = log.read(_FRAME), log.read(size)
            if len(page) != size:
                raise OSError(f"{file} ends within its {frames} committed frames")
            sums[int.from_bytes(frame[:4], "big")] = zlib.crc32(page)
            count = int.from_bytes(frame[4:8], "big") or count
    return Due(sums, count)


def frames_in_use(file: Path, shared: int) -> int:
    """How many frames of a log in use are committed, by its shared memory, open as `shared`; 0 when that cannot be told."""
    with file.open("rb") as log:
        salts = log.read(24)[16:24]
    return _committed(os.pread(shared, _SHARED, 0), salts)


def _missing(committed: int, later: int, shared: int) -> str:
    if committed < shared:
        return f"{shared} frames were committed, {committed} of them are readable"
    if later > 1:
        return f"after frame {committed} it cannot be read, and {later} commits follow"
    return ""


def _shared_frames(file: Path, salts: bytes) -> int:
    """As `frames_in_use`, of a process that is gone. Never while SQLite has the file open here: see `seal`."""
    try:
        header = file.with_name(file.name.removesuffix("-wal") + "-shm").read_bytes()[:_SHARED]
    except FileNotFoundError:
        return 0
    return _committed(header, salts)


def _committed(header: bytes, salts: bytes) -> int:
    """`mxFrame` of the shared memory's header: written after the commit was synced. 0 when it is torn or of another log."""
    if len(header) < _SHARED or header[:48] != header[48:] or header[12] != 1 or header[32:40] != salts:
        return 0
    return int(struct.unpack_from("=I", header, 16)[0])


def _order(data: bytes) -> str | None:
    """Byte order of the log's checksums, None when its header is not valid."""
    order = {_LITTLE: "<", _BIG: ">"}.get(int.from_bytes(data[:4], "big"))
    if order is None or len(data) < _HEADER or struct.pack(">II", *_checksum(order, data[:24], (0, 0))) != data[24:32]:
        return None
    return order


def _checksum(order: str, data: bytes, sums: tuple[int, int]) -> tuple[int, int]:
    """SQLite's running checksum over pairs of 32-bit words."""
    first, second = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for left, right in zip(words[::2], words[1::2], strict=True):
        first = (first + left + second) & 0xFFFFFFFF
        second = (second + right + first) & 0xFFFFFFFF
    return first, second

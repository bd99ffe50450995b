"""What the pure core asks of the world: a clock and randomness. Shells pass the real ones, tests their own."""

from __future__ import annotations

import secrets
import time
from typing import Protocol


class Clock(Protocol):
    """`now` is unix seconds (deadlines in messages); `monotonic` is for durations."""

    def now(self) -> int: ...

    def monotonic(self) -> float: ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> int:
        return int(time.time())

    def monotonic(self) -> float:
        return time.monotonic()


class Random(Protocol):
    """Unpredictable bytes."""

    def token(self, size: int) -> bytes: ...


class SystemRandom:
    """The operating system's randomness."""

    def token(self, size: int) -> bytes:
        return secrets.token_bytes(size)

"""How many rows of the book one caller's questions may walk (I8). Pure: the clock's reading comes in.

A match that finds its place among a few drawn candidates costs the same in any book and is free. One that walks the sellers of a model, to
find the one that fits, to count why none does or to explain it, costs a third of a microsecond a row, on the loop that everybody's orders
need; and a quote or an `Explain` takes no signature. So rows walked are charged to the caller's address, and who has walked too many waits.
Not promised: whoever has many addresses has as many shares.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from urllib.parse import unquote

from gpumarket.core.errors import Busy
from gpumarket.core.ports import Clock
from gpumarket.scheduler.book import Book

ROWS_PER_SECOND = 250_000
"""A tenth of one core's time, as measured: a book of 100,000 sellers walked by count and scan takes 37 ms."""
ROWS_AT_ONCE = 2_500_000
CALLERS_MAX = 4_096
"""Callers remembered; the one that walked longest ago is forgotten first."""
PREFIX_BITS = 64
"""Of an IPv6 address: what one customer is given."""


class Allowance:
    """Rows of `book` walked for each caller lately. Read `meter` and ask `require` before a question, `charge` after it."""

    def __init__(self, book: Book, clock: Clock, rows_per_second: float = ROWS_PER_SECOND, rows_at_once: int = ROWS_AT_ONCE) -> None:
        self._book, self._clock = book, clock
        self._per_second, self._at_once = rows_per_second, rows_at_once
        self._walked: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._walked)

    @property
    def meter(self) -> int:
        """Rows walked for everybody, ever."""
        return self._book.walked

    def require(self, caller: str) -> None:
        """Raises Busy, with the time to come back, for a caller that has walked too many rows."""
        if caller in self._walked:
            wait = (self._left(caller) - self._at_once) / self._per_second
            if wait > 0:
                raise Busy(
                    "questions from this address have walked the whole book too often",
                    retry_after_seconds=round(wait + 0.05, 1),
                    hint="loosen the constraint that removes most (gpumarket market explain), or ask less often",
                )

    def charge(self, caller: str, before: int) -> None:
        """The caller's question is answered; `before` is the meter as it stood when it came."""
        rows = self._book.walked - before
        if rows:
            self._walked[caller] = (self._left(caller) + rows, self._clock.monotonic())
            self._walked.move_to_end(caller)
            if len(self._walked) > CALLERS_MAX:
                self._walked.popitem(last=False)

    def _left(self, caller: str) -> float:
        now = self._clock.monotonic()
        rows, since = self._walked.get(caller, (0.0, now))
        return max(0.0, rows - (now - since) * self._per_second)


def caller_of(peer: str) -> str:
    """The address in gRPC's name of a peer, without its port; of IPv6 the network. "ipv4:10.0.0.1:5000" -> "10.0.0.1"."""
    host = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return peer
    return str(ipaddress.ip_network((address, PREFIX_BITS), strict=False)) if address.version == 6 else str(address)

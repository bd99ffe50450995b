"""Rates: how much one peer may ask of us, and how fast we may publish.

Pure: the caller hands the monotonic clock in. Bounded: a peer that invents identities cannot grow the table.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """A token bucket's shape."""

    per_second: float
    """Tokens that come back each second."""
    burst: int
    """Tokens of a full bucket."""

    def __post_init__(self) -> None:
        if self.per_second <= 0 or self.burst < 1:
            raise ValueError(f"a rate needs per_second > 0 and burst >= 1, got {self}")


class PeerLimiter:
    """One token bucket per peer. The least recently seen peer is forgotten when there are more than `peers_max`."""

    def __init__(self, rate: Rate, peers_max: int = 4096) -> None:
        self._rate = rate
        self._peers_max = peers_max
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def allow(self, peer: bytes, now: float) -> bool:
        """Takes one token of `peer` at monotonic second `now`; False when there is none."""
        tokens, since = self._buckets.pop(peer, (float(self._rate.burst), now))
        tokens = min(float(self._rate.burst), tokens + max(0.0, now - since) * self._rate.per_second)
        allowed = tokens >= 1.0
        self._buckets[peer] = (tokens - 1.0 if allowed else tokens, now)
        if len(self._buckets) > self._peers_max:
            self._buckets.popitem(last=False)
        return allowed

    def __len__(self) -> int:
        return len(self._buckets)


@dataclass(frozen=True)
class Backoff:
    """Exponential backoff with full jitter on its upper half, so that a fleet does not return in step."""

    first_seconds: float
    most_seconds: float
    factor: float = 2.0

    def delay_seconds(self, failures: int, rng: random.Random) -> float:
        """Wait after the `failures`-th failure in a row (from 1): between half and the whole of the exponential step."""
        if failures < 1:
            return 0.0
        step = min(self.most_seconds, self.first_seconds * self.factor ** min(failures - 1, 32))
        return step * (0.5 + 0.5 * rng.random())

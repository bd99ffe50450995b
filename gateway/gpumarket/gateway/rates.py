"""How often a key may ask: a bucket of a minute's requests that fills evenly. Pure: the clock is handed in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class Rates:
    """One bucket a key. Invariant: no key asks more than twice its rate within any minute, nor more than its rate over time."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}

    def wait_seconds(self, key: str, per_minute: int | None, now: float) -> float:
        """0 and one request counted, or how long until the next one is allowed. `now` is monotonic seconds."""
        if per_minute is None:
            return 0.0
        bucket = self._buckets.setdefault(key, _Bucket(per_minute, now))
        bucket.tokens = min(per_minute, bucket.tokens + (now - bucket.at) * per_minute / 60)
        bucket.at = now
        if bucket.tokens < 1:
            return (1 - bucket.tokens) * 60 / per_minute
        bucket.tokens -= 1
        return 0.0

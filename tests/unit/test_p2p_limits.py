"""Token buckets and backoff, on a clock that the test turns."""

from __future__ import annotations

import random

import pytest

from gpumarket.p2p.limits import Backoff, PeerLimiter, Rate


def test_limiter_burst_then_refused_then_refilled() -> None:
    limiter = PeerLimiter(Rate(per_second=2, burst=3))
    assert [limiter.allow(b"a", 10.0) for _ in range(4)] == [True, True, True, False]
    assert [limiter.allow(b"a", 11.0) for _ in range(3)] == [True, True, False]


def test_limiter_one_peer_does_not_use_up_anothers_tokens() -> None:
    limiter = PeerLimiter(Rate(per_second=1, burst=1))
    assert limiter.allow(b"a", 0.0) and not limiter.allow(b"a", 0.0)
    assert limiter.allow(b"b", 0.0)


def test_limiter_bucket_never_holds_more_than_its_burst() -> None:
    limiter = PeerLimiter(Rate(per_second=100, burst=2))
    limiter.allow(b"a", 0.0)
    assert [limiter.allow(b"a", 1000.0) for _ in range(3)] == [True, True, False]


def test_limiter_invented_peers_do_not_grow_the_table() -> None:
    limiter = PeerLimiter(Rate(per_second=1, burst=1), peers_max=10)
    for number in range(1000):
        limiter.allow(number.to_bytes(4, "big"), 0.0)
    assert len(limiter) == 10


def test_limiter_clock_going_back_gives_no_tokens() -> None:
    limiter = PeerLimiter(Rate(per_second=1, burst=1))
    assert limiter.allow(b"a", 100.0)
    assert not limiter.allow(b"a", 50.0)


@pytest.mark.parametrize(("per_second", "burst"), [(0, 1), (-1, 1), (1, 0)])
def test_rate_that_allows_nothing_is_refused(per_second: float, burst: int) -> None:
    with pytest.raises(ValueError, match="rate"):
        Rate(per_second, burst)


def test_backoff_grows_to_its_most_and_jitters_in_the_upper_half() -> None:
    backoff, rng = Backoff(first_seconds=1.0, most_seconds=8.0), random.Random(1)
    for failures, step in [(1, 1.0), (2, 2.0), (4, 8.0), (50, 8.0), (10_000, 8.0)]:
        delays = [backoff.delay_seconds(failures, rng) for _ in range(50)]
        assert all(step / 2 <= delay <= step for delay in delays)
        assert len(set(delays)) > 1
    assert backoff.delay_seconds(0, rng) == 0.0

"""A provider's distance: timed here, not answerable early, the least of the last few."""

from __future__ import annotations

from gpumarket.scheduler.round_trip import ASK_SECONDS, REMEMBERED, UNKNOWN_SECONDS, RoundTrip


def test_round_trip_is_far_until_measured() -> None:
    trip = RoundTrip()
    assert trip.seconds == UNKNOWN_SECONDS
    assert trip.due(0.0)
    trip.ask(7, 0.0)
    assert not trip.due(ASK_SECONDS - 0.1)
    assert trip.due(ASK_SECONDS)


def test_round_trip_takes_the_least_of_the_last_few() -> None:
    trip = RoundTrip()
    for k, seconds in enumerate([0.03] + [0.5] * (REMEMBERED - 1)):
        trip.ask(k + 1, 100.0 * k)
        trip.hear(k + 1, 100.0 * k + seconds)
    assert abs(trip.seconds - 0.03) < 1e-9
    trip.ask(99, 5_000.0)
    trip.hear(99, 5_000.5)
    assert abs(trip.seconds - 0.5) < 1e-9, "it moved away, or its way became longer"


def test_round_trip_counts_an_answer_once_and_only_to_what_was_asked() -> None:
    trip = RoundTrip()
    trip.hear(0, 1.0)
    trip.hear(5, 1.0)
    trip.ask(6, 10.0)
    trip.hear(5, 10.0)
    trip.hear(0, 10.0)
    assert trip.seconds == UNKNOWN_SECONDS
    trip.hear(6, 10.1)
    trip.hear(6, 10.0)
    assert abs(trip.seconds - 0.1) < 1e-9

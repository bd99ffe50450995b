"""How a scheduler's refusal reaches the buyer: as the error that tells what to do about it."""

from __future__ import annotations

import pytest

from gpumarket.core.errors import Busy, NoProvider, ProtocolError
from gpumarket.sdk.hub import accepted
from gpumarket.v1 import market_pb2 as pb


def reply(considered: int, **removed: int) -> pb.MatchReply:
    counts = [pb.FilterCount(filter=name, removed=count, example="why") for name, count in removed.items()]
    return pb.MatchReply(no_match=pb.NoMatch(considered=considered, removed=counts))


def test_refusal_without_fitting_provider_names_filters_and_counts() -> None:
    with pytest.raises(NoProvider) as caught:
        accepted(reply(3, region=2, max_amount=1))
    assert caught.value.removed == {"region": 2, "max_amount": 1}
    assert caught.value.considered == 3
    assert "region removed 2 (why)" in caught.value.message


def test_refusal_by_capacity_is_busy_and_retryable() -> None:
    with pytest.raises(Busy, match="capacity removed 1") as caught:
        accepted(reply(3, region=2, capacity=1))
    assert caught.value.retryable
    assert caught.value.exit_code == 7


def test_refusal_of_an_empty_book_points_at_the_listing() -> None:
    with pytest.raises(NoProvider, match="no provider is known") as caught:
        accepted(reply(0))
    assert caught.value.hint == "gpumarket market ls"


def test_refusal_by_the_scheduler_comes_back_as_itself() -> None:
    with pytest.raises(ProtocolError, match="not that"):
        accepted(pb.MatchReply(problem=pb.Problem(code="protocol", message="not that")))

"""Which offers are in the book: the chain backs them, newest wins, expiry removes, and a watcher resumes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from scheduler_world import DOMAIN, MODEL, PRICE, PROFILE, key

from gpumarket.core.codec import signed_offer
from gpumarket.core.errors import BadSignature, ProtocolError
from gpumarket.core.units import Hash, money_bytes
from gpumarket.scheduler.book import Book
from gpumarket.scheduler.listings import Listings
from gpumarket.scheduler.score import Weights
from gpumarket.settlement.chain.view import PROVIDER, SCHEDULER, ChainView, NodeOnChain
from gpumarket.v1 import terms_pb2 as terms

NOW, TLS = 1_800_000_000, Hash(b"t" * 32)
P = key("provider")


def offer(sequence: int = 1, **changes: Any) -> terms.SignedOffer:
    sale = terms.ModelOffer(model=MODEL, task=terms.TASK_EMBED, prompt_price_per_mtok=money_bytes(PRICE), profile=PROFILE)
    body = terms.OfferBody(
        provider=P.address, tls_key_hash=TLS, gpus=[terms.GpuClaim(gpu_class="CPU")], models=[sale], capacity=1, expires_at=NOW + 100
    )
    body.sequence = sequence
    for name, value in changes.items():
        if name in ("models", "gpus"):
            del getattr(body, name)[:]
            getattr(body, name).extend(value)
        else:
            setattr(body, name, value)
    return signed_offer(P, DOMAIN, body)


def listings(*, registered: bool = True, **changes: Any) -> Listings:
    view = ChainView()
    node = NodeOnChain(P.address, key("owner").address, PROVIDER, 10, tls_key_hash=TLS)
    if registered:
        view.nodes[P.address] = replace(node, **changes)
    return Listings(Book(Weights()), view, DOMAIN, NOW * 1_000)


def test_offer_of_a_registered_provider_is_listed_with_its_owner() -> None:
    known = listings()
    known.take(offer(), NOW)
    assert known.why_unlisted(P.address) == ""
    assert known._book.entries[P.address].advert.owner == key("owner").address


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"registered": False}, "not registered"), ({"roles": SCHEDULER}, "not registered"), ({"tls_key_hash": MODEL}, "TLS key hash")],
)
def test_offer_that_the_chain_does_not_back_waits(changes: dict[str, Any], why: str) -> None:
    known = listings(**changes)
    known.take(offer(), NOW)
    assert why in known.why_unlisted(P.address)
    assert not known._book.entries
    known._view.nodes[P.address] = NodeOnChain(P.address, P.address, PROVIDER, tls_key_hash=TLS)
    known.node_changed(P.address)
    assert known.why_unlisted(P.address) == ""


def test_offer_of_a_provider_that_deregisters_is_removed() -> None:
    known = listings()
    known.take(offer(), NOW)
    known._view.nodes[P.address] = NodeOnChain(P.address, P.address)
    known.node_changed(P.address)
    assert not known._book.entries
    assert known.since(0)[:2] == ([], [])
    assert known.since(NOW * 1_000)[1] == [P.address]


def test_older_sequence_changes_nothing() -> None:
    known = listings()
    newest = known.take(offer(5), NOW)
    assert known.take(offer(4, capacity=9), NOW) is newest
    assert known._book.entries[P.address].advert.capacity == 1


def test_newer_sequence_replaces() -> None:
    known = listings()
    known.take(offer(1), NOW)
    known.take(offer(2, capacity=9), NOW)
    assert known._book.entries[P.address].advert.capacity == 9


def test_expired_offer_is_refused_and_an_expiring_one_leaves() -> None:
    known = listings()
    with pytest.raises(ProtocolError, match="expired"):
        known.take(offer(), NOW + 100)
    known.take(offer(), NOW)
    known.expire(NOW + 100)
    assert not known._book.entries


def test_offer_changed_after_signing_is_refused() -> None:
    changed = offer()
    changed.body = offer(9).body
    with pytest.raises(BadSignature):
        listings().take(changed, NOW)


def test_bytes_that_are_no_offer_are_refused() -> None:
    for raw in (b"", b"\xff" * 40, b"x" * 100_000):
        with pytest.raises(ProtocolError):
            listings().take_raw(raw, NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"models": []},
        {"capacity": 0},
        {"models": [terms.ModelOffer(model=MODEL, task=terms.TASK_EMBED, profile=b"short")]},
        {"models": [terms.ModelOffer(model=MODEL, task=terms.TASK_CHECK, profile=PROFILE)]},
        {"models": [terms.ModelOffer(model=MODEL, task=terms.TASK_EMBED, profile=PROFILE, prompt_price_per_mtok=b"\0\1")]},
        {"models": [terms.ModelOffer(model=MODEL, task=terms.TASK_EMBED, profile=PROFILE)] * 2},
        {"gpus": [terms.GpuClaim(gpu_class="CPU")] * 65},
        {"gpus": [terms.GpuClaim(gpu_class="C" * 129)]},
        {"region": "r" * 129},
    ],
)
def test_offer_with_numbers_that_are_none_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        listings().take(offer(**changes), NOW)


def test_watcher_gets_only_what_changed_after_its_revision() -> None:
    known = listings()
    known.take(offer(1), NOW)
    fresh, gone, revision = known.since(0)
    assert ([listing.provider for listing in fresh], gone) == ([P.address], [])
    assert known.since(revision) == ([], [], revision)
    known.touch(P.address)
    assert [listing.provider for listing in known.since(revision)[0]] == [P.address]


def test_watcher_with_a_revision_of_an_earlier_life_gets_everything() -> None:
    known = listings()
    known.take(offer(1), NOW)
    for revision in (NOW * 1_000 - 1, known.revision + 1):
        assert len(known.since(revision)[0]) == 1

"""The door for offers: only verified ones pass, and nothing makes it raise."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from p2p_net import DOMAIN, make_offer, wallet

from gpumarket.core.ports import SystemClock
from gpumarket.p2p.book import OfferBook, OfferKey, Verdict
from gpumarket.p2p.gate import OfferGate, Validate, offer_validator
from gpumarket.p2p.wire import OFFER_BYTES_MAX
from gpumarket.v1 import terms_pb2

VALIDATE = offer_validator(DOMAIN)


class Fixture:
    def __init__(self, validate: Validate = VALIDATE) -> None:
        self.counters: Counter[str] = Counter()
        self.told: list[tuple[OfferKey, bytes, str]] = []
        book = OfferBook(b"epoch-01")
        self.gate = OfferGate(validate, book, SystemClock(), self.counters, lambda *news: self.told.append(news))

    def take(self, payload: bytes) -> Verdict | None:
        return self.gate.take(payload, "gossip", passing_on=True)


def test_validator_signed_offer_gives_its_key() -> None:
    expires = int(time.time()) + 60
    assert VALIDATE(make_offer(wallet(1), 7, expires_at=expires)) == OfferKey(wallet(1).address, 7, expires)


def test_validator_offer_of_another_chain_is_refused() -> None:
    assert VALIDATE(make_offer(wallet(1), 7, chain_id=1)) is None


def test_validator_offer_signed_by_another_wallet_is_refused() -> None:
    mine = terms_pb2.SignedOffer.FromString(make_offer(wallet(1), 7))
    other = terms_pb2.SignedOffer.FromString(make_offer(wallet(2), 7))
    forged = terms_pb2.SignedOffer(body=mine.body, signature=other.signature)
    assert VALIDATE(forged.SerializeToString()) is None


def test_validator_changed_body_is_refused() -> None:
    signed = terms_pb2.SignedOffer.FromString(make_offer(wallet(1), 7))
    signed.body = signed.body.replace(b"127.0.0.1", b"127.0.0.2")
    assert VALIDATE(signed.SerializeToString()) is None


def test_validator_ballast_in_unknown_fields_is_refused() -> None:
    assert VALIDATE(make_offer(wallet(1), 7) + b"\x7a\x04ball") is None


@given(st.binary(max_size=400))
def test_validator_any_bytes_are_refused_without_raising(payload: bytes) -> None:
    assert VALIDATE(payload) is None


def test_gate_fresh_offer_is_told_once() -> None:
    fixture, offer = Fixture(), make_offer(wallet(1), 7)
    assert fixture.take(offer) is Verdict.FRESH
    assert fixture.take(offer) is Verdict.ECHO
    assert [(payload, source) for _, payload, source in fixture.told] == [(offer, "gossip")]
    assert fixture.counters == {"gossip_fresh": 1, "gossip_echo": 1}


def test_gate_stale_expired_and_invalid_offers_are_counted_and_not_told() -> None:
    fixture = Fixture()
    fixture.take(make_offer(wallet(1), 7))
    assert fixture.take(make_offer(wallet(1), 6)) is Verdict.STALE
    assert fixture.take(make_offer(wallet(2), 1, expires_at=int(time.time()) - 1)) is Verdict.EXPIRED
    assert fixture.take(b"junk") is None
    assert len(fixture.told) == 1
    assert fixture.counters == {"gossip_fresh": 1, "gossip_stale": 1, "gossip_expired": 1, "gossip_invalid": 1}


def test_gate_oversize_offer_never_reaches_the_validator() -> None:
    def explode(payload: bytes) -> OfferKey | None:
        raise AssertionError("validated")

    fixture = Fixture(explode)
    assert fixture.take(b"x" * (OFFER_BYTES_MAX + 1)) is None
    assert fixture.counters["gossip_oversize"] == 1
    assert fixture.counters["validator_failed"] == 0


@pytest.mark.parametrize("error", [ValueError("bad"), KeyError("x"), RecursionError(), MemoryError()])
def test_gate_validator_that_raises_is_contained_and_counted(error: Exception) -> None:
    def explode(payload: bytes) -> OfferKey | None:
        raise error

    fixture = Fixture(explode)
    assert fixture.take(b"anything") is None
    assert fixture.counters["validator_failed"] == 1

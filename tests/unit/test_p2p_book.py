"""The offer book: newest per provider, bounded, expiring, with revisions for snapshots."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpumarket.p2p.book import OFFER_LIFETIME_SECONDS_MAX, REPEAT_SECONDS, OfferBook, OfferKey, Verdict

NOW = 1_000_000.0
EPOCH = b"epoch-01"


def key(provider: int, sequence: int, expires_in: int = 600) -> OfferKey:
    return OfferKey(provider.to_bytes(20, "big"), sequence, int(NOW) + expires_in)


def admit(book: OfferBook, who: OfferKey, payload: bytes, now: float = NOW) -> Verdict:
    return book.admit(who, payload, now, passing_on=True)


def everything(book: OfferBook, now: float = NOW) -> list[bytes]:
    return book.since(b"", 0, 1 << 30, now)[0]


def test_book_newer_sequence_replaces_older() -> None:
    book = OfferBook(EPOCH)
    assert admit(book, key(1, 1), b"one") is Verdict.FRESH
    assert admit(book, key(1, 2), b"two") is Verdict.FRESH
    assert everything(book) == [b"two"]


def test_book_stale_sequence_is_dropped() -> None:
    book = OfferBook(EPOCH)
    admit(book, key(1, 5), b"five")
    assert admit(book, key(1, 4), b"four") is Verdict.STALE
    assert everything(book) == [b"five"]


def test_book_same_sequence_other_content_is_a_conflict_and_the_first_stands() -> None:
    book = OfferBook(EPOCH)
    admit(book, key(1, 5), b"five")
    assert admit(book, key(1, 5), b"FIVE") is Verdict.CONFLICT
    assert everything(book) == [b"five"]


def test_book_same_offer_again_is_an_echo_until_the_repeat_time() -> None:
    book = OfferBook(EPOCH)
    admit(book, key(1, 5), b"five")
    assert admit(book, key(1, 5), b"five", NOW + REPEAT_SECONDS / 2) is Verdict.ECHO
    assert admit(book, key(1, 5), b"five", NOW + REPEAT_SECONDS) is Verdict.REPEAT
    assert admit(book, key(1, 5), b"five", NOW + REPEAT_SECONDS + 1) is Verdict.ECHO


def test_book_offer_from_snapshot_is_still_passed_on_when_gossip_brings_it() -> None:
    book = OfferBook(EPOCH)
    assert book.admit(key(1, 5), b"five", NOW, passing_on=False) is Verdict.FRESH
    assert admit(book, key(1, 5), b"five", NOW + 1) is Verdict.REPEAT


def test_book_expired_offer_is_refused() -> None:
    assert admit(OfferBook(EPOCH), key(1, 1, expires_in=0), b"late") is Verdict.EXPIRED


def test_book_offer_with_too_long_a_life_is_refused() -> None:
    assert admit(OfferBook(EPOCH), key(1, 1, OFFER_LIFETIME_SECONDS_MAX + 1), b"for ever") is Verdict.TOO_LONG


def test_book_held_offer_disappears_at_its_expiry() -> None:
    book = OfferBook(EPOCH)
    admit(book, key(1, 1, expires_in=10), b"short")
    admit(book, key(2, 1, expires_in=20), b"longer")
    assert everything(book, NOW + 10) == [b"longer"]
    assert (len(book), book.bytes) == (1, len(b"longer"))


def test_book_full_evicts_what_expires_first() -> None:
    book = OfferBook(EPOCH, offers_max=2)
    admit(book, key(1, 1, 300), b"a")
    admit(book, key(2, 1, 100), b"b")
    admit(book, key(3, 1, 200), b"c")
    assert everything(book) == [b"a", b"c"]
    assert book.evicted == 1


def test_book_bytes_limit_evicts_too() -> None:
    book = OfferBook(EPOCH, bytes_max=10)
    admit(book, key(1, 1, 300), b"x" * 6)
    admit(book, key(2, 1, 400), b"y" * 6)
    assert everything(book) == [b"y" * 6]


def test_since_pages_reach_everything_once_and_in_order() -> None:
    book = OfferBook(EPOCH)
    offers = [bytes([number]) * 10 for number in range(1, 8)]
    for number, payload in enumerate(offers):
        admit(book, key(number, 1), payload)
    found: list[bytes] = []
    revision, more = 0, True
    while more:
        page, revision, more = book.since(EPOCH, revision, 25, NOW)
        assert len(page) <= 2
        found += page
    assert found == offers


def test_since_gives_one_offer_even_when_it_is_above_the_page() -> None:
    book = OfferBook(EPOCH)
    admit(book, key(1, 1), b"x" * 100)
    assert book.since(EPOCH, 0, 10, NOW) == ([b"x" * 100], 1, False)


def test_since_known_revision_gives_only_what_changed() -> None:
    book = OfferBook(EPOCH)
    admit(book, key(1, 1), b"a")
    admit(book, key(2, 1), b"b")
    _, revision, _ = book.since(EPOCH, 0, 100, NOW)
    admit(book, key(1, 2), b"A")
    assert book.since(EPOCH, revision, 100, NOW) == ([b"A"], 3, False)
    assert book.since(EPOCH, 3, 100, NOW) == ([], 3, False)


def test_since_other_epoch_starts_from_the_beginning() -> None:
    book = OfferBook(EPOCH)
    admit(book, key(1, 1), b"a")
    assert book.since(b"another!", 1, 100, NOW)[0] == [b"a"]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(1, 50), st.integers(0, 3)), max_size=60))
def test_book_any_history_keeps_its_invariants(history: list[tuple[int, int, int, int]]) -> None:
    book, now = OfferBook(EPOCH, offers_max=3, bytes_max=40), NOW
    for provider, sequence, life, pause in history:
        now += pause
        who = OfferKey(provider.to_bytes(20, "big"), sequence, int(now) + life)
        payload = f"{provider}:{sequence}:{int(now) + life}".encode()
        verdict = book.admit(who, payload, now, passing_on=True)
        held = everything(book, now)
        assert len(held) == len(book) <= 3
        assert book.bytes == sum(map(len, held)) <= 40
        assert all(int(one.split(b":")[2]) > now for one in held)
        of_provider = [int(one.split(b":")[1]) for one in held if one.startswith(f"{provider}:".encode())]
        if verdict is Verdict.STALE:
            assert of_provider and of_provider[0] > sequence

"""What is known of the offers on the network: the newest of each provider, bounded, with a revision for those who ask what changed.

Pure: wall clock and epoch come in as arguments. Invariants: per provider the sequence only rises; never more than `offers_max`
offers nor `bytes_max` bytes; no offer is handed out after its expiry. Soft state: it is rebuilt from peers in seconds.
"""

from __future__ import annotations

import enum
import hashlib
import heapq
import math
from collections import OrderedDict
from dataclasses import dataclass

OFFER_LIFETIME_SECONDS_MAX = 24 * 3600
"""An offer that expires later than this from now is refused: it would outlive every honest one when the book is full."""

REPEAT_SECONDS = 15.0
"""The same offer is passed on at most this often, so that replaying somebody's advert cannot be amplified by the mesh."""


@dataclass(frozen=True)
class OfferKey:
    """What the book needs of a verified offer."""

    provider: bytes
    """Address, 20 bytes, recovered from the signature."""
    sequence: int
    """Newer replaces older."""
    expires_at: int
    """Unix seconds."""


class Verdict(enum.Enum):
    """What became of an offer. Only FRESH and REPEAT are passed on."""

    FRESH = "fresh"
    REPEAT = "repeat"
    STALE = "stale"
    CONFLICT = "conflict"
    ECHO = "echo"
    EXPIRED = "expired"
    TOO_LONG = "too_long"


@dataclass
class _Entry:
    key: OfferKey
    payload: bytes
    digest: bytes
    revision: int
    passed_at: float


class OfferBook:
    """Newest offer per provider. `admit` is the only way in."""

    def __init__(self, epoch: bytes, *, offers_max: int = 10_000, bytes_max: int = 64 << 20) -> None:
        self.epoch = epoch
        """Names this book: revisions of another epoch mean nothing here."""
        self.revision = 0
        """Rises by one with each fresh offer."""
        self.bytes = 0
        """Bytes of the offers held."""
        self.evicted = 0
        """Offers that had to go because the book was full."""
        self._offers_max = offers_max
        self._bytes_max = bytes_max
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # by provider, in order of revision
        self._expiries: list[tuple[int, int, bytes]] = []  # heap of (expires_at, revision, provider); outdated rows are skipped

    def __len__(self) -> int:
        return len(self._entries)

    def admit(self, key: OfferKey, payload: bytes, now: float, *, passing_on: bool) -> Verdict:
        """Takes a verified offer in at unix second `now` and says what to do with it.

        `passing_on` says that the caller forwards FRESH and REPEAT offers; one that came by snapshot was not forwarded, so its first
        gossip still is.
        """
        self._expire(now)
        if key.expires_at <= now:
            return Verdict.EXPIRED
        if key.expires_at > now + OFFER_LIFETIME_SECONDS_MAX:
            return Verdict.TOO_LONG
        digest = hashlib.sha256(payload).digest()
        known = self._entries.get(key.provider)
        if known is not None and key.sequence < known.key.sequence:
            return Verdict.STALE
        if known is not None and key.sequence == known.key.sequence:
            return self._again(known, digest, now, passing_on)
        self._remove(key.provider)
        self._insert(key, payload, digest, now if passing_on else -math.inf)
        self._shrink()
        return Verdict.FRESH

    def since(self, epoch: bytes, revision: int, bytes_max: int, now: float) -> tuple[list[bytes], int, bool]:
        """(offers newer than `revision`, revision reached, more to come), oldest first, at most `bytes_max` bytes of offers.

        A revision of another epoch counts as 0. At least one offer is given when there is one, so that asking again always advances.
        """
        self._expire(now)
        after = revision if epoch == self.epoch else 0
        page: list[bytes] = []
        size, reached = 0, after
        for entry in self._newer(after):
            if page and size + len(entry.payload) > bytes_max:
                return page, reached, True
            page.append(entry.payload)
            size += len(entry.payload)
            reached = entry.revision
        return page, self.revision, False

    def _newer(self, revision: int) -> list[_Entry]:
        """Walks back from the newest, so that a peer that is up to date costs nothing."""
        found: list[_Entry] = []
        for entry in reversed(self._entries.values()):
            if entry.revision <= revision:
                break
            found.append(entry)
        found.reverse()
        return found

    @staticmethod
    def _again(known: _Entry, digest: bytes, now: float, passing_on: bool) -> Verdict:
        if digest != known.digest:
            return Verdict.CONFLICT  # two offers under one sequence: the first one stands
        if now - known.passed_at < REPEAT_SECONDS:
            return Verdict.ECHO
        if passing_on:
            known.passed_at = now
        return Verdict.REPEAT

    def _insert(self, key: OfferKey, payload: bytes, digest: bytes, passed_at: float) -> None:
        self.revision += 1
        self._entries[key.provider] = _Entry(key, payload, digest, self.revision, passed_at)
        self.bytes += len(payload)
        heapq.heappush(self._expiries, (key.expires_at, self.revision, key.provider))
        if len(self._expiries) > 2 * len(self._entries) + 64:
            self._expiries = [(entry.key.expires_at, entry.revision, who) for who, entry in self._entries.items()]
            heapq.heapify(self._expiries)

    def _remove(self, provider: bytes) -> None:
        entry = self._entries.pop(provider, None)
        if entry is not None:
            self.bytes -= len(entry.payload)

    def _expire(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            self._drop_first()

    def _shrink(self) -> None:
        """Evicts what expires first. A new offer can be the one that goes."""
        while len(self._entries) > self._offers_max or self.bytes > self._bytes_max:
            self.evicted += self._drop_first()

    def _drop_first(self) -> int:
        """Pops the heap's first row; 1 when it named a living entry."""
        _, revision, provider = heapq.heappop(self._expiries)
        entry = self._entries.get(provider)
        if entry is None or entry.revision != revision:
            return 0
        self._remove(provider)
        return 1

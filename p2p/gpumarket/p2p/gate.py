"""The one door for offers: size, signature, sequence and expiry, for gossip, snapshots and the daemon's own alike.

Invariant: `take` never raises, whatever the bytes: it runs inside py-libp2p's validators, where an exception ends the process.
It must never hand on an offer that it did not verify.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from gpumarket.core import codec
from gpumarket.core.errors import BadSignature, ProtocolError
from gpumarket.core.ports import Clock
from gpumarket.core.signing import Domain
from gpumarket.p2p.book import OfferBook, OfferKey, Verdict
from gpumarket.p2p.wire import OFFER_BYTES_MAX
from gpumarket.v1 import terms_pb2

_log = logging.getLogger(__name__)

Validate = Callable[[bytes], OfferKey | None]
"""Key of a serialized SignedOffer whose signature recovers to its provider; None for anything else."""


def offer_validator(domain: Domain) -> Validate:
    """Checks offers signed in `domain` (EIP-712, chain id and StakeRegistry)."""

    def validate(payload: bytes) -> OfferKey | None:
        try:
            signed = codec.parse(terms_pb2.SignedOffer, payload)
            body = codec.open_offer(domain, signed)
        except (BadSignature, ProtocolError):
            return None
        canonical = terms_pb2.SignedOffer(body=signed.body, signature=signed.signature)
        if canonical.SerializeToString(deterministic=True) != payload:
            return None  # unknown fields: the same offer in other bytes would pass as another one, and carry ballast
        return OfferKey(bytes(body.provider), body.sequence, body.expires_at)

    return validate


class OfferGate:
    """Verifies, then admits to the book; tells `on_fresh` (key, payload, source) of each offer that is newer than what was known."""

    def __init__(
        self,
        validate: Validate,
        book: OfferBook,
        clock: Clock,
        counters: Counter[str],
        on_fresh: Callable[[OfferKey, bytes, str], None],
    ) -> None:
        self._validate, self._book, self._clock, self._counters, self._on_fresh = validate, book, clock, counters, on_fresh

    def take(self, payload: bytes, source: str, *, passing_on: bool) -> Verdict | None:
        """What became of `payload`; None when it is no valid offer. Counted as `<source>_<verdict>`.

        `passing_on` says that the caller forwards FRESH and REPEAT offers.
        """
        verdict = self._judge(payload, source, passing_on)
        self._counters[f"{source}_{verdict.value if verdict else 'invalid'}"] += 1
        return verdict

    def _judge(self, payload: bytes, source: str, passing_on: bool) -> Verdict | None:
        if len(payload) > OFFER_BYTES_MAX:
            self._counters[f"{source}_oversize"] += 1
            return None
        try:
            key = self._validate(payload)
        except Exception:  # a peer chose these bytes; what escapes here would end the process
            _log.exception("the offer validator failed on %d bytes from %s", len(payload), source)
            self._counters["validator_failed"] += 1
            return None
        if key is None:
            return None
        verdict = self._book.admit(key, payload, self._clock.now(), passing_on=passing_on)
        if verdict is Verdict.FRESH:
            self._on_fresh(key, payload, source)
        return verdict

"""The offers known, from wherever they came: heartbeats, gossip, snapshot. Which of them the chain backs decides what is in the book.

An offer is listed while its provider is registered, with the offer's TLS key hash, and has not expired. An offer of nothing withdraws the
one before it. Offers of providers that the chain does not know (yet) wait, bounded in number, and so do withdrawals: an older offer that
arrives late must not list the provider again. Every change of the list has a revision, so that a watcher resumes where it was.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from gpumarket.core.codec import OFFER_BYTES_MAX, open_offer, parse
from gpumarket.core.errors import ProtocolError
from gpumarket.core.signing import Domain
from gpumarket.core.terms import Task
from gpumarket.core.units import Address, Hash, Money, money_from_bytes
from gpumarket.scheduler.book import Advert, Book, ModelOnSale
from gpumarket.scheduler.records import offer_digest
from gpumarket.settlement.chain.view import PROVIDER, ChainView, NodeOnChain
from gpumarket.settlement.demands import SANDBOX_TIERS, foremost_gpu
from gpumarket.v1 import terms_pb2 as pb

LISTED_MAX = 200_000
WAITING_MAX = 2_000
REMOVED_MAX = 10_000
MODELS_MAX = 256
GPUS_MAX = 64
LABEL_MAX = 128
"""Longest region, class, sandbox, UUID or name, in characters."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A verified offer. `raw` is the serialized SignedOffer, `digest` its sha256."""

    provider: Address
    body: pb.OfferBody
    message: pb.SignedOffer
    raw: bytes
    digest: Hash


class Listings:
    """Offers by provider, in step with the chain's view and the book."""

    def __init__(self, book: Book, view: ChainView, domain: Domain, revision: int) -> None:
        """`revision` to count from: higher than any of an earlier life, e.g. unix seconds x 1000."""
        self._book, self._view, self._domain = book, view, domain
        self.revision = self.forgotten = revision
        self.listed: dict[Address, tuple[Listing, int]] = {}
        self.removed: OrderedDict[Address, int] = OrderedDict()
        self._waiting: OrderedDict[Address, Listing] = OrderedDict()
        self.changed = asyncio.Event()

    def take(self, message: pb.SignedOffer, now: int) -> Listing:
        """Verify an offer and list it, or let it wait for the chain. An older one than known changes nothing and answers the known one.

        Raises ProtocolError or BadSignature.
        """
        body = open_offer(self._domain, message)
        provider = Address(body.provider)
        known = self.get(provider)
        if known is not None and known.body.sequence >= body.sequence:
            return known
        if body.expires_at <= now:
            raise ProtocolError(f"an offer that expired {now - body.expires_at} s ago", hint="set the clock (NTP), sign a new offer")
        if not _withdrawn(body):
            to_advert(body, provider)  # refuses bad numbers before anything is kept; the owner is the chain's to say
        raw = message.SerializeToString(deterministic=True)
        self._place(Listing(provider, body, message, raw, offer_digest(raw)))
        found = self.get(provider)
        assert found is not None
        return found

    def take_raw(self, raw: bytes, now: int) -> Listing:
        """As `take`, from the p2p link."""
        if len(raw) > OFFER_BYTES_MAX + 1_024:
            raise ProtocolError(f"an offer of {len(raw)} bytes")
        return self.take(parse(pb.SignedOffer, raw), now)

    def get(self, provider: Address) -> Listing | None:
        """The newest offer of a provider, listed or waiting."""
        at = self.listed.get(provider)
        return at[0] if at else self._waiting.get(provider)

    def why_unlisted(self, provider: Address) -> str:
        """Why the provider's offer is not in the book; empty when it is."""
        if provider in self.listed:
            return ""
        listing = self._waiting.get(provider)
        return _unbacked(listing, self._view.nodes.get(provider)) if listing else "no offer is known"

    def node_changed(self, provider: Address) -> None:
        """The chain's entry of a provider changed."""
        listing = self.get(provider)
        if listing is not None:
            self._place(listing)

    def touch(self, provider: Address) -> None:
        """Tell the watchers about a provider again (its reputation moved)."""
        at = self.listed.get(provider)
        if at is not None:
            self.listed[provider] = (at[0], self._next())

    def expire(self, now: int) -> None:
        """Drop what has expired."""
        for provider in [p for p, (listing, _) in self.listed.items() if listing.body.expires_at <= now]:
            self._unlist(provider)
        for provider in [p for p, listing in self._waiting.items() if listing.body.expires_at <= now]:
            del self._waiting[provider]

    def since(self, revision: int) -> tuple[list[Listing], list[Address], int]:
        """(offers, removed providers, revision now) after `revision`; everything when that is not known any more."""
        if revision < self.forgotten or revision > self.revision:
            return [listing for listing, _ in self.listed.values()], [], self.revision
        if revision == self.revision:
            return [], [], revision
        fresh = sorted((at for at in self.listed.values() if at[1] > revision), key=lambda at: at[1])
        gone = [provider for provider, r in self.removed.items() if r > revision]
        return [listing for listing, _ in fresh], gone, self.revision

    def _place(self, listing: Listing) -> None:
        provider = listing.provider
        node = self._view.nodes.get(provider)
        if _unbacked(listing, node):
            if provider in self.listed:
                self._unlist(provider)
            self._waiting[provider] = listing
            self._waiting.move_to_end(provider)
            if len(self._waiting) > WAITING_MAX:
                self._waiting.popitem(last=False)
            return
        assert node is not None
        self._waiting.pop(provider, None)
        self.removed.pop(provider, None)
        before = self.listed.get(provider)
        if before is None and len(self.listed) >= LISTED_MAX:
            raise ProtocolError(f"the book is full ({LISTED_MAX} providers)")
        same = before is not None and before[0].digest == listing.digest
        self.listed[provider] = (listing, before[1] if before is not None and same else self._next())
        self._book.put(to_advert(listing.body, node.owner))

    def _unlist(self, provider: Address) -> None:
        del self.listed[provider]
        self._book.drop(provider)
        self.removed[provider] = self._next()
        if len(self.removed) > REMOVED_MAX:
            _, self.forgotten = self.removed.popitem(last=False)

    def _next(self) -> int:
        self.revision += 1
        self.changed.set()
        self.changed = asyncio.Event()
        return self.revision


def to_advert(body: pb.OfferBody, owner: Address) -> Advert:
    """The advert that an offer makes. Raises ProtocolError for numbers that are none."""
    gpu = foremost_gpu(body)
    if not 1 <= len(body.models) <= MODELS_MAX or gpu is None or len(body.gpus) > GPUS_MAX or not 1 <= body.capacity <= 65_536:
        raise ProtocolError(f"an offer of {len(body.models)} models on {len(body.gpus)} GPUs with capacity {body.capacity}")
    labels = [body.region, body.sandbox, *(m.name for m in body.models), *(t for g in body.gpus for t in (g.gpu_class, g.uuid))]
    if max(map(len, labels)) > LABEL_MAX:
        raise ProtocolError(f"an offer with a name of more than {LABEL_MAX} characters")
    if len({m.model for m in body.models}) != len(body.models):
        raise ProtocolError("an offer that lists a model twice")
    return Advert(
        provider=Address(body.provider),
        owner=owner,
        gpu_class=gpu.gpu_class,
        vram_bytes=gpu.vram_bytes,
        region=body.region,
        sandbox=SANDBOX_TIERS.get(body.sandbox, 0),
        checks=body.checks,
        capacity=body.capacity,
        expires_at=body.expires_at,
        models=tuple(_sale(m) for m in body.models),
    )


def _sale(model: pb.ModelOffer) -> ModelOnSale:
    if len(model.model) != 32 or len(model.profile) != 32 or int(model.task) not in (int(Task.GENERATE), int(Task.EMBED), int(Task.INFER)):
        raise ProtocolError("an offer with a model that is none: digest, profile or task")
    try:
        prices = money_from_bytes(model.prompt_price_per_mtok), money_from_bytes(model.output_price_per_mtok)
    except ValueError as error:
        raise ProtocolError(f"an offer with a price that is none: {error}") from error
    return ModelOnSale(
        model=Hash(model.model),
        name=model.name,
        task=model.task,
        profile=Hash(model.profile),
        prompt_price=Money(prices[0]),
        output_price=Money(prices[1]),
        max_input_tokens=model.max_input_tokens,
        tokens_per_second=model.measured_tokens_per_ks / 1_000,
        warm=model.warm,
    )


def _withdrawn(body: pb.OfferBody) -> bool:
    """A provider that leaves signs an offer of nothing."""
    return not body.models and not body.gpus and not body.capacity


def _unbacked(listing: Listing, node: NodeOnChain | None) -> str:
    if _withdrawn(listing.body):
        return "the provider withdrew its offer"
    if node is None or not node.roles & PROVIDER:
        return "the provider is not registered on chain"
    if node.tls_key_hash != listing.body.tls_key_hash:
        return "the offer's TLS key hash is not the registered one"
    return ""

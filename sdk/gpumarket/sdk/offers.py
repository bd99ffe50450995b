"""The scheduler's book as this client reads it: each offer's own signature verified, owner and stake from the registry, not from the
scheduler."""

from __future__ import annotations

from collections.abc import Iterator

from gpumarket.core.codec import open_offer
from gpumarket.core.errors import BadSignature, ProtocolError
from gpumarket.core.units import Address, Hash, Money, money_from_bytes
from gpumarket.sdk.chain_port import PROVIDER
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.hub import Hub
from gpumarket.sdk.logs import log
from gpumarket.sdk.results import OfferView
from gpumarket.settlement.verification import Candidate
from gpumarket.v1 import market_pb2 as mpb
from gpumarket.v1 import terms_pb2 as pb


async def views(desk: Desk, hub: Hub, model: Hash | None) -> list[OfferView]:
    """What one scheduler lists: one entry for each model of each provider (of one model, or of all). Offers that do not verify or have
    expired are left out."""
    found: list[OfferView] = []
    for event in await hub.offers(model):
        body = _opened(desk, event)
        if body is not None:
            found.extend(_views(desk, event, body, model))
    return found


async def checkers(desk: Desk, hub: Hub, model: Hash, profile: bytes) -> list[Candidate]:
    """Who could recompute a result of this model: takes CHECK jobs under the same profile, registered and staked."""
    found: dict[Address, Candidate] = {}
    for view in await views(desk, hub, model):
        node = desk.chain.nodes.get(view.provider)
        if node is None or not node.roles & PROVIDER or not node.stake:
            continue
        if view.checks and view.profile == profile and view.model == model and node.tls_key_hash == view.tls_key_hash:
            found[view.provider] = Candidate(view.provider, node.owner, node.stake)
    return list(found.values())


def _opened(desk: Desk, event: mpb.OfferEvent) -> pb.OfferBody | None:
    try:
        body = open_offer(desk.domain, event.offer)
    except (BadSignature, ProtocolError) as error:
        log.warning("offer_refused", reason=error.message)
        return None
    return body if body.expires_at > desk.clock.now() else None


def _views(desk: Desk, event: mpb.OfferEvent, body: pb.OfferBody, model: Hash | None) -> Iterator[OfferView]:
    node = desk.chain.nodes.get(Address(body.provider))
    for entry in body.models:
        if model is not None and entry.model != model:
            continue
        try:
            prompt, output = money_from_bytes(entry.prompt_price_per_mtok), money_from_bytes(entry.output_price_per_mtok)
        except ValueError as error:
            log.warning("offer_refused", reason=str(error))
            continue
        yield OfferView(
            provider=Address(body.provider),
            owner=node.owner if node else None,
            stake=Money(node.stake) if node else Money(0),
            endpoint=body.endpoint,
            tls_key_hash=Hash(body.tls_key_hash),
            region=body.region,
            gpus=tuple(gpu.gpu_class for gpu in body.gpus),
            measured_mflops=sum(gpu.measured_mflops for gpu in body.gpus),
            model=Hash(entry.model),
            name=entry.name,
            dtype=entry.dtype,
            warm=entry.warm,
            checks=body.checks,
            prompt_price_per_mtok=prompt,
            output_price_per_mtok=output,
            profile=Hash(entry.profile),
            reputation_ppm=event.reputation_ppm,
            capacity=body.capacity,
            proven_mflops=event.proven_mflops,
        )

"""The advert: what this provider sells right now, as the body that its wallet signs. Pure.

Invariants: a newer offer has a higher sequence, across restarts too; an offer lives shorter than its owner could be gone unnoticed;
only what was measured is stated as measured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from gpumarket.core.codec import signed_offer
from gpumarket.core.signing import Domain, Signer
from gpumarket.core.units import Address, Hash, money_bytes
from gpumarket.node.admission import OnSale
from gpumarket.node.inventory import Gpu
from gpumarket.v1 import terms_pb2 as pb

WITHDRAWN_SECONDS = 60
"""How long the notice of a provider that leaves is kept by others: long enough to pass everywhere."""


@dataclass(frozen=True, slots=True)
class Shop:
    """What of an offer does not change while the daemon runs."""

    provider: Address
    p2p_id: str
    endpoint: str
    tls_key_hash: Hash
    region: str
    checks: bool
    capacity: int


def offer_body(
    shop: Shop,
    gpus: Iterable[Gpu],
    mflops: Mapping[str, int],
    models: Mapping[Hash, OnSale],
    warm: Collection[Hash],
    sandbox: str,
    paces: Mapping[Hash, int],
) -> pb.OfferBody:
    """The advert without sequence and expiry. `mflops` by GPU UUID, `paces` (units in 1,000 seconds, 0 is unknown) by model."""
    return pb.OfferBody(
        provider=shop.provider,
        p2p_id=shop.p2p_id,
        endpoint=shop.endpoint,
        tls_key_hash=shop.tls_key_hash,
        gpus=[_claim(gpu, mflops.get(gpu.uuid, 0)) for gpu in gpus],
        models=[_model(digest, model, digest in warm, paces.get(digest, 0)) for digest, model in sorted(models.items())],
        region=shop.region,
        sandbox=sandbox,
        checks=shop.checks,
        capacity=shop.capacity,
    )


def withdrawn_body(shop: Shop) -> pb.OfferBody:
    """The advert of a provider that leaves: nothing on sale."""
    return pb.OfferBody(
        provider=shop.provider, p2p_id=shop.p2p_id, endpoint=shop.endpoint, tls_key_hash=shop.tls_key_hash, region=shop.region
    )


def sign_body(signer: Signer, domain: Domain, body: pb.OfferBody, sequence: int, expires_at: int) -> pb.SignedOffer:
    """Number, date and sign an advert."""
    dated = pb.OfferBody()
    dated.CopyFrom(body)
    dated.sequence, dated.expires_at = sequence, expires_at
    return signed_offer(signer, domain, dated)


def next_sequence(last: int | None, now: int) -> int:
    """Higher than any before. It follows the clock, so that a provider that lost its journal is soon believed again."""
    return max(now * 1000, (last or 0) + 1)


def is_due(before: pb.OfferBody | None, after: pb.OfferBody, signed_at: int, now: int, offer_seconds: int) -> bool:
    """Whether to sign a fresh offer: something changed, or half of the last one's life is over."""
    return before is None or before != after or 2 * (now - signed_at) >= offer_seconds


def _claim(gpu: Gpu, mflops: int) -> pb.GpuClaim:
    return pb.GpuClaim(
        gpu_class=gpu.gpu_class,
        uuid=gpu.uuid,
        vram_bytes=gpu.vram_bytes,
        compute_capability=gpu.compute_capability,
        measured_mflops=mflops,
    )


def _model(digest: Hash, model: OnSale, warm: bool, pace: int) -> pb.ModelOffer:
    manifest = model.manifest
    return pb.ModelOffer(
        model=digest,
        name=manifest.name,
        task=pb.Task.ValueType(int(manifest.task)),
        dtype=manifest.dtype,
        quantization=manifest.quantization,
        warm=warm,
        prompt_price_per_mtok=money_bytes(model.prompt_price),
        output_price_per_mtok=money_bytes(model.output_price),
        profile=model.profile,
        max_input_tokens=manifest.max_input_tokens,
        measured_tokens_per_ks=pace,
    )

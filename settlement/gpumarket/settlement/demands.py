"""What an order may demand of an offer, read alike by the scheduler that filters and by the client that checks its lease. Pure.

A provider is known by its GPU with the most memory: class and VRAM are that one's. A sandbox label that nobody knows is no sandbox.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpumarket.core.units import money_from_bytes

if TYPE_CHECKING:
    from gpumarket.core.terms import Lease
    from gpumarket.v1 import terms_pb2 as pb

SANDBOX_TIERS = {"": 0, "none": 0, "process": 1, "process+netns": 2}


def foremost_gpu(offer: pb.OfferBody) -> pb.GpuClaim | None:
    """The GPU that an offer is filed under, None for an offer without one."""
    return max(offer.gpus, key=lambda gpu: gpu.vram_bytes, default=None)


def unmet(constraints: pb.Constraints, offer: pb.OfferBody) -> str:
    """The first demand on hardware, region and sandbox that an offer does not meet, with both numbers; empty when all are met."""
    gpu = foremost_gpu(offer)
    if constraints.gpu_class and (gpu is None or gpu.gpu_class != constraints.gpu_class):
        return f"its GPU is {gpu.gpu_class if gpu else 'none'!r}, ordered was {constraints.gpu_class!r}"
    if constraints.min_vram_bytes > (gpu.vram_bytes if gpu else 0):
        return f"its GPU has {gpu.vram_bytes if gpu else 0} bytes of memory, ordered were {constraints.min_vram_bytes}"
    if constraints.region and offer.region != constraints.region:
        return f"its region is {offer.region!r}, ordered was {constraints.region!r}"
    if constraints.min_sandbox not in SANDBOX_TIERS:
        return f"the order asks for a sandbox {constraints.min_sandbox!r} that nobody knows"
    if SANDBOX_TIERS.get(offer.sandbox, 0) < SANDBOX_TIERS[constraints.min_sandbox]:
        return f"its sandbox is {offer.sandbox or 'none'!r}, ordered was {constraints.min_sandbox!r}"
    return ""


def above_cap(constraints: pb.Constraints, lease: Lease) -> str:
    """Which of the order's price caps a lease passes; empty when none. Raises ValueError for a cap that is no amount."""
    for name, price, cap in (
        ("prompt", lease.prompt_price_per_mtok, constraints.max_prompt_price_per_mtok),
        ("output", lease.output_price_per_mtok, constraints.max_output_price_per_mtok),
    ):
        if cap and price > money_from_bytes(cap):
            return f"its {name} price {price} is above the {money_from_bytes(cap)} that the order allows"
    return ""

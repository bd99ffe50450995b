"""Whether a network can take jobs: the scheduler is asked why an order would go nowhere, until nothing but the model strikes anybody out.

A provider is ready when it serves; it is matchable some seconds later, once its GPU proof was checked and its channel opened on chain.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

from gpumarket.core.codec import signed_order
from gpumarket.core.errors import NoProvider
from gpumarket.core.rpc import pinned_channel
from gpumarket.core.signing import Domain, LocalKey
from gpumarket.core.terms import JobSpec, ModelManifest, keccak256
from gpumarket.core.units import ZERO_HASH, Address, Hash, Money
from gpumarket.settlement.verification import profile_for
from gpumarket.v1 import market_pb2, market_pb2_grpc
from gpumarket.v1 import terms_pb2 as pb

MATCHABLE_SECONDS = 90.0
_POLL_SECONDS = 0.2
_DEADLINE_SECONDS = 60
_ENOUGH = Money(10**18)


async def wait_matchable(
    endpoint: str, tls_key_hash: Hash, scheduler: Address, models: Collection[ModelManifest], providers: int, key: LocalKey, domain: Domain
) -> None:
    """Until every one of `providers` can be matched for what it sells. Raises NoProvider with the reasons when that takes too long."""
    deadline = time.monotonic() + MATCHABLE_SECONDS
    async with pinned_channel(endpoint, tls_key_hash) as channel:
        market = market_pb2_grpc.MarketStub(channel)
        for model in models:
            while True:
                order = _order(model, scheduler, key, domain)
                found: market_pb2.Explanation = await market.Explain(order, timeout=10.0)
                waiting = {rejected.reason: rejected.filter for rejected in found.rejected if rejected.filter != "model"}
                if found.considered >= providers and found.candidates and not waiting:
                    break
                if time.monotonic() > deadline:
                    reasons = ", ".join(f"{name}: {reason}" for reason, name in waiting.items()) or f"{found.considered} are known"
                    raise NoProvider(
                        f"not all providers of {model.name} can be matched: {reasons}", hint="gpumarket testnet logs scheduler"
                    )
                await asyncio.sleep(_POLL_SECONDS)


def _order(model: ModelManifest, scheduler: Address, key: LocalKey, domain: Domain) -> pb.JobOrder:
    spec = JobSpec(
        client=key.address,
        scheduler=scheduler,
        job_id=ZERO_HASH,
        task=model.task,
        model=model.digest,
        request_hash=ZERO_HASH,
        prompt_units=1,
        max_output_units=1,
        max_amount=_ENOUGH,
        constraints_hash=keccak256(b""),
        profile=profile_for(model.task, model.dtype).digest,
        deadline=int(time.time()) + _DEADLINE_SECONDS,
    )
    return signed_order(key, domain, spec, b"")

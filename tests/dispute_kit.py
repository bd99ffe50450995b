"""A finished attempt as its client can open it: order, lease and receipt signed by whom they name, in whichever domain a test works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpumarket.core import codec
from gpumarket.core.signing import Domain, LocalKey, market_domain
from gpumarket.core.terms import (
    JobSpec,
    Lease,
    Outcome,
    Receipt,
    Task,
    VerificationProfile,
    keccak256,
    output_chain,
    request_hash,
    sampling_seed,
    token_item,
)
from gpumarket.core.units import ZERO_HASH, Address, Hash, Money
from gpumarket.settlement.verification import EMBED_FP32, TEXT_FP32
from gpumarket.v1 import market_pb2 as mpb
from gpumarket.v1 import terms_pb2 as pb

NOW = 1_800_000_000
DOMAIN = market_domain(31_337, Address(b"\x11" * 20))
SALT = keccak256(b"salt")
NONCE = Hash(keccak256(b"nonce"))
MAXIMUM = Money(10**16)


@dataclass(frozen=True)
class Deal:
    """Who trades, where, and when."""

    client: LocalKey
    scheduler: LocalKey
    provider: LocalKey
    model: Hash
    domain: Domain = DOMAIN
    issued_at: int = NOW

    def embed(self, inputs: Sequence[Sequence[int]], rows: Sequence[bytes], *, skip: int = 0, name: bytes = b"job") -> mpb.Opening:
        """An embedding job; its first `skip` rows came from an earlier attempt."""
        request = pb.EmbedRequest(inputs=[pb.TokenList(ids=ids) for ids in inputs])
        units = [len(ids) for ids in inputs]
        done = sum(units[:skip])
        items = list(rows)
        return self._opening(EMBED_FP32, request.SerializeToString(), items, sum(units), sum(units[: len(items)]) - done, done, skip, name)

    def text(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        *,
        skip: int = 0,
        name: bytes = b"job",
        profile: VerificationProfile = TEXT_FP32,
        client_seed: int | None = None,
    ) -> mpb.Opening:
        """A generated text; its first `skip` tokens came from an earlier attempt."""
        request = pb.GenerateRequest(prompt=prompt, max_tokens=max(1, len(tokens)), temperature_milli=1_000, top_p_ppm=1_000_000)
        if client_seed is not None:
            request.client_seed = client_seed
        items = [token_item(token) for token in tokens]
        return self._opening(profile, request.SerializeToString(), items, len(prompt), len(tokens) - skip, skip, skip, name)

    def _opening(
        self,
        profile: VerificationProfile,
        request: bytes,
        items: list[bytes],
        prompt_units: int,
        output_units: int,
        prefix_units: int,
        prefix_items: int,
        name: bytes,
    ) -> mpb.Opening:
        task = profile.task
        spec = JobSpec(
            client=self.client.address,
            scheduler=self.scheduler.address,
            job_id=Hash(keccak256(name)),
            task=task,
            model=self.model,
            request_hash=request_hash(SALT, request),
            prompt_units=prompt_units,
            max_output_units=prompt_units if task is Task.EMBED else prefix_units + output_units,
            max_amount=Money(2 * MAXIMUM),
            constraints_hash=Hash(keccak256(b"")),
            profile=profile.digest,
            deadline=self.issued_at + 600,
        )
        lease = self._lease(spec, prefix_units, output_chain(items[:prefix_items]))
        receipt = Receipt(
            lease=lease.struct_hash,
            nonce=NONCE,
            request_hash=spec.request_hash,
            output_hash=output_chain(items),
            prefix_units=prefix_units,
            prefix_hash=lease.prefix_hash,
            prompt_units=prompt_units,
            output_units=output_units,
            outcome=Outcome.COMPLETED,
            finished_at=self.issued_at + 5,
        )
        return mpb.Opening(
            lease=codec.signed_lease(self.scheduler, self.domain, lease),
            order=codec.signed_order(self.client, self.domain, spec, b""),
            receipt=codec.signed_receipt(self.provider, self.domain, receipt),
            request=request,
            salt=SALT,
            output=items,
        )

    def _lease(self, spec: JobSpec, prefix_units: int, prefix_hash: Hash) -> Lease:
        return Lease(
            job=spec.key,
            spec=spec.struct_hash,
            attempt=1 if not prefix_units else 2,
            client=spec.client,
            scheduler=spec.scheduler,
            provider=self.provider.address,
            model=spec.model,
            task=spec.task,
            prompt_price_per_mtok=Money(2 * 10**16),
            output_price_per_mtok=Money(10**17),
            maximum=MAXIMUM,
            fee_ppm=10_000,
            client_channel=Hash(keccak256(b"hub")),
            provider_channel=Hash(keccak256(b"spoke")),
            profile=spec.profile,
            window_units=64,
            prefix_units=prefix_units,
            prefix_hash=prefix_hash if prefix_units else ZERO_HASH,
            issued_at=self.issued_at,
            deadline=self.issued_at + 600,
        )


def seed_of(opening: mpb.Opening) -> Hash:
    """The sampling seed of an opened attempt."""
    return sampling_seed(codec.from_proto(Lease, opening.lease.lease).struct_hash, NONCE)

"""Whether a lease is what was ordered: every field against the order, the offer's own signature and the registry. Pure.

A scheduler is a stranger. What it may choose is the provider, within the order's constraints and the provider's own signed prices; all
else is refused here, by name, before a byte of the request leaves the client. One constraint it is believed on: the least reputation,
which is its own opinion, and which nobody else signs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpumarket.core.errors import ProtocolError
from gpumarket.core.terms import JobSpec, Lease
from gpumarket.core.units import Address, Hash, Money, hex0x, money_from_bytes
from gpumarket.settlement.demands import above_cap, unmet
from gpumarket.settlement.pricing import client_amount

if TYPE_CHECKING:
    from gpumarket.v1 import terms_pb2

ISSUED_SKEW_SECONDS = 60
"""How far a scheduler's clock may be off ours."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the client knows before the lease comes. `spent` is what ended attempts cost it; amounts include the fee."""

    spec: JobSpec
    ordered_at: int
    """Unix seconds; no lease of the order is older."""
    constraints: terms_pb2.Constraints
    attempt: int
    channel: Hash
    fee_ppm: int
    spent: Money
    prefix_units: int
    prefix_hash: Hash
    lost_providers: frozenset[Address]
    """Providers whose attempt of this job failed: they are not asked again."""


@dataclass(frozen=True, slots=True)
class Registered:
    """What the chain says of a provider."""

    owner: Address
    stake: Money
    tls_key_hash: Hash


def check_lease(lease: Lease, expected: Expected, offer: terms_pb2.OfferBody, node: Registered | None, now: int) -> None:
    """Raises ProtocolError naming the first field that is not as ordered. Signatures are verified before (core.codec)."""
    for check in _CHECKS:
        try:
            flaw = check(lease, expected, offer, node, now)
        except ValueError as error:  # an amount in the offer that is none
            flaw = str(error)
        if flaw:
            raise ProtocolError(
                f"the scheduler's lease is refused: {flaw}", hint="trade through another scheduler: GPUMARKET_CLIENT_SCHEDULER"
            )


def _identity(lease: Lease, expected: Expected, _offer: object, _node: object, _now: int) -> str:
    spec = expected.spec
    wanted: dict[str, object] = {
        "job": spec.key,
        "spec": spec.struct_hash,
        "client": spec.client,
        "scheduler": spec.scheduler,
        "model": spec.model,
        "task": spec.task,
        "profile": spec.profile,
        "attempt": expected.attempt,
        "client_channel": expected.channel,
        "fee_ppm": expected.fee_ppm,
        "prefix_units": expected.prefix_units,
        "prefix_hash": expected.prefix_hash,
    }
    for name, value in wanted.items():
        if getattr(lease, name) != value:
            return f"{name} is {_show(getattr(lease, name))}, not {_show(value)}"
    return ""


def _times(lease: Lease, expected: Expected, _offer: object, _node: object, now: int) -> str:
    if lease.deadline > expected.spec.deadline:
        return f"deadline {lease.deadline} is after the order's {expected.spec.deadline}"
    if lease.deadline <= now:
        return f"deadline {lease.deadline} has passed"
    if lease.issued_at > lease.deadline:  # no panel hears a dispute about it
        return f"deadline {lease.deadline} is before it was issued, at {lease.issued_at}"
    if lease.issued_at > now + ISSUED_SKEW_SECONDS:
        return f"issued_at {lease.issued_at} lies {lease.issued_at - now} s in the future"
    if lease.issued_at < expected.ordered_at - ISSUED_SKEW_SECONDS:  # the time to dispute its result counts from there
        return f"issued_at {lease.issued_at} lies {expected.ordered_at - lease.issued_at} s before the order"
    return ""


def _money(lease: Lease, expected: Expected, _offer: object, _node: object, _now: int) -> str:
    most = client_amount(lease.maximum, lease.fee_ppm) + expected.spent
    if most > expected.spec.max_amount:
        return f"maximum {lease.maximum} with fee and earlier attempts comes to {most}, above the order's {expected.spec.max_amount}"
    return ""


def _prices(lease: Lease, expected: Expected, offer: terms_pb2.OfferBody, _node: object, now: int) -> str:
    if offer.expires_at <= now:
        return f"the offer behind it expired at {offer.expires_at}"
    for model in offer.models:
        if model.model == lease.model and model.profile == lease.profile:
            prompt, output = money_from_bytes(model.prompt_price_per_mtok), money_from_bytes(model.output_price_per_mtok)
            if lease.prompt_price_per_mtok > prompt or lease.output_price_per_mtok > output:
                return f"prices {lease.prompt_price_per_mtok}/{lease.output_price_per_mtok} are above the provider's own {prompt}/{output}"
            return ""
    return "the provider's offer does not have the model with this profile"


def _provider(lease: Lease, expected: Expected, offer: terms_pb2.OfferBody, node: Registered | None, _now: int) -> str:
    constraints = expected.constraints
    if offer.provider != lease.provider:
        return f"provider {hex0x(lease.provider)} is not the offer's {hex0x(offer.provider)}"
    if constraints.require_provider and lease.provider != constraints.require_provider:
        return f"provider {hex0x(lease.provider)} is not the one required"
    if lease.provider in constraints.exclude_providers or lease.provider in expected.lost_providers:
        return f"provider {hex0x(lease.provider)} was excluded"
    if node is None:
        return f"provider {hex0x(lease.provider)} is not in the registry"
    if node.tls_key_hash != offer.tls_key_hash:
        return "the offer's TLS key is not the registered one"
    if node.owner in constraints.exclude_owners:
        return f"owner {hex0x(node.owner)} was excluded"
    if node.stake < money_from_bytes(constraints.min_stake):
        return f"stake {node.stake} is below the minimum ordered"
    return unmet(constraints, offer) or above_cap(constraints, lease)


_Check = Callable[[Lease, Expected, "terms_pb2.OfferBody", Registered | None, int], str]
_CHECKS: tuple[_Check, ...] = (_identity, _times, _money, _prices, _provider)


def _show(value: object) -> str:
    return hex0x(value) if isinstance(value, bytes) else str(value)

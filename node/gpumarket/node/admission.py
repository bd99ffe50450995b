"""Whether to take a leased job. Pure: a ladder of guards, each with its named error, before any work and before anything is written.

The attacker here is a client with a lease it altered, a scheduler that leases what it cannot pay, either of them replaying an old attempt,
and both together dating a lease so that a later dispute about it would be judged by verifiers who joined for it.
Invariant: a job that passes can be billed: every number of the receipt will agree with the lease and the order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from gpumarket.core.codec import open_lease, open_order
from gpumarket.core.errors import ChannelExpiring, ProtocolError, UnknownModel
from gpumarket.core.signing import Domain
from gpumarket.core.tensors import Signature
from gpumarket.core.terms import JobSpec, Lease, ModelManifest, Task, opens_request
from gpumarket.core.units import Address, Hash, Money, format_money, hex0x
from gpumarket.node.credit import OpenJob, exposure
from gpumarket.node.work import Work, open_work
from gpumarket.settlement.pricing import attempt_price
from gpumarket.v1 import provider_pb2 as pb

ISSUED_SKEW_SECONDS = 60
"""How far a lease's date may lie from now, either way: clocks differ. A panel is drawn from stake locked before that date."""
ROUNDING = 10**9
"""A maximum may lack this fraction of the price: schedulers round fees and filter in floats."""


class Spoke(Protocol):
    """A payment channel as the chain view shows it."""

    @property
    def payer(self) -> Address: ...
    @property
    def payee(self) -> Address: ...
    @property
    def signer(self) -> Address: ...
    @property
    def deposit(self) -> int: ...
    @property
    def expires_at(self) -> int: ...
    @property
    def closes_at(self) -> int: ...
    @property
    def closed(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class OnSale:
    """A model of the price list."""

    manifest: ModelManifest
    profile: Hash
    prompt_price: Money
    """Per 1,000,000 input tokens, base units."""
    output_price: Money
    slots: int
    signature: Signature | None = None
    """Of a tensor model."""


@dataclass(frozen=True, slots=True)
class House:
    """The rules of this provider."""

    address: Address
    domain: Domain
    models: Mapping[Hash, OnSale]
    checks: bool
    window_units_max: int
    embed_window_units_max: int
    channel_margin_seconds: int
    infer_window_units_max: int = 4_096

    def window_max(self, task: Task) -> int:
        """Largest window that a lease of this task may name."""
        if task is Task.INFER:
            return self.infer_window_units_max
        return self.window_units_max if task is Task.GENERATE else self.embed_window_units_max


@dataclass(frozen=True, slots=True)
class Admitted:
    """A job that may run."""

    lease: Lease
    lease_hash: Hash
    spec: JobSpec
    work: Work
    model: OnSale
    nonce: Hash

    @property
    def open_job(self) -> OpenJob:
        return OpenJob(self.lease.maximum, exposure(self.lease, self.spec.prompt_units))


def admit(message: pb.InferOpen, house: House, channels: Mapping[Hash, Spoke], nonce: Hash, now: int) -> Admitted:
    """Everything that can be judged without the ledger. Raises the named error of the first guard that fails."""
    lease = open_lease(house.domain, message.lease)
    spec, _ = open_order(house.domain, message.order)
    _require_ours(lease, house, channels, now)
    _require_same_terms(lease, spec)
    model = _require_on_sale(lease, house)
    _require_worth(lease, spec, model)
    if not opens_request(message.salt, message.request, spec.request_hash):
        raise ProtocolError("the request is not the one that the order names (its salted hash differs)")
    work = open_work(lease, spec, model.manifest, message.request, message.prefix, nonce, model.signature)
    return Admitted(lease, lease.struct_hash, spec, work, model, nonce)


def _require_ours(lease: Lease, house: House, channels: Mapping[Hash, Spoke], now: int) -> None:
    if lease.provider != house.address:
        raise ProtocolError(f"the lease is for {hex0x(lease.provider)}, this is {hex0x(house.address)}")
    spoke = channels.get(lease.provider_channel)
    if spoke is None or spoke.payee != house.address or lease.scheduler not in (spoke.payer, spoke.signer):
        raise ProtocolError(
            f"scheduler {hex0x(lease.scheduler)} has no confirmed channel {hex0x(lease.provider_channel)} to this provider",
            hint="it opens one on chain and waits for confirmations",
        )
    if spoke.closed or spoke.closes_at:
        raise ChannelExpiring("the scheduler's channel to this provider is closing", hint="the scheduler opens another one")
    if abs(lease.issued_at - now) > ISSUED_SKEW_SECONDS:
        side = "after" if lease.issued_at > now else "before"
        raise ProtocolError(
            f"the lease is dated {abs(lease.issued_at - now)} s {side} now, here; {ISSUED_SKEW_SECONDS} s are let pass",
            hint="set the clocks (NTP), or order again: a lease is to be used at once",
        )
    if now >= lease.deadline:
        raise ProtocolError(f"the lease's deadline passed {now - lease.deadline} s ago", hint="order again")
    if spoke.expires_at < lease.deadline + house.channel_margin_seconds:
        raise ChannelExpiring(
            f"the scheduler's channel expires {spoke.expires_at - lease.deadline} s after the deadline; "
            f"{house.channel_margin_seconds} s are needed to redeem",
            hint="the scheduler opens a channel that lives longer",
        )


def _require_same_terms(lease: Lease, spec: JobSpec) -> None:
    pairs = (
        ("spec", lease.spec, spec.struct_hash),
        ("job", lease.job, spec.key),
        ("client", lease.client, spec.client),
        ("scheduler", lease.scheduler, spec.scheduler),
        ("model", lease.model, spec.model),
        ("task", lease.task, spec.task),
        ("profile", lease.profile, spec.profile),
    )
    for name, leased, ordered in pairs:
        if leased != ordered:
            raise ProtocolError(f"the lease's {name} is not the order's")
    if lease.deadline > spec.deadline:
        raise ProtocolError(f"the lease ends {lease.deadline - spec.deadline} s after the order's deadline")
    if lease.maximum > spec.max_amount:
        raise ProtocolError(f"the lease earns up to {format_money(lease.maximum)}, the order pays {format_money(spec.max_amount)} at most")


def _require_on_sale(lease: Lease, house: House) -> OnSale:
    model = house.models.get(lease.model)
    if model is None:
        raise UnknownModel(f"model {hex0x(lease.model)} is not on sale here", hint="ask the scheduler for a provider that offers it")
    if lease.task is Task.CHECK and not house.checks:
        raise ProtocolError("this provider does not take checks; its offer says so")
    if lease.profile != model.profile:
        raise ProtocolError(f"the lease's profile {hex0x(lease.profile)} is not the offered {hex0x(model.profile)}")
    _require_price("input", lease.prompt_price_per_mtok, model.prompt_price)
    if lease.task is Task.GENERATE:
        _require_price("generated", lease.output_price_per_mtok, model.output_price)
    if lease.window_units > house.window_max(lease.task):
        raise ProtocolError(f"a window of {lease.window_units} units; this provider runs at most {house.window_max(lease.task)} ahead")
    return model


def _require_worth(lease: Lease, spec: JobSpec, model: OnSale) -> None:
    """A maximum below the price of what the order allows would have the rest done for nothing."""
    listed = (model.prompt_price, model.output_price)
    price = attempt_price(spec, *listed, prefix_units=lease.prefix_units)
    if lease.maximum + price // ROUNDING + 8 < price:
        raise ProtocolError(
            f"the lease earns at most {format_money(lease.maximum)}, and its order allows work of {format_money(price)} by the price list",
            hint="order fewer units, or pay for those ordered",
        )


def _require_price(what: str, leased: int, listed: int) -> None:
    if leased < listed:
        raise ProtocolError(f"{format_money(leased)} for 1,000,000 {what} tokens; the price list says {format_money(listed)}")

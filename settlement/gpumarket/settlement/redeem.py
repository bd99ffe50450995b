"""When a payee redeems: pure policy. A voucher is money only once the chain has paid it, and every redemption costs gas.

Redeem when gas is a small share of the value, or when waiting risks the value: the channel closes or expires soon, or more is outstanding
than this payee is ready to lose. Never: a clock or a price of its own; both come in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from gpumarket.core.units import PER_MILLION, Hash

REDEEM_GAS = 61_500
"""Gas of one `redeem` (measured on anvil, upper bound)."""


class Redeemable(Protocol):
    """What the policy reads of a channel (`gpumarket.settlement.channel.ReceivedChannel` has it all)."""

    @property
    def id(self) -> Hash: ...

    @property
    def redeemable(self) -> int: ...

    @property
    def expires_at(self) -> int: ...

    @property
    def closing(self) -> int: ...


@dataclass(frozen=True, slots=True)
class RedeemPolicy:
    """How eager a payee is."""

    gas_share_ppm: int = 10_000
    """Redeem when gas costs at most this share of the value: 1 %."""
    margin_seconds: int = 6 * 3600
    """Redeem at whatever cost (below the value) this long before the channel may be closed."""
    exposure_limit: int = 0
    """Redeem when at least this much is outstanding, in base units; 0 sets no limit."""


def due(
    channel: Redeemable,
    *,
    gas_price: int,
    gas_value: float,
    now: int,
    policy: RedeemPolicy | None = None,
    gas: int = REDEEM_GAS,
    force: bool = False,
) -> str | None:
    """Why this channel is to be redeemed now ("forced", "closing", "expiry", "exposure", "gas-share"), or None.

    gas_price: wei per gas. gas_value: what a wei is worth in base units of the token. now: unix seconds. gas: of one redemption, less in a
    batch. What the gas would eat up is never redeemed, unless forced: it may still grow.
    """
    policy = policy or RedeemPolicy()
    value = channel.redeemable
    if value <= 0:
        return None
    if force:
        return "forced"
    cost = gas_price * gas * gas_value
    if cost >= value:
        return None
    if channel.closing:
        return "closing"
    if channel.expires_at - now <= policy.margin_seconds:
        return "expiry"
    if policy.exposure_limit and value >= policy.exposure_limit:
        return "exposure"
    if cost * PER_MILLION <= value * policy.gas_share_ppm:
        return "gas-share"
    return None

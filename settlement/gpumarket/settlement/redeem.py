"""When a payee redeems, and which voucher: pure policy. A voucher is money only once the chain has paid it, and each redemption costs gas.

Redeem when gas is a small share of the value, or when waiting risks the value: the channel closes or expires soon, or more is outstanding
than this payee is ready to lose. Never: a clock or a price of its own; both come in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from gpumarket.core.units import PER_MILLION, Hash
from gpumarket.settlement.channel import ReceivedChannel
from gpumarket.settlement.ladder import steps

REDEEM_GAS = 61_500
"""Gas of one `redeem` (measured on anvil, upper bound)."""
WITHDRAW_GAS = 45_000
"""Gas of one `withdraw` (39,692 measured, upper bound)."""
LAST_CHANCE_SECONDS = 900
"""So long before a channel can be gone, what may still become owed is taken too: later there is nothing to take it from."""

_ANY_PRICE = 2**255
"""Where a wei is worth nothing."""


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


def worth(amount: int, *, closes_at: int, expires_at: int, gas_value: float, now: int, policy: RedeemPolicy) -> int:
    """Wei that a redemption of `amount` which is on its way may cost: all that it brings, once its channel is closing or expires within the
    margin, for later it brings nothing; 0 while there is time."""
    if not closes_at and expires_at - now > policy.margin_seconds:
        return 0
    return int(max(0, amount) / gas_value) if gas_value > 0 else max(0, amount) and _ANY_PRICE


def withdrawal_due(credited: int, *, gas_price: int, gas_value: float, policy: RedeemPolicy) -> bool:
    """Whether credited money is to be withdrawn: gas is a small share of it. It cannot lapse, so there is never a hurry."""
    return credited > 0 and gas_price * WITHDRAW_GAS * gas_value * PER_MILLION <= credited * policy.gas_share_ppm


def earned(channel: ReceivedChannel, now: int) -> ReceivedChannel:
    """The channel with the voucher that its payee should redeem now in the place of the newest one; nothing to redeem where none fits.

    While the channel lives, the highest voucher that takes no more than was used: the client's prepaid rest stays the client's. Once its
    payer closes it alone, the lowest that covers what was used, and in the last LAST_CHANCE_SECONDS (also before the expiry) the lowest
    that covers what is held and open as well. `docs/decisions/0005-which-voucher-redeems.md` says why.
    """
    vouchers = [*steps(channel.ladder), (channel.voucher, channel.signature)]
    ends_at = min(channel.closing or channel.expires_at, channel.expires_at)
    last_chance = ends_at - now <= LAST_CHANCE_SECONDS
    owed = channel.used + (channel.held + channel.open if last_chance else 0)
    if channel.closing or last_chance:
        fitting = [step for step in vouchers if step[0] >= owed > channel.redeemed][:1]
    else:
        fitting = [step for step in vouchers if step[0] <= owed][-1:]
    amount, signature = fitting[0] if fitting else (channel.redeemed, b"")
    return replace(channel, voucher=amount, signature=signature)

"""What an attempt earns and costs. Pure integer arithmetic; every rounding goes against whoever claims the money.

Never: floats, a price that the lease does not name, an amount above the lease's maximum.
"""

from __future__ import annotations

from gpumarket.core.terms import Ack, JobSpec, Lease, Outcome, Receipt, Task
from gpumarket.core.units import PER_MILLION, Money, fee_floor, price_ceil, price_floor


def attempt_amount(lease: Lease, *, prompt_units: int, units: int, complete: bool) -> Money:
    """What the provider earns for `units` acked output units, in base units, at most `lease.maximum`.

    GENERATE: output units x output price, and for the attempt that completes also the prompt x prompt price.
    EMBED and CHECK: units are input tokens of the delivered items, x prompt price (docs/protocol.md, "What is earned").
    """
    if lease.task is Task.GENERATE:
        earned = price_floor(units, lease.output_price_per_mtok)
        if complete:
            earned = Money(earned + price_floor(prompt_units, lease.prompt_price_per_mtok))
    else:
        earned = price_floor(units, lease.prompt_price_per_mtok)
    return Money(min(earned, lease.maximum))


def client_amount(amount: int, fee_ppm: int) -> Money:
    """What the client pays for an attempt that earns `amount`: the scheduler's fee comes on top, rounded down."""
    return Money(amount + fee_floor(amount, fee_ppm))


def attempt_maximum(spec: JobSpec, prompt_price: int, output_price: int, fee_ppm: int, *, spent: int, prefix_units: int) -> Money:
    """`Lease.maximum`: the most that the next attempt may earn, in base units.

    The price (rounded up) of what the spec still allows after `prefix_units` delivered ones, but never more than what is left of
    `max_amount` after `spent` (what the client pays for earlier attempts, fees included) once this attempt's own fee is added. 0 when
    nothing is left. Prices are per 1,000,000 units.
    """
    price = attempt_price(spec, prompt_price, output_price, prefix_units=prefix_units)
    return Money(min(price, without_fee(spec.max_amount - spent, fee_ppm)))


def attempt_price(spec: JobSpec, prompt_price: int, output_price: int, *, prefix_units: int) -> int:
    """Price, rounded up, of all that the spec still allows after `prefix_units` delivered ones. Base units, which may pass uint96."""
    if spec.task is Task.GENERATE:
        output_units = max(0, spec.max_output_units - prefix_units)
        return price_ceil(spec.prompt_units, prompt_price) + price_ceil(output_units, output_price)
    return price_ceil(max(0, spec.prompt_units - prefix_units), prompt_price)


def counts_as_complete(ack: Ack | None, receipt: Receipt, window_units: int) -> bool:
    """Whether the attempt earns as one that delivered the whole answer.

    Either the client says so, or the provider's receipt says completed and the acks reach within one window of its end: a client that
    withholds its last ack saves nothing but that window. No ack counts as zero units; a client that really received nothing says so
    with `Market.Retry`, which closes the attempt before it can be claimed.
    """
    if ack is not None and ack.complete:
        return True
    acked = ack.units if ack is not None else 0
    return receipt.outcome is Outcome.COMPLETED and receipt.output_units - acked <= window_units


def without_fee(left: int, fee_ppm: int) -> int:
    """Largest amount m with m + fee_floor(m) <= left, 0 for nothing left."""
    if left <= 0:
        return 0
    amount = left * PER_MILLION // (PER_MILLION + fee_ppm)
    while client_amount(amount + 1, fee_ppm) <= left:
        amount += 1  # the fee's own rounding leaves room for a few units more at most
    return amount

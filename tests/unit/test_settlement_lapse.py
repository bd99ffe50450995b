"""No voucher lapses: the redeem policy over simulated time, with a payee that is away and a chain that takes nothing for a share of the
challenge window. Pure: no chain, no clock of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reliability import record

from gpumarket.core.units import Address, Hash
from gpumarket.settlement.chain.gas import ESCALATION, FEE_MAX, Price, raised, replacement
from gpumarket.settlement.chain.outbox import Outgoing
from gpumarket.settlement.channel import ReceivedChannel
from gpumarket.settlement.redeem import REDEEM_GAS, RedeemPolicy, due, earned, worth

BLOCK_SECONDS = 12
POLL_SECONDS = 30
"""How often a provider's redeemer looks (its default); a close that it sees wakes it at once, which this leaves out."""
START = 1_000_000
SMALL = 3_600
"""A challenge window of an hour: the shortest worth running a provider with. Longer ones leave more room."""
VALUE, GAS_PRICE = 10**18, 10**9
SPIKE = 100


@dataclass(frozen=True)
class World:
    """What happens to one channel. Times in seconds after the close request (negative: before the expiry)."""

    window: int
    away: int
    """The payee is offline for the first so many seconds of the window."""
    congested: int
    """From then on no transaction is mined for so many seconds."""
    spike: bool = False
    by_expiry: bool = False
    sent_before: bool = False
    """The redemption was sent long before, at the price of then, and waits in the pool: how far its fee may be raised decides."""


def lost(world: World) -> int:
    """What the payer takes back although it was earned: the payer closes in the very first block that may hold it."""
    ends = START + world.window
    channel = ReceivedChannel(
        Hash(bytes(32)),
        Address(bytes(20)),
        2 * VALUE,
        ends if world.by_expiry else START + 10**7,
        voucher=VALUE,
        signature=b"s" * 65,
        used=VALUE,
    )
    seen = channel if world.by_expiry else replace(channel, closing=ends)
    price, policy = GAS_PRICE * (SPIKE if world.spike else 1), RedeemPolicy(margin_seconds=world.window)
    offers = [offer(2 * GAS_PRICE)] if world.sent_before else []
    for block in range(START, ends + 1, BLOCK_SECONDS):
        if block >= ends:
            return VALUE  # the payer's close comes first
        here = block >= START + world.away
        if here and (block - START) % POLL_SECONDS < BLOCK_SECONDS:
            if offers:
                offers += hastened(offers, seen, price, block, policy)
            elif due(earned(seen, block), gas_price=price, gas_value=1.0, now=block, policy=policy) is not None:
                offers = [offer(2 * price)]
        mined = block >= START + world.away + world.congested or (world.sent_before and block >= START + world.congested)
        if mined and offers and offers[-1].max_fee >= price:
            return 0
    return VALUE


def offer(max_fee: int) -> Outgoing:
    """A redemption in the pool."""
    return Outgoing(0, 0, "redeem", Hash(bytes(32)), b"", b"", b"", REDEEM_GAS, max_fee, 0)


def hastened(offers: list[Outgoing], seen: ReceivedChannel, price: int, now: int, policy: RedeemPolicy) -> list[Outgoing]:
    """What the sender offers in the place of its last one, bounded as the sender is; nothing where it stays."""
    wei = worth(seen.redeemable, closes_at=seen.closing, expires_at=seen.expires_at, gas_value=1.0, now=now, policy=policy)
    fees = replacement(offers, Price(2 * price, 0, price), offers, wei)
    return [offer(fees[0])] if fees is not None else []


def largest_share(**changes: bool) -> float:
    """The largest share of the window that the chain may be congested from its first second on, with nothing lost."""
    best = 0.0
    for percent in range(0, 100):
        if lost(World(SMALL, 0, SMALL * percent // 100, **changes)):
            break
        best = percent / 100
    return best


SENT_BEFORE_A_SPIKE = {"spike": True, "sent_before": True}


@pytest.mark.parametrize(
    "changes",
    [{}, {"spike": True}, {"by_expiry": True}, SENT_BEFORE_A_SPIKE, SENT_BEFORE_A_SPIKE | {"by_expiry": True}],
    ids=["close", "close-in-a-spike", "expiry", "sent-before-the-spike", "sent-before-the-spike-expiry"],
)
def test_lapse_congestion_for_almost_the_whole_window_loses_nothing(changes: dict[str, bool]) -> None:
    found = largest_share(**changes)
    record("F36", 100, f"largest congested share of a window of {SMALL} s with 0 lost: {found:.2f} {changes or ''}", "f reported")
    assert found >= 0.98


@settings(max_examples=300, deadline=None)
@given(st.integers(600, 7 * 86_400), st.floats(0, 1), st.floats(0, 1), st.booleans(), st.booleans(), st.booleans())
def test_lapse_any_absence_and_congestion_that_end_in_time_lose_nothing(
    window: int, away: float, congested: float, spike: bool, by_expiry: bool, sent_before: bool
) -> None:
    """Loss 0 while the payee is back, and blocks are free, one look and one block before the window's end."""
    room = window - POLL_SECONDS - 3 * BLOCK_SECONDS
    gone = int(room * away)
    world = World(window, gone, int((room - gone) * congested), spike, by_expiry, sent_before)
    assert lost(world) == 0, world


def test_lapse_test_can_fail() -> None:
    assert lost(World(SMALL, SMALL, 0)) == VALUE
    assert lost(World(SMALL, 0, SMALL)) == VALUE


@given(st.integers(1, 10**20), st.integers(1, 10**13), st.integers(1, 10**13), st.integers(0, 10**20))
def test_lapse_hastening_never_offers_more_than_it_brings(value: int, first: int, base: int, tip: int) -> None:
    """Beyond the sender's usual bound, the whole transaction costs at most what is at stake, and never more than the sender's hard cap."""
    offers = [offer(first)]
    for _ in range(40):
        fees = replacement(offers, Price(2 * base + tip, tip, base), offers, value)
        if fees is None:
            break
        assert fees[0] <= ESCALATION * first or fees[0] * REDEEM_GAS <= min(value, FEE_MAX)
        assert fees[0] >= raised(offers[-1].max_fee) and fees[1] <= fees[0]
        offers.append(offer(fees[0]))


@given(st.integers(1, 10**24), st.integers(1, 10**13), st.booleans())
def test_lapse_what_the_gas_would_eat_is_left(value: int, price: int, closing: bool) -> None:
    """Never a redemption that costs more than it brings, whatever the hurry; always one that brings more, when the channel ends."""
    channel = ReceivedChannel(
        Hash(bytes(32)), Address(bytes(20)), value, START + 10**6, voucher=value, signature=b"s" * 65, closing=START + 60 if closing else 0
    )
    found = due(channel, gas_price=price, gas_value=1.0, now=START)
    cost = price * REDEEM_GAS
    assert not (found and cost >= value)
    assert bool(found) or not closing or cost >= value

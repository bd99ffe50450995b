"""Which clients' channels a scheduler's redeemer may touch: what was used, not what is only reserved."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumarket.core.units import Address, Hash
from gpumarket.scheduler.ledger import HubChannel
from gpumarket.scheduler.market import _may_redeem
from gpumarket.settlement.channel import ReceivedChannel

SOON = 1_000


def hub(*, used: int, close_signed: bool = False, **changes: int) -> HubChannel:
    state = ReceivedChannel(id=Hash(bytes(32)), signer=Address(bytes(20)), deposit=1_000, expires_at=10 * SOON, voucher=100, used=used)
    return HubChannel(replace(state, **changes), Address(bytes(20)), close_signed)  # type: ignore[arg-type]


@pytest.mark.parametrize(("used", "may"), [(0, False), (49, False), (50, True), (100, True)])
def test_redeemable_voucher_must_be_half_used(used: int, may: bool) -> None:
    assert _may_redeem(hub(used=used), SOON) is may


def test_redeemable_counts_from_what_was_redeemed_before() -> None:
    assert not _may_redeem(hub(used=80, redeemed=70), SOON)
    assert _may_redeem(hub(used=90, redeemed=70), SOON)


def test_redeemable_channel_whose_close_we_signed_waits_for_it() -> None:
    assert not _may_redeem(hub(used=100, close_signed=True), SOON)


@pytest.mark.parametrize("changes", [{"closing": 500}, {"expires_at": SOON}])
def test_redeemable_always_when_the_channel_ends(changes: dict[str, int]) -> None:
    assert _may_redeem(hub(used=1, close_signed=True, **changes), SOON)

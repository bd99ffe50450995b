"""A scheduler's deposits in channels to providers come back, and what it owes there is paid first: on a chain, with time moved by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reliability import record
from settlement_chain import CLOSE_WINDOW_SECONDS, ChainClock, LocalChain, account, chain_journal, party

from gpumarket.core.ports import SystemRandom
from gpumarket.core.units import Address, Hash
from gpumarket.scheduler.ledger import Spoke
from gpumarket.scheduler.market import Market, World
from gpumarket.scheduler.reclaiming import Reclaimer, Step, due
from gpumarket.scheduler.settings import SchedulerSettings
from gpumarket.scheduler.tables import metadata
from gpumarket.settlement.chain import Actions, Chain, ChainView, ChannelOnChain, Follower
from gpumarket.settlement.channel import PaidChannel, Pay, Reserve, handle
from gpumarket.settlement.journal import Journal

SCHEDULER, PROVIDER = account(5), account(6)
DEPOSIT, VOUCHERED = 1_000, 300
LIFE, IDLE, GRACE = 10_000, 5_000, 600


@dataclass
class Desk:
    """A scheduler's ledger with one channel to a provider, and the provider."""

    local: LocalChain
    market: Market
    actions: Actions
    payee: Actions
    follower: Follower
    spoke: Spoke
    reclaimer: Reclaimer

    async def reclaim(self) -> None:
        """A look, and what the follower sees of it."""
        await self.follower.sync()
        await self.reclaimer.reclaim()
        await self.follower.sync()

    def pass_seconds(self, seconds: int) -> None:
        self.local.anvil.rpc("evm_setNextBlockTimestamp", self.local.now() + seconds)
        self.local.mine()

    async def voucher(self) -> tuple[int, bytes]:
        await self.market.ledger.commit()
        return self.market.ledger.voucher(self.spoke.state.id)


@pytest.fixture
async def desk(local: LocalChain, tmp_path: Path) -> AsyncIterator[Desk]:
    chain = await local.connect()
    ours, theirs = Journal(f"sqlite:///{tmp_path / 'ledger.db'}", metadata), chain_journal(tmp_path / "provider.db")
    ours.open()
    actions, payee = await party(chain, SCHEDULER, ours), await party(chain, PROVIDER, theirs)
    made = await _made(local, chain, ours, actions, payee, tmp_path)
    yield made
    await made.market.close()
    for each in (actions, payee):
        await each.sender.close()
    await ours.close()
    await theirs.close()
    await chain.close()


async def _made(local: LocalChain, chain: Chain, journal: Journal, actions: Actions, payee: Actions, folder: Path) -> Desk:
    settings = SchedulerSettings(
        state=folder, spoke_idle_seconds=IDLE, spoke_grace_seconds=GRACE, gas_value=0.0, drain_seconds=0.1, spoke_deposit="1"
    )
    view, clock = ChainView(), ChainClock(local)
    world = World(SCHEDULER, chain.market_domain, chain.channels_domain, view, journal, actions, clock, SystemRandom())
    market = Market(settings, world)
    market.open()
    channel = await actions.open_channel(PROVIDER.address, DEPOSIT, local.now() + LIFE)
    market.channels.adopt(channel, PROVIDER.address, DEPOSIT, local.now() + LIFE)
    follower = Follower(chain, view, me=SCHEDULER.address)
    await follower.sync()
    spoke = market.ledger.spokes[channel]
    pay(market, spoke, VOUCHERED)
    return Desk(local, market, actions, payee, follower, spoke, Reclaimer(settings, actions, market.ledger, market.presence, clock))


def pay(market: Market, spoke: Spoke, amount: int) -> None:
    market.ledger.put_spoke(handle(handle(spoke.state, Reserve(amount)), Pay(amount)))


async def test_reclaimed_spoke_that_expired_pays_what_is_owed_and_the_rest_comes_back(desk: Desk) -> None:
    """The provider was away to its channel's end and longer, with a voucher of 300 of which it had redeemed nothing."""
    before = await desk.actions.balance()
    desk.pass_seconds(LIFE + GRACE - 60)
    desk.reclaimer._seen[PROVIDER.address] = desk.reclaimer._clock.monotonic()  # here until a moment ago
    await desk.reclaim()
    assert not desk.spoke.state.closed and not desk.spoke.leaving, "its provider still has the grace"
    desk.pass_seconds(60)
    await desk.reclaim()
    assert desk.spoke.state.closed
    assert await desk.actions.balance() == before + DEPOSIT - VOUCHERED
    assert await desk.payee.credited() == VOUCHERED
    await desk.payee.withdraw()
    nonces = len(desk.actions.sender.pending_calls())
    await desk.reclaim()
    assert len(desk.actions.sender.pending_calls()) == nonces and await desk.actions.balance() == before + DEPOSIT - VOUCHERED
    record("exit of a scheduler's deposits", 1, "expired: all but what was vouchered came back, that was paid", "payee loses 0")


async def test_reclaimed_spoke_of_a_provider_that_is_gone_leaves_it_the_window(desk: Desk) -> None:
    before, paid = await desk.actions.balance(), await desk.payee.balance()
    cumulative, signature = await desk.voucher()
    await desk.reclaim()
    assert not desk.spoke.leaving
    desk.pass_seconds(IDLE)
    await desk.reclaim()
    assert desk.spoke.state.closing and not desk.spoke.state.closed
    assert desk.market.channels.spoke(PROVIDER.address) is None, "no lease goes on it; should the provider come back, it gets another"
    await desk.reclaim()
    assert not desk.spoke.state.closed, "the window is the provider's"
    await desk.payee.redeem(desk.spoke.state.id, cumulative, signature)
    desk.pass_seconds(CLOSE_WINDOW_SECONDS)
    await desk.reclaim()
    assert desk.spoke.state.closed
    assert await desk.payee.balance() == paid + VOUCHERED and await desk.payee.credited() == 0
    assert await desk.actions.balance() == before + DEPOSIT - VOUCHERED
    record("exit of a scheduler's deposits", 1, "provider gone: closed after the window, its voucher redeemed in it", "payee loses 0")


async def test_reclaimed_spoke_never_while_something_is_reserved_or_its_provider_is_here(desk: Desk) -> None:
    session = desk.market.presence.begin(PROVIDER.address)
    desk.pass_seconds(2 * IDLE - 1_000)
    await desk.reclaim()
    assert not desk.spoke.leaving
    desk.market.presence.end(session)
    desk.market.ledger.put_spoke(handle(desk.spoke.state, Reserve(10)))
    desk.pass_seconds(LIFE + GRACE)
    await desk.reclaim()
    on_chain = desk.market.world.view.channels[desk.spoke.state.id]
    assert not on_chain.closed and not on_chain.closes_at


async def test_reclaimed_spoke_after_a_restart_pays_what_was_owed_and_not_yet_signed(desk: Desk) -> None:
    """Its provider was not heard since the restart, so what became owed waits unsigned; leaving pays it all the same."""
    await desk.voucher()
    desk.spoke.confirmed = False
    pay(desk.market, desk.spoke, 50)
    assert (await desk.voucher())[0] == VOUCHERED
    desk.pass_seconds(LIFE + GRACE)
    await desk.reclaim()
    assert desk.spoke.state.closed and await desk.payee.credited() == VOUCHERED + 50
    await desk.payee.withdraw()


STATE = PaidChannel(Hash(b"\1" * 32), Address(b"\2" * 20), DEPOSIT, LIFE, vouchered=VOUCHERED)
ON_CHAIN = ChannelOnChain(STATE.id, Address(b"\3" * 20), STATE.payee, Address(b"\3" * 20), DEPOSIT, 0, LIFE)


def step(now: int, *, gone: bool = False, closes_at: int = 0, cost: float = 0.0, **changes: Any) -> Step | None:
    on_chain = replace(ON_CHAIN, closes_at=closes_at)
    return due(replace(STATE, **changes), on_chain, now=now, gone=gone, grace_seconds=GRACE, cost=cost)


def test_reclaim_due_follows_expiry_window_and_absence() -> None:
    assert step(LIFE + GRACE - 1) is None and step(LIFE + GRACE) is Step.CLOSE
    assert step(0, gone=True) is Step.REQUEST and step(0) is None
    assert step(9, gone=True, closes_at=10) is None and step(10, closes_at=10) is Step.CLOSE


@given(st.integers(0, 2 * LIFE), st.booleans(), st.integers(0, 2 * LIFE), st.integers(0, DEPOSIT), st.integers(0, DEPOSIT))
def test_reclaim_due_never_with_reservations_nor_for_nothing(now: int, gone: bool, closes_at: int, reserved: int, vouchered: int) -> None:
    found = step(now, gone=gone, closes_at=closes_at, reserved=reserved, vouchered=vouchered, cost=5.0)
    assert found is None or (not reserved and DEPOSIT - vouchered > 5)
    assert found is not Step.REQUEST or (gone and not closes_at)

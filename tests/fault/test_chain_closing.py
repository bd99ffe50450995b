"""A payer that closes alone, with an old voucher in its hand, while the payee is away or the chain takes nothing: the payee loses nothing
that it redeems before the window ends. On a chain, with time moved by hand.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from reliability import record
from settlement_chain import CLOSE_WINDOW_SECONDS, ChainClock, LocalChain, account, chain_journal, party, until

from gpumarket.core.errors import TransactionFailed
from gpumarket.core.units import Hash
from gpumarket.settlement.chain import Actions, ChainView, Follower, outbox
from gpumarket.settlement.channel import ReceivedChannel
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.redeem import RedeemPolicy
from gpumarket.settlement.redeemer import Redeemer
from gpumarket.settlement.vouchers import sign_voucher

PAYER, PAYEE = account(7), account(8)
FAR = 4_000_000_000
OLD, NEW, DEPOSIT = 100, 600, 1_000
ONLY_WHEN_IT_MUST = RedeemPolicy(gas_share_ppm=0, margin_seconds=0)


@dataclass
class Closing:
    """A channel that its payer is about to close."""

    local: LocalChain
    payer: Actions
    payee: Actions
    journal: Journal
    channel: Hash
    signatures: dict[int, bytes]

    async def redeemer(self, policy: RedeemPolicy = ONLY_WHEN_IT_MUST) -> Redeemer:
        """The payee as it starts: its newest voucher from the journal, the chain from its events."""
        view = ChainView()
        await Follower(self.payee.chain, view, me=PAYEE.address).sync()
        found = view.channels[self.channel]
        state = ReceivedChannel(
            found.id, found.signer, found.deposit, found.expires_at,
            voucher=NEW, signature=self.signatures[NEW], redeemed=found.claimed, closing=found.closes_at, closed=found.closed,
        )  # fmt: skip
        clock = ChainClock(self.local)
        return Redeemer(self.payee, self.journal, lambda: [state], clock, payer_of=lambda _: PAYER.address, policy=policy, gas_value=1e-15)

    def pass_seconds(self, seconds: int) -> None:
        """The next block is so much later."""
        self.local.anvil.rpc("evm_setNextBlockTimestamp", self.local.now() + seconds)


@pytest.fixture
async def closing(local: LocalChain, tmp_path: Path) -> AsyncIterator[Closing]:
    chain = await local.connect()
    theirs, ours = chain_journal(tmp_path / "payer.db"), chain_journal(tmp_path / "payee.db")
    payer, payee = await party(chain, PAYER, theirs), await party(chain, PAYEE, ours)
    channel = await payer.open_channel(PAYEE.address, DEPOSIT, FAR)
    signatures = {amount: sign_voucher(PAYER, chain.channels_domain, channel, amount) for amount in (OLD, NEW)}
    yield Closing(local, payer, payee, ours, channel, signatures)
    for actions in (payer, payee):
        await actions.sender.close()
    await ours.close()
    await theirs.close()
    await chain.close()


async def close_alone(closing: Closing) -> int:
    """What the payer gets back in the first block that lets it."""
    before = await closing.payer.balance()
    with pytest.raises(TransactionFailed, match="TooEarly"):
        await closing.payer.close(closing.channel)
    closing.pass_seconds(CLOSE_WINDOW_SECONDS + 1)
    closing.local.mine()
    await closing.payer.close(closing.channel)
    return int(await closing.payer.balance() - before)


@pytest.mark.parametrize("away", [0, CLOSE_WINDOW_SECONDS // 2, CLOSE_WINDOW_SECONDS - 5])
async def test_closing_alone_with_an_old_voucher_pays_an_absent_payee_in_full(closing: Closing, away: int) -> None:
    before = await closing.payee.balance()
    await closing.payer.redeem(closing.channel, OLD, closing.signatures[OLD])  # anyone may: the payer shows the old one
    await closing.payer.request_close(closing.channel)
    if away:
        closing.pass_seconds(away)  # the payee is offline
        closing.local.mine()
    (done,) = await (await closing.redeemer()).redeem_due()
    assert done.amount == NEW - OLD
    assert await closing.payee.balance() == before + NEW
    assert await close_alone(closing) == DEPOSIT - NEW
    record("F40", 1, f"payee away {away} of {CLOSE_WINDOW_SECONDS} s: lost 0", "loss 0 while offline < window")


async def test_closing_alone_while_the_chain_takes_nothing_pays_in_full(closing: Closing) -> None:
    """No block for 55 of 60 seconds: the redemption waits in the pool, and is in the first one, before any close can be."""
    before = await closing.payee.balance()
    await closing.payer.request_close(closing.channel)
    with closing.local.mining_stopped():
        redeemer = await closing.redeemer()
        task = asyncio.create_task(redeemer.redeem_due())
        await until(lambda: closing.local.waiting() == 1, task)
        closing.pass_seconds(CLOSE_WINDOW_SECONDS - 5)
        closing.local.mine()
        (done,) = await task
    assert done.amount == NEW and await closing.payee.balance() == before + NEW
    assert await close_alone(closing) == DEPOSIT - NEW
    record("F36", 1, "no block for 0.91 of the window, the redemption first sent in it: lost 0", "f reported")


async def test_closing_after_a_spike_hastens_what_was_sent_before_it_and_pays_in_full(closing: Closing) -> None:
    """The redemption waits in the pool at the price of an hour ago; the base fee is a hundred times that, and stays, when the payer asks to
    close. At the sender's usual bound it would wait there until the payer has taken everything back."""
    local, before = closing.local, await closing.payee.balance()
    redeemer, stop = await closing.redeemer(RedeemPolicy(margin_seconds=0)), asyncio.Event()
    with local.mining_stopped():
        task = asyncio.create_task(redeemer.run(stop))
        await until(lambda: local.waiting() == 1, task)
        (first,) = pending(closing)
        spike = 100 * first.max_fee
        mine_at(local, spike)
        asking = asyncio.create_task(closing.payer.request_close(closing.channel))
        while not asking.done():
            mine_at(local, spike)
            await asyncio.sleep(0.1)
        await asking
        redeemer.wake()  # the follower has seen it
        for _ in range(10):
            await asyncio.sleep(0.1)
            mine_at(local, spike)
        raised = max(t.max_fee for t in pending(closing) or [first])
        mine_at(local, 10**9)
    assert await closing.payee.balance() == before + NEW, f"the highest offer was {raised / first.max_fee:.0f} times the first"
    stop.set()
    await task
    assert await close_alone(closing) == DEPOSIT - NEW
    record("F36", 1, "base fee x100 from before the close request to the window's end, the redemption sent before it: lost 0", "f reported")


async def test_closing_hastens_no_further_than_what_it_brings(closing: Closing) -> None:
    """Above its value the offer stays where it was; where gas takes most of the value, it goes to the value and not to the market's usual
    two base fees."""
    local, before = closing.local, await closing.payee.balance()
    closing.payee.sender._stuck_seconds = 0.1
    redeemer = await closing.redeemer(RedeemPolicy(margin_seconds=0))
    with local.mining_stopped():
        task = asyncio.create_task(redeemer.redeem_due())
        await until(lambda: local.waiting() == 1, task)
        (first,) = pending(closing)
        worth = NEW * 10**15
        asking = asyncio.create_task(closing.payer.request_close(closing.channel))
        while not asking.done():
            mine_at(local, 20 * first.max_fee)
            await asyncio.sleep(0.1)
        await asking
        mine_at(local, 2 * worth // first.gas)
        await redeemer.hasten()
        await asyncio.sleep(0.5)
        assert max(t.max_fee for t in pending(closing)) <= 16 * first.max_fee
        mine_at(local, 3 * worth // (4 * first.gas))
        await until(lambda: max(t.max_fee for t in pending(closing)) > 16 * first.max_fee)
        await asyncio.sleep(0.5)
        assert max(t.max_fee * t.gas for t in pending(closing)) <= worth
        mine_at(local, 3 * worth // (4 * first.gas))
        await task
        mine_at(local, 10**9)
    assert await closing.payee.balance() == before + NEW


def pending(closing: Closing) -> list[outbox.Outgoing]:
    return closing.journal.read(lambda c: outbox.in_state(c, outbox.PENDING))


def mine_at(local: LocalChain, base_fee: int) -> None:
    """A block in which gas costs this much."""
    local.anvil.rpc("anvil_setNextBlockBaseFeePerGas", hex(base_fee))
    local.mine()


async def test_closing_payee_that_is_away_for_longer_loses_what_it_did_not_redeem(closing: Closing) -> None:
    """The other side of the promise: after the window the payer's close is good, and the late payee is told so."""
    await closing.payer.request_close(closing.channel)
    assert await close_alone(closing) == DEPOSIT
    assert await (await closing.redeemer()).redeem_due() == []
    with pytest.raises(TransactionFailed, match="UnknownChannel"):
        await closing.payee.redeem(closing.channel, NEW, closing.signatures[NEW])

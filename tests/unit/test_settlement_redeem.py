"""When to redeem, and that a redemption is counted once whatever dies in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from chain_proxy import ChainProxy, Lie
from settlement_chain import LocalChain, account, chain_journal, party, until

from gpumarket.core.errors import ChainError
from gpumarket.core.units import Address, Hash
from gpumarket.settlement import redeemer as redeemer_module
from gpumarket.settlement.chain import Actions, Chain, ChainView, Follower, Sender, connect
from gpumarket.settlement.channel import ReceivedChannel
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.redeem import REDEEM_GAS, RedeemPolicy, due
from gpumarket.settlement.redeemer import Redeemer, Redemption
from gpumarket.settlement.vouchers import sign_voucher

PAYER, PAYEE = account(5), account(6)
FAR = 4_000_000_000
NOW = 1_000_000
CHANNEL = ReceivedChannel(Hash(b"\1" * 32), Address(b"\2" * 20), 10**12, NOW + 10**6, voucher=10**9, signature=b"s" * 65)
POLICY = RedeemPolicy(gas_share_ppm=10_000, margin_seconds=3_600, exposure_limit=0)
CHEAP, DEAR = 10**9 / REDEEM_GAS / 200, 10**9 / REDEEM_GAS / 50
"""Value of a wei at which gas is 0.5 % and 2 % of the voucher."""


def ask(channel: ReceivedChannel, gas_value: float, *, policy: RedeemPolicy = POLICY, force: bool = False) -> str | None:
    return due(channel, gas_price=1, gas_value=gas_value, now=NOW, policy=policy, force=force)


def test_due_when_gas_is_a_small_share_and_not_before() -> None:
    assert ask(CHANNEL, CHEAP) == "gas-share"
    assert ask(CHANNEL, DEAR) is None


def test_due_when_the_channel_closes_or_expires_soon() -> None:
    assert ask(replace(CHANNEL, closing=NOW + 60), DEAR) == "closing"
    assert ask(replace(CHANNEL, expires_at=NOW + 3_600), DEAR) == "expiry"
    assert ask(replace(CHANNEL, expires_at=NOW + 3_601), DEAR) is None


def test_due_when_more_is_outstanding_than_may_be_lost() -> None:
    assert ask(CHANNEL, DEAR, policy=replace(POLICY, exposure_limit=10**9)) == "exposure"
    assert ask(CHANNEL, DEAR, policy=replace(POLICY, exposure_limit=10**9 + 1)) is None


def test_due_never_for_nothing_and_never_for_less_than_the_gas() -> None:
    ruinous = 10**9 / REDEEM_GAS
    assert ask(replace(CHANNEL, closing=NOW), ruinous) is None
    assert ask(CHANNEL, ruinous, force=True) == "forced"
    for empty in (replace(CHANNEL, redeemed=10**9), replace(CHANNEL, closed=True), replace(CHANNEL, signature=b"")):
        assert ask(empty, 0.0, force=True) is None


# --- on a chain ----------------------------------------------------------------------------------------------------------------


class FixedClock:
    def now(self) -> int:
        return NOW

    def monotonic(self) -> float:
        return 0.0


@dataclass
class Desk:
    """A payee with channels from one payer."""

    chain: Chain
    payer: Actions
    payee: Actions
    journal: Journal
    channels: dict[Hash, ReceivedChannel] = field(default_factory=dict)
    told: list[Redemption] = field(default_factory=list)

    def redeemer(self, **kwargs: object) -> Redeemer:
        return Redeemer(
            self.payee, self.journal, lambda: list(self.channels.values()), FixedClock(),
            payer_of=lambda _: PAYER.address, on_redeemed=self.paid, **kwargs,  # type: ignore[arg-type]
        )  # fmt: skip

    def paid(self, redemption: Redemption) -> None:
        self.told.append(redemption)

    async def channel(self, deposit: int, voucher: int) -> Hash:
        at = await self.payer.open_channel(PAYEE.address, deposit, FAR)
        signature = sign_voucher(PAYER, self.chain.channels_domain, at, voucher)
        self.channels[at] = ReceivedChannel(at, PAYER.address, deposit, FAR, voucher=voucher, signature=signature)
        return at

    async def follow(self) -> None:
        """What the follower would tell the channels."""
        view = ChainView()
        await Follower(self.chain, view).sync()
        for at, state in self.channels.items():
            self.channels[at] = replace(state, redeemed=view.channels[at].claimed, closed=view.channels[at].closed)


@pytest.fixture
async def desk(local: LocalChain, tmp_path: Path) -> AsyncIterator[Desk]:
    chain = await local.connect()
    mine, theirs = chain_journal(tmp_path / "payee.db"), chain_journal(tmp_path / "payer.db")
    made = Desk(chain, await party(chain, PAYER, theirs), await party(chain, PAYEE, mine), mine)
    yield made
    for actions in (made.payer, made.payee):
        await actions.sender.close()
    await mine.close()
    await theirs.close()
    await chain.close()


async def test_redeemer_pays_one_channel_directly_and_journals_it(desk: Desk) -> None:
    at, before = await desk.channel(1000, 600), await desk.payee.balance()
    (done,) = await desk.redeemer().redeem_now()
    assert (done.channel, done.payer, done.payee, done.amount) == (at, PAYER.address, PAYEE.address, 600)
    assert await desk.payee.balance() == before + 600
    assert 0 < done.gas <= REDEEM_GAS + 20_000
    assert desk.redeemer().done() == [done] == desk.told
    await desk.follow()
    assert await desk.redeemer().redeem_now() == []


async def test_redeemer_pays_many_in_one_batch_and_withdraws(desk: Desk) -> None:
    ids = {await desk.channel(1000, 100 + i) for i in range(4)}
    before = await desk.payee.balance()
    done = await desk.redeemer().redeem_now()
    assert {r.channel for r in done} == ids
    assert len({r.tx for r in done}) == 1
    assert await desk.payee.balance() == before + sum(100 + i for i in range(4))
    assert await desk.payee.credited() == 0
    assert sum(r.amount for r in desk.redeemer().done()) == 406


async def test_redeemer_batch_skips_a_bad_item_and_keeps_the_rest(desk: Desk) -> None:
    good, bad = await desk.channel(1000, 50), await desk.channel(1000, 70)
    desk.channels[bad] = replace(desk.channels[bad], signature=desk.channels[good].signature)
    done = await desk.redeemer().redeem_now()
    assert [r.channel for r in done] == [good]
    assert [r.channel for r in desk.redeemer().done()] == [good]


async def test_redeemer_by_policy_waits_until_it_is_worth_the_gas(desk: Desk) -> None:
    await desk.channel(10**6, 10**6)
    assert await desk.redeemer(gas_value=1.0).redeem_due() == []
    assert len(await desk.redeemer(gas_value=1e-12).redeem_due()) == 1


async def test_redeemer_higher_voucher_later_pays_the_difference(desk: Desk) -> None:
    at = await desk.channel(1000, 100)
    await desk.redeemer().redeem_now()
    await desk.follow()
    signature = sign_voucher(PAYER, desk.chain.channels_domain, at, 250)
    desk.channels[at] = replace(desk.channels[at], voucher=250, signature=signature)
    (second,) = await desk.redeemer().redeem_now()
    assert second.amount == 150
    assert sum(r.amount for r in desk.redeemer().done()) == 250


async def test_redeemer_that_died_after_sending_counts_the_redemption_once(desk: Desk) -> None:
    at = await desk.channel(1000, 300)
    state = desk.channels[at]
    plan = partial(redeemer_module._plan, channels=[state], payers={at: PAYER.address}, payee=PAYEE.address, now=NOW)
    await desk.journal.transact(plan)
    sent = await desk.payee.redeem(at, 300, state.signature)  # and here it died: nothing was written down
    (done,) = await desk.redeemer().redeem_now()
    assert (done.amount, done.tx, done.gas) == (300, sent.tx_hash, sent.gas_used)
    await desk.follow()
    assert await desk.redeemer().redeem_now() == []
    assert desk.redeemer().done() == [done]


async def test_redeemer_that_died_before_sending_simply_tries_again(desk: Desk) -> None:
    at = await desk.channel(1000, 300)
    plan = partial(redeemer_module._plan, channels=[desk.channels[at]], payers={at: PAYER.address}, payee=PAYEE.address, now=NOW)
    await desk.journal.transact(plan)
    assert [r.amount for r in await desk.redeemer().redeem_now()] == [300]
    assert len(desk.redeemer().done()) == 1


async def test_redeemer_withdraws_what_a_push_credited(desk: Desk) -> None:
    at = await desk.channel(1000, 10)
    await desk.payer.push([(at, 400)])
    await desk.follow()
    before = await desk.payee.balance()
    assert await desk.redeemer().redeem_now() == []
    assert await desk.payee.balance() == before + 400


class Killed(BaseException):
    """The process ends here."""


async def test_redeemer_that_died_between_batch_and_withdrawal_withdraws_by_itself(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks for it: the next look finds the credit, once it is worth the gas, and only once."""
    for amount in (300, 400):
        await desk.channel(1000, amount)
    before = await desk.payee.balance()

    async def die() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(desk.payee, "withdraw", die)
        with pytest.raises(Killed):
            await desk.redeemer(gas_value=1e-15).redeem_due()
    await desk.follow()
    assert (await desk.payee.credited(), await desk.payee.balance()) == (700, before)
    assert await desk.redeemer(gas_value=1e-6).redeem_due() != []  # written down from the chain's events; the gas is too dear
    assert await desk.payee.credited() == 700
    await desk.redeemer(gas_value=1e-15).redeem_due()
    assert (await desk.payee.credited(), await desk.payee.balance()) == (0, before + 700)


async def test_redeemer_withdrawal_that_is_on_its_way_is_not_sent_again(local: LocalChain, desk: Desk) -> None:
    at = await desk.channel(1000, 10)
    await desk.payer.push([(at, 400)])
    await desk.follow()
    with local.mining_stopped():
        first = asyncio.create_task(desk.redeemer(gas_value=1e-15).redeem_due())
        await until(lambda: local.waiting() == 1, first)
        assert await desk.redeemer().redeem_now() == []
        assert local.waiting() == 1
    await first
    assert await desk.payee.credited() == 0


# --- when the chain takes back, lies or lags -------------------------------------------------------------------------------------


async def test_redeemer_reorganisation_before_the_confirmations_redeems_again_and_counts_once(local: LocalChain, desk: Desk) -> None:
    """Confirmed two blocks deep; the first block that held it is taken back. Without the wait it would have counted as paid for ever."""
    deep = await local.connect(confirmations=2)
    actions = Actions(deep, Sender(deep, PAYEE, desk.journal))
    at, before = await desk.channel(1000, 700), await desk.payee.balance()
    desk.payee = actions
    task = asyncio.create_task(desk.redeemer().redeem_now())
    await until(lambda: redeemed_on_chain(local, desk, at) == 700, task)
    local.anvil.rpc("anvil_reorg", 1, [])
    assert not desk.redeemer().done()
    while not task.done():
        local.mine()
        await asyncio.sleep(0.02)
    (done,) = await task
    assert (done.amount, await actions.balance()) == (700, before + 700)
    assert redeemed_on_chain(local, desk, at) == 700 and desk.redeemer().done() == [done]
    await actions.sender.close()
    await deep.close()


def redeemed_on_chain(local: LocalChain, desk: Desk, channel: Hash) -> int:
    data = desk.chain.channels.encode_abi("channel", args=[channel])
    found = local.anvil.rpc("eth_call", {"to": desk.chain.channels.address, "data": data}, "latest")
    return int(found[2 + 3 * 64 : 2 + 4 * 64], 16)


async def test_redeemer_what_is_on_its_way_is_not_sent_again(local: LocalChain, desk: Desk) -> None:
    at = await desk.channel(1000, 300)
    state = desk.channels[at]
    with local.mining_stopped():
        first = asyncio.create_task(desk.payee.redeem(at, 300, state.signature))
        await until(lambda: local.waiting() == 1, first)
        first.cancel()  # who asked for it is gone; the transaction is not
        assert await desk.redeemer().redeem_now() == []
        assert local.waiting() == 1
    await asyncio.gather(first, return_exceptions=True)
    await until(lambda: not desk.payee.sender.pending_calls())
    assert redeemed_on_chain(local, desk, at) == 300


async def test_redeemer_close_that_the_view_missed_is_read_from_the_contract(local: LocalChain, desk: Desk) -> None:
    at = await desk.channel(10**6, 10**6)
    dear = RedeemPolicy(gas_share_ppm=0, margin_seconds=0)
    assert await desk.redeemer(policy=dear, gas_value=1e-12).redeem_due() == []
    await desk.payer.request_close(at)
    assert desk.channels[at].closing == 0
    (done,) = await desk.redeemer(policy=dear, gas_value=1e-12).redeem_due()
    assert done.amount == 10**6


async def test_redeemer_plan_that_another_amount_overtook_is_forgotten(desk: Desk) -> None:
    at = await desk.channel(1000, 300)
    plan = partial(redeemer_module._plan, channels=[desk.channels[at]], payers={at: PAYER.address}, payee=PAYEE.address, now=NOW)
    await desk.journal.transact(plan)
    await desk.payer.push([(at, 400)])
    await desk.follow()
    await desk.redeemer().redeem_now()
    assert desk.journal.read(redeemer_module._planned) == [] and desk.redeemer().done() == []


async def test_redeemer_false_receipt_is_not_taken_for_money(local: LocalChain, desk: Desk) -> None:
    """The endpoint shows the receipt of a payment that never happened: the real transaction is withheld from the chain."""
    with ChainProxy(local.anvil.url) as proxy:
        lied = await connect(local.settings().model_copy(update={"rpc_url": proxy.url}))
        actions = Actions(lied, Sender(lied, PAYEE, desk.journal, stuck_seconds=3600))
        at = await desk.channel(1000, 450)
        template = await desk.payee.redeem(await desk.channel(1000, 450), 450, desk.channels[list(desk.channels)[-1]].signature)
        desk.payee, truth = actions, template
        del desk.channels[list(desk.channels)[-1]]
        before, sent = await actions.balance(), proxy.calls
        proxy.lie("eth_getTransactionCount", lambda params, count: hex(int(count, 16) + (1 if sent["eth_sendRawTransaction"] else 0)))
        proxy.lie("eth_getTransactionReceipt", forged(local, desk, at, truth.tx_hash))
        with local.mining_stopped():
            task = asyncio.create_task(desk.redeemer().redeem_now())
            with pytest.raises(ChainError, match="the contract says 0"):
                await task
            assert desk.redeemer().done() == [] and redeemed_on_chain(local, desk, at) == 0
            proxy.honest()
        await until(lambda: redeemed_on_chain(local, desk, at) == 450)
        await until(lambda: not actions.sender.pending_calls())
        (done,) = await desk.redeemer().redeem_now()  # completed from the chain's own events
        assert done.amount == 450 and await actions.balance() == before + 450
        await actions.sender.close()
        await lied.close()


def forged(local: LocalChain, desk: Desk, channel: Hash, model: Hash) -> Lie:
    """The true receipt of another redemption, dressed up as the one that is asked for."""

    def lie(params: list[Any], answer: Any) -> Any:
        real = local.anvil.rpc("eth_getTransactionReceipt", "0x" + model.hex())
        logs = [{**log, "topics": [log["topics"][0], "0x" + channel.hex(), *log["topics"][2:]]} for log in real["logs"]]
        return {**real, "transactionHash": params[0], "logs": logs}

    return lie

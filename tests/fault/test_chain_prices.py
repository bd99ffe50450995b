"""What gas costs, and how long it holds things up: a transaction that lies too cheap in the pool is helped (F34), a redemption waits while
gas is dear, but never past its channel's end (F35). On a chain, with the base fee and the time moved by hand.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from reliability import record
from settlement_chain import CLOSE_WINDOW_SECONDS, LocalChain, account, chain_journal, party, until

from gpumarket.core.units import Hash
from gpumarket.settlement.chain import Actions, Chain, Sender, outbox
from gpumarket.settlement.channel import ReceivedChannel
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.redeem import REDEEM_GAS, RedeemPolicy
from gpumarket.settlement.redeemer import Redeemer, Redemption
from gpumarket.settlement.vouchers import sign_voucher

PAYER, PAYEE = account(7), account(8)
FAR = 4_000_000_000
GWEI = 10**9
STUCK_SECONDS, UNSTUCK_SECONDS = 1.0, 8.0
"""When a fee is raised here, and how soon after the trouble the transaction must be in a block."""
GAS_VALUE = 1e-9
"""What a wei is worth here, in base units of the token."""
WORTH = int(REDEEM_GAS * 2 * GWEI * GAS_VALUE * 200)
"""A voucher of which one redemption costs half a percent at 2 gwei, and so half of it at a hundred times that."""
SPIKE = 100


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    opened = chain_journal(tmp_path / "payee.db")
    yield opened
    await opened.close()


@asynccontextmanager
async def blocks_at(local: LocalChain, base_fee: int) -> AsyncIterator[None]:
    """Blocks go on, each with this base fee: an empty one would lower it."""

    async def mine() -> None:
        while True:
            local.anvil.rpc("anvil_setNextBlockBaseFeePerGas", hex(base_fee))
            local.mine()
            await asyncio.sleep(0.05)

    task = asyncio.create_task(mine())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        local.anvil.rpc("anvil_setNextBlockBaseFeePerGas", hex(GWEI))
        local.mine()


# --- stuck -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["too cheap", "forgotten"])
async def test_price_transaction_that_is_stuck_is_mined_soon_after_its_fee_may_be_raised(
    local: LocalChain, chain: Chain, journal: Journal, trouble: str
) -> None:
    sender = Sender(chain, account(3), journal, stuck_seconds=STUCK_SECONDS)
    faucet = chain.token.functions.faucet(chain.w3.to_checksum_address(account(3).address))
    with local.mining_stopped():
        task = asyncio.create_task(sender.send(trouble, faucet))
        await until(lambda: local.waiting() == 1, task)
        (first,) = journal.read(lambda c: outbox.in_state(c, outbox.PENDING))
        if trouble == "forgotten":
            local.anvil.rpc("anvil_dropAllTransactions")
        async with blocks_at(local, GWEI if trouble == "forgotten" else 3 * first.max_fee):
            started = time.monotonic()
            receipt = await task
            took = time.monotonic() - started
    offers = journal.read(lambda c: outbox.ever_at_nonce(c, first.nonce))
    assert receipt.tx_hash in {offer.tx_hash for offer in offers}
    assert took < UNSTUCK_SECONDS
    assert len(offers) <= 3, "the first replacement goes to the market's price: there is nothing to creep up to"
    await sender.close()
    figure = f"{trouble}: in a block {took:.1f} s after the trouble began, fees are raised after {STUCK_SECONDS:.0f} s; sent twice 0"
    record("F34", 1, figure, f"time to unstick {UNSTUCK_SECONDS:.0f} s; double spends 0")


# --- dear ------------------------------------------------------------------------------------------------------------------------


class Dear:
    """A payee with a voucher, on a chain whose gas has a price."""

    def __init__(self, local: LocalChain, payer: Actions, payee: Actions, journal: Journal, channel: Hash, signature: bytes) -> None:
        self.local, self.payer, self.payee, self.journal = local, payer, payee, journal
        self._state = ReceivedChannel(channel, PAYER.address, 2 * WORTH, FAR, voucher=WORTH, signature=signature, used=WORTH)

    @property
    def channel(self) -> Hash:
        return self._state.id

    def monotonic(self) -> float:
        return float(self.local.now())

    def now(self) -> int:
        return self.local.now()

    async def redeem_due(self, worth: int = WORTH) -> list[Redemption]:
        """What the redeemer does at one look."""
        state = replace(self._state, voucher=worth, used=worth)
        redeemer = Redeemer(
            self.payee, self.journal, lambda: [state], self, payer_of=lambda _: PAYER.address, policy=RedeemPolicy(), gas_value=GAS_VALUE
        )
        return await redeemer.redeem_due()

    def fee_share(self, done: Redemption) -> float:
        """What the redemption's gas was worth, of what it brought."""
        receipt = self.local.anvil.rpc("eth_getTransactionReceipt", "0x" + done.tx.hex())
        return int(receipt["gasUsed"], 16) * int(receipt["effectiveGasPrice"], 16) * GAS_VALUE / done.amount

    def base_fee(self, wei: int) -> None:
        self.local.anvil.rpc("anvil_setNextBlockBaseFeePerGas", hex(wei))
        self.local.mine()


@pytest.fixture
async def dear(local: LocalChain, chain: Chain, journal: Journal, tmp_path: Path) -> AsyncIterator[Dear]:
    theirs = chain_journal(tmp_path / "payer.db")
    payer, payee = await party(chain, PAYER, theirs), await party(chain, PAYEE, journal)
    channel = await payer.open_channel(PAYEE.address, 2 * WORTH, FAR)
    yield Dear(local, payer, payee, journal, channel, sign_voucher(PAYER, chain.channels_domain, channel, WORTH))
    for actions in (payer, payee):
        await actions.sender.close()
    await theirs.close()


async def test_price_redemption_at_usual_gas_costs_at_most_its_share(dear: Dear) -> None:
    dear.base_fee(GWEI)
    (done,) = await dear.redeem_due()
    share = dear.fee_share(done)
    assert done.amount == WORTH
    assert share <= 0.01
    record("F35", 1, f"usual gas: fee/paid {share:.2%}", "fee/paid <= 1 % unless the channel ends")


async def test_price_spike_postpones_a_redemption_until_its_channel_closes_and_then_it_is_in_time(dear: Dear) -> None:
    before = await dear.payee.balance()
    dear.base_fee(SPIKE * GWEI)
    assert await dear.redeem_due() == [], "gas would take half of it, and nothing hurries"
    async with blocks_at(dear.local, SPIKE * GWEI):
        await dear.payer.request_close(dear.channel)
        ends = dear.local.now() + CLOSE_WINDOW_SECONDS
        (done,) = await dear.redeem_due()
        assert dear.local.now() < ends
    share = dear.fee_share(done)
    assert await dear.payee.balance() == before + WORTH
    assert 0.01 < share < 1.0
    record(
        "F35", 1, f"base fee x{SPIKE}: postponed, then redeemed in the close window: fee/paid {share:.0%}, deadlines missed 0", "0 missed"
    )


async def test_price_voucher_that_its_gas_would_eat_is_left_even_at_the_close(dear: Dear) -> None:
    dear.base_fee(SPIKE * GWEI)
    await dear.payer.request_close(dear.channel)
    dear.base_fee(SPIKE * GWEI)
    assert await dear.redeem_due(worth=WORTH // 10) == []
    dear.base_fee(GWEI)
    record("F35", 1, f"base fee x{SPIKE}: a voucher worth less than its gas is left: fee/paid never above 100 %", "never above 100 %")

"""A scheduler whose ledger is an older copy, or which is not alone with its key: never a voucher below what is out (F05, F11, I3)."""

from __future__ import annotations

import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import pytest
from reliability import record
from scheduler_world import (
    CHANNELS,
    PRICE,
    SCHEDULER,
    TOKEN,
    Bought,
    HandChain,
    HandClock,
    ScriptedClient,
    ScriptedProvider,
    claim_call,
    deliver,
    key,
    running,
)

from gpumarket.core.codec import voucher_proto
from gpumarket.core.daemon import StateFolder
from gpumarket.core.errors import GpumarketError, StateLocked
from gpumarket.core.rpc import from_rpc
from gpumarket.core.terms import Voucher
from gpumarket.core.units import Hash, Money, money_from_bytes
from gpumarket.scheduler.market import Market
from gpumarket.settlement.chain.view import ChannelOnChain
from gpumarket.settlement.vouchers import sign_voucher
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import terms_pb2 as terms

UNIT = PRICE // 1_000_000
JOB = 6 * UNIT
ROWS = [struct.pack("<2f", i, 1.0) for i in range(3)]


@dataclass
class Stall:
    """One provider and one client of a scheduler, and every voucher that the provider ever got."""

    folder: Path
    clock: HandClock = field(default_factory=HandClock)
    vouchers: list[int] = field(default_factory=list)
    newest: terms.SignedVoucher | None = None

    def __post_init__(self) -> None:
        self.chain = HandChain(SCHEDULER.address, self.clock)
        self.client = ScriptedClient("client", self.chain.hub(key("client")), self.clock)
        self.provider = ScriptedProvider("p1", self.folder)

    @property
    def state(self) -> Path:
        return self.folder / "scheduler"

    async def come(self, market: Market) -> None:
        await self.client.connect(market)
        await self.provider.start(self.chain)
        self.provider.held = [self.newest] if self.newest is not None else []
        await self.provider.ready(market, self.clock)

    async def buy(self, *, will_check: bool = False) -> tuple[Bought, terms.SignedAck]:
        job = self.client.job()
        assert (await self.client.match(job, pay=TOKEN)).HasField("granted")
        deliver(self.provider.key, job, ROWS)
        return job, self.client.ack(job, 6, complete=True, will_check=will_check)

    async def claim(self, job: Bought, ack: terms.SignedAck) -> pb.ClaimReply:
        reply: pb.ClaimReply = await self.client.stub.Claim(claim_call(self.provider.key, self.clock, job, ack, self.newest))
        self.got(reply.voucher)
        return reply

    def got(self, voucher: terms.SignedVoucher) -> None:
        self.vouchers.append(money_from_bytes(voucher.voucher.cumulative))
        if self.newest is None or self.vouchers[-1] > money_from_bytes(self.newest.voucher.cumulative):
            self.newest = voucher

    async def leave(self) -> None:
        await self.provider.stop()
        await self.client.close()

    def back_up(self) -> Path:
        return Path(shutil.copy2(self.state / "ledger.db", self.folder / "backup.db"))

    def restore(self, backup: Path) -> None:
        """Put the old copy back, by hand, with the seal removed as the refusal says."""
        for file in self.state.glob("ledger.db*"):
            file.unlink()
        shutil.copy2(backup, self.state / "ledger.db")


@pytest.fixture
def stall(tmp_path: Path) -> Stall:
    return Stall(tmp_path)


async def paid_three_times_with_a_backup_after_the_first(stall: Stall) -> tuple[Path, Bought, terms.SignedAck]:
    """The second job is held in the backup, and owed in the life that goes on after it."""
    async with running(stall.state, stall.chain, stall.clock) as market:
        await stall.come(market)
        await stall.claim(*await stall.buy())
        held = await stall.buy(will_check=True)
        await stall.claim(*held)
        await stall.leave()
    backup = stall.back_up()
    async with running(stall.state, stall.chain, stall.clock) as market:
        await stall.come(market)
        await stall.client.report(held[0], pb.VERDICT_ACCEPTED)
        await stall.claim(*held)
        await stall.claim(*await stall.buy())
        await stall.leave()
    assert stall.vouchers[-1] == 3 * JOB
    return backup, *held


async def test_restored_ledger_hears_its_provider_before_it_signs(stall: Stall) -> None:
    backup, *_ = await paid_three_times_with_a_backup_after_the_first(stall)
    stall.restore(backup)
    async with running(stall.state, stall.chain, stall.clock) as market:
        await stall.come(market)
        await stall.claim(*await stall.buy())
        assert stall.vouchers[-1] == 4 * JOB, "on top of what was signed before the backup was brought back"
        await stall.leave()
    assert stall.vouchers == sorted(stall.vouchers), "none was lower than one before it"
    record("F11", 1, "scheduler's ledger restored from a backup: vouchers signed below an earlier one 0", "0 (I3)")


async def test_restored_ledger_signs_nothing_for_what_falls_due_before_its_provider_is_heard(stall: Stall) -> None:
    backup, *_ = await paid_three_times_with_a_backup_after_the_first(stall)
    stall.restore(backup)
    async with running(stall.state, stall.chain, stall.clock) as market:
        stall.clock.pass_seconds(1_000)  # the held job is owed by now
        await market.billing.tick()
        (channel,) = market.ledger.spokes
        assert market.ledger.spokes[channel].state.vouchered == 2 * JOB, "owed"
        assert market.ledger.voucher(channel)[0] == JOB, "and not signed: a provider may hold more"
        assert stall.newest is not None
        market.greeter.holdings.told(stall.provider.address, [stall.newest])
        await market.ledger.commit()
        assert market.ledger.voucher(channel)[0] == 3 * JOB, "what the provider proved covers it"


async def test_restored_ledger_takes_over_what_the_chain_has_paid(stall: Stall) -> None:
    backup, *_ = await paid_three_times_with_a_backup_after_the_first(stall)
    stall.restore(backup)
    (old,) = (c for c in stall.chain.view.channels.values() if c.payee == stall.provider.address)
    stall.chain.put_channel(ChannelOnChain(old.id, old.payer, old.payee, old.signer, old.deposit, 3 * JOB, old.expires_at))
    async with running(stall.state, stall.chain, stall.clock) as market:
        assert market.ledger.spokes[old.id].state.vouchered == 3 * JOB
        assert market.ledger.voucher(old.id)[0] == JOB, "still unsigned until the provider is heard"


async def test_held_voucher_that_another_key_signed_is_refused(stall: Stall) -> None:
    async with running(stall.state, stall.chain, stall.clock) as market:
        await stall.come(market)
        await stall.claim(*await stall.buy())
        job, ack = await stall.buy()
        assert job.lease is not None
        channel = job.lease.provider_channel
        forged = sign_voucher(key("somebody"), CHANNELS, channel, 9 * JOB)
        stall.newest = voucher_proto(Voucher(channel, Money(9 * JOB)), forged)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stall.claim(job, ack)
        assert "not this scheduler's" in from_rpc(caught.value, "it").message
        assert market.ledger.failure is None
        await stall.leave()


async def test_second_scheduler_with_the_key_stops_when_it_sees_the_firsts_vouchers(stall: Stall) -> None:
    """Two processes on copies of one folder: whoever is shown a voucher that it never signed stops before it signs one more."""
    backup, *_ = await paid_three_times_with_a_backup_after_the_first(stall)
    newest, stall.newest = stall.newest, None
    stall.restore(backup)
    async with running(stall.state, stall.chain, stall.clock) as market:
        await stall.come(market)  # its provider says that it holds nothing: the ledger is believed
        job, ack = await stall.buy()
        stall.newest, before = newest, list(stall.vouchers)
        with pytest.raises(grpc.aio.AioRpcError):
            await stall.claim(job, ack)
        assert stall.vouchers == before
        assert market.ledger.failure is not None and "another process signs with this key" in market.ledger.failure.message
        with pytest.raises(GpumarketError):
            await market.ledger.commit()
        await stall.leave()
    record("F05", 1, "two schedulers on copies of one ledger: the second stops at the first foreign voucher, double signatures 0", "0")


async def test_older_ledger_than_its_deposit_allows_stops(stall: Stall) -> None:
    backup, *_ = await paid_three_times_with_a_backup_after_the_first(stall)
    stall.restore(backup)
    async with running(stall.state, stall.chain, stall.clock) as market:
        (spoke,) = market.ledger.spokes.values()
        most = spoke.state.deposit
        voucher = voucher_proto(Voucher(spoke.state.id, Money(most)), sign_voucher(SCHEDULER, CHANNELS, spoke.state.id, most))
        with pytest.raises(GpumarketError, match="too old"):
            market.greeter.holdings.told(stall.provider.address, [voucher])
        assert market.ledger.voucher(Hash(spoke.state.id))[0] == JOB


def test_second_daemon_on_one_state_folder_is_refused(tmp_path: Path) -> None:
    with StateFolder(tmp_path / "state"), pytest.raises(StateLocked, match="another process"), StateFolder(tmp_path / "state"):
        pass
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0

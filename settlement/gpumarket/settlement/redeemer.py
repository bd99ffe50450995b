"""Turns vouchers into tokens: asks the policy, sends the transactions, journals what came of them.

A redemption is written down as planned before it is sent and completed from the chain's own event, so one that a crash interrupts is
completed at the next start and never counted twice. One channel is redeemed alone and paid directly; several go in one batch, whose credit
is withdrawn after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import structlog
from sqlalchemy import Column, Connection, Integer, LargeBinary, MetaData, Table, column, delete, insert, select, table, update

from gpumarket.core.errors import ChainError, NetworkError
from gpumarket.core.ports import Clock
from gpumarket.core.units import Address, Hash, Money, hex0x
from gpumarket.settlement.chain import Actions, TransactionReceipt
from gpumarket.settlement.chain.connection import reachable
from gpumarket.settlement.channel import ReceivedChannel
from gpumarket.settlement.journal import Journal, MoneyType
from gpumarket.settlement.redeem import REDEEM_GAS, RedeemPolicy, due

BATCH_MAX = 100
_BATCHED_GAS = 25_000
_NAME = "redemptions"
_redemptions = table(
    _NAME,
    column("channel", LargeBinary(32)),
    column("cumulative", MoneyType()),
    column("payer", LargeBinary(20)),
    column("payee", LargeBinary(20)),
    column("amount", MoneyType()),
    column("tx", LargeBinary(32)),
    column("gas", Integer),
    column("at", Integer),
)
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Redemption:
    """Money that arrived. `amount` in base units; `gas` is this channel's share of what the transactions used."""

    channel: Hash
    payer: Address
    payee: Address
    amount: Money
    tx: Hash
    gas: int


class ChannelSource(Protocol):
    """Where the redeemer finds the channels whose payee we are, with their newest vouchers."""

    def __call__(self) -> Iterable[ReceivedChannel]: ...


def redemption_table(metadata: MetaData) -> Table:
    """The table in a journal's metadata; calling it twice gives the same table. A row without `tx` is planned, not done."""
    if _NAME in metadata.tables:
        return metadata.tables[_NAME]
    return Table(
        _NAME,
        metadata,
        Column("channel", LargeBinary(32), primary_key=True),
        Column("cumulative", MoneyType(), primary_key=True),
        Column("payer", LargeBinary(20), nullable=False),
        Column("payee", LargeBinary(20), nullable=False),
        Column("amount", MoneyType()),
        Column("tx", LargeBinary(32)),
        Column("gas", Integer),
        Column("at", Integer, nullable=False),
    )


class Redeemer:
    """`redeem_now()` at any time; `run(stop)` asks the policy every `every_seconds`.

    `payer_of` tells a channel's payer (the chain view knows). `on_redeemed` is called for each channel after it was journaled.
    """

    def __init__(
        self,
        actions: Actions,
        journal: Journal,
        source: ChannelSource,
        clock: Clock,
        *,
        payer_of: Callable[[Hash], Address],
        policy: RedeemPolicy | None = None,
        gas_value: float = 1.0,
        every_seconds: float = 60.0,
        on_redeemed: Callable[[Redemption], None] | None = None,
    ) -> None:
        self._actions, self._journal, self._source, self._clock = actions, journal, source, clock
        self._payer_of, self._policy, self._gas_value = payer_of, policy or RedeemPolicy(), gas_value
        self._every_seconds, self._on_redeemed = every_seconds, on_redeemed
        self._lock = asyncio.Lock()

    async def run(self, stop: asyncio.Event) -> None:
        """Redeem what is due until `stop`. A chain that fails is logged and tried again."""
        while not stop.is_set():
            try:
                await self.redeem_due()
            except NetworkError as error:
                _log.warning("redeem_failed", reason=error.message, hint=error.hint)
            try:
                await asyncio.wait_for(stop.wait(), self._every_seconds)
            except TimeoutError:
                continue

    async def redeem_now(self) -> list[Redemption]:
        """Redeem everything that can be, whatever the gas."""
        return await self._redeem(force=True)

    async def redeem_due(self) -> list[Redemption]:
        """Redeem what the policy finds due."""
        return await self._redeem(force=False)

    def done(self) -> list[Redemption]:
        """Every redemption in the journal."""
        return self._journal.read(_done)

    async def _redeem(self, *, force: bool) -> list[Redemption]:
        async with self._lock:
            done = await self._recover()
            recovered = {redemption.channel for redemption in done}
            chosen = [c for c in await self._choose(force) if c.id not in recovered]
            for start in range(0, len(chosen), BATCH_MAX):
                done += await self._redeem_batch(chosen[start : start + BATCH_MAX])
            if force and await self._actions.credited():  # by a payer's push, or a batch that a crash cut off before its withdrawal
                await self._actions.withdraw()
        return done

    async def _recover(self) -> list[Redemption]:
        """Complete what was sent but not written down, from the chain's events. What is still planned then is simply tried again."""
        planned = self._journal.read(_planned)
        if not planned:
            return []
        with reachable(self._actions.chain.settings.rpc_url):
            logs = await self._actions.chain.channels.events.Redeemed().get_logs(
                from_block=self._actions.chain.book.deployed_block, argument_filters={"id": sorted({row.channel for row in planned})}
            )
        seen: dict[tuple[bytes, int], Any] = {(bytes(log["args"]["id"]), int(log["args"]["cumulative"])): log for log in logs}
        found = []
        for row in planned:
            log = seen.get((row.channel, row.cumulative))
            if log is not None:
                gas, amount = await self._gas_used(log["transactionHash"]), Money(int(log["args"]["amount"]))
                tx = Hash(bytes(log["transactionHash"]))
                found.append((row.cumulative, Redemption(Hash(row.channel), Address(row.payer), Address(row.payee), amount, tx, gas)))
        return await self._write_down(found)

    async def _choose(self, force: bool) -> list[ReceivedChannel]:
        channels = [c for c in self._source() if c.redeemable]
        if not channels:
            return []
        with reachable(self._actions.chain.settings.rpc_url):
            gas_price = int(await self._actions.chain.w3.eth.gas_price)
        gas = REDEEM_GAS if len(channels) == 1 else _BATCHED_GAS + REDEEM_GAS // len(channels)
        now, chosen = self._clock.now(), []
        for channel in channels:
            reason = due(channel, gas_price=gas_price, gas_value=self._gas_value, now=now, policy=self._policy, gas=gas, force=force)
            if reason:
                _log.info("redeeming", channel=hex0x(channel.id), amount=channel.redeemable, reason=reason)
                chosen.append(channel)
        return chosen

    async def _redeem_batch(self, channels: Sequence[ReceivedChannel]) -> list[Redemption]:
        payers = {c.id: self._payer_of(c.id) for c in channels}
        payee, now = self._actions.sender.address, self._clock.now()
        await self._journal.transact(partial(_plan, channels=channels, payers=payers, payee=payee, now=now))
        if len(channels) == 1:
            (only,) = channels
            receipt = await self._actions.redeem(only.id, only.voucher, only.signature)
            gas = receipt.gas_used
        else:
            receipt = await self._actions.redeem_many([(c.id, c.voucher, c.signature) for c in channels])
            gas = receipt.gas_used + await self._withdraw()
        self._report_skipped(receipt)
        paid = self._actions.redeemed(receipt)
        share = gas // max(1, len(paid))
        return await self._write_down(
            [
                (c.voucher, Redemption(c.id, payers[c.id], payee, Money(paid[c.id]), receipt.tx_hash, share))
                for c in channels
                if c.id in paid
            ]
        )

    async def _write_down(self, found: list[tuple[int, Redemption]]) -> list[Redemption]:
        """Journal redemptions, each with the cumulative amount of its voucher, then tell."""
        if found:
            await self._journal.transact(partial(_complete, found=found))
        for _, redemption in found:
            if self._on_redeemed is not None:
                self._on_redeemed(redemption)
        return [redemption for _, redemption in found]

    async def _withdraw(self) -> int:
        """Gas of paying the batch's credit out; 0 when there is none (every item was skipped)."""
        if not await self._actions.credited():
            return 0
        return (await self._actions.withdraw()).gas_used

    async def _gas_used(self, tx_hash: Any) -> int:
        from web3.exceptions import TransactionNotFound

        try:
            with reachable(self._actions.chain.settings.rpc_url):
                return int((await self._actions.chain.w3.eth.get_transaction_receipt(tx_hash))["gasUsed"])
        except TransactionNotFound as error:
            raise ChainError("the chain moved while redemptions were read back from it", hint="try again") from error

    def _report_skipped(self, receipt: TransactionReceipt) -> None:
        for channel in self._actions.skipped(receipt):
            _log.warning("redemption_skipped", channel=hex0x(channel), reason="the contract left it out: redeemed, closed, or not covered")


def _plan(connection: Connection, channels: Sequence[ReceivedChannel], payers: dict[Hash, Address], payee: Address, now: int) -> None:
    for channel in channels:
        key = (_redemptions.c.channel == channel.id) & (_redemptions.c.cumulative == channel.voucher)
        if connection.execute(select(_redemptions.c.at).where(key)).one_or_none() is None:  # else planned before, and tried again now
            values = {"channel": channel.id, "cumulative": channel.voucher, "payer": payers[channel.id], "payee": payee, "at": now}
            connection.execute(insert(_redemptions).values(values))


def _complete(connection: Connection, found: Sequence[tuple[int, Redemption]]) -> None:
    """Fill the planned rows that were paid; plans for lower vouchers of the same channels are obsolete with them."""
    for cumulative, redemption in found:
        of_channel = _redemptions.c.channel == redemption.channel
        row = of_channel & (_redemptions.c.cumulative == cumulative)
        connection.execute(update(_redemptions).where(row).values(amount=redemption.amount, tx=redemption.tx, gas=redemption.gas))
        lower = of_channel & _redemptions.c.tx.is_(None) & (_redemptions.c.cumulative < cumulative)
        connection.execute(delete(_redemptions).where(lower))


def _planned(connection: Connection) -> list[Any]:
    return list(connection.execute(select(_redemptions).where(_redemptions.c.tx.is_(None))))


def _done(connection: Connection) -> list[Redemption]:
    rows = connection.execute(
        select(_redemptions).where(_redemptions.c.tx.is_not(None)).order_by(_redemptions.c.at, _redemptions.c.channel)
    )
    return [Redemption(Hash(r.channel), Address(r.payer), Address(r.payee), r.amount, Hash(r.tx), r.gas) for r in rows]

"""Turns vouchers into tokens: asks the policy, sends the transactions, journals what came of them.

A redemption is written down as planned before it is sent, and as done once it has its confirmations and the contract's own state says so:
a crash, a reorganisation or a false receipt never makes a voucher look paid. What is on its way is not sent again. One channel is redeemed
alone and paid directly; several go in one batch, whose credit is withdrawn after it. What is on its way when its channel begins to close,
or to expire, may cost all that it brings: after that it brings nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import structlog
from sqlalchemy import BigInteger, Column, Connection, LargeBinary, MetaData, Table, column, delete, insert, select, table, update

from gpumarket.core.errors import NetworkError
from gpumarket.core.ports import Clock
from gpumarket.core.units import Address, Hash, Money, hex0x
from gpumarket.settlement.chain import Actions, TransactionReceipt
from gpumarket.settlement.chain.claims import Claims
from gpumarket.settlement.channel import ReceivedChannel
from gpumarket.settlement.journal import Journal, MoneyType
from gpumarket.settlement.redeem import REDEEM_GAS, RedeemPolicy, due, withdrawal_due, worth

BATCH_MAX = 100
LOOKS = 32
"""Channels per round whose state is read from the contract itself, in turn: a close that the view missed must not pass unseen."""
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
    column("gas", BigInteger),
    column("at", BigInteger),
)
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Redemption:
    """Money that arrived. `amount` came with it, `cumulative` is all that the channel has paid, in base units; `gas` is this channel's
    share of what the transactions used."""

    channel: Hash
    payer: Address
    payee: Address
    amount: Money
    cumulative: Money
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
        Column("gas", BigInteger),
        Column("at", BigInteger, nullable=False),
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
        self._claims = Claims(actions)
        self._lock = asyncio.Lock()
        self._awake = asyncio.Event(), asyncio.Event()
        self._turn = 0
        self.count = self.failures = 0
        """Redemptions that this process brought in, and rounds that the chain let down."""

    def wake(self) -> None:
        """Look now: something has happened that may not wait (a channel is closing)."""
        for awake in self._awake:
            awake.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Redeem what is due until `stop`, and beside it hasten what is on its way: its caller waits for it meanwhile. A chain that fails
        is logged and tried again."""
        works = (self.redeem_due, self.hasten)
        tasks = [asyncio.create_task(self._keep(stop, work, awake)) for work, awake in zip(works, self._awake, strict=True)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def redeem_now(self) -> list[Redemption]:
        """Redeem everything that can be, whatever the gas."""
        return await self._redeem(force=True)

    async def redeem_due(self) -> list[Redemption]:
        """Redeem what the policy finds due."""
        return await self._redeem(force=False)

    async def hasten(self) -> None:
        """Let redemptions that are on their way cost up to what they bring, where their channel is closing or about to expire."""
        worth_of = {}
        for row in self._journal.read(_planned):
            channel = Hash(row.channel)
            state = await self._claims.state(channel) if self._claims.in_flight(channel) else None
            if state is not None:
                amount, ends = row.cumulative - state.claimed, {"closes_at": state.closes_at, "expires_at": state.expires_at}
                worth_of[channel, row.cumulative] = worth(
                    amount, **ends, gas_value=self._gas_value, now=self._clock.now(), policy=self._policy
                )
        await self._claims.hasten(worth_of)

    def done(self) -> list[Redemption]:
        """Every redemption in the journal."""
        return self._journal.read(_done)

    async def _keep(self, stop: asyncio.Event, work: Callable[[], Awaitable[object]], awake: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                await work()
            except NetworkError as error:
                self.failures += 1
                _log.warning("redeem_failed", reason=error.message, hint=error.hint)
            waits = [asyncio.ensure_future(event.wait()) for event in (stop, awake)]
            await asyncio.wait(waits, timeout=self._every_seconds, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            awake.clear()

    async def _redeem(self, *, force: bool) -> list[Redemption]:
        async with self._lock:
            await self._claims.resume()
            done = await self._recover()
            recovered = {redemption.channel for redemption in done}
            chosen = [c for c in await self._choose(force) if c.id not in recovered]
            for start in range(0, len(chosen), BATCH_MAX):
                done += await self._redeem_batch(chosen[start : start + BATCH_MAX])
            if await self._left_over(force):
                await self._actions.withdraw()
        return done

    async def _recover(self) -> list[Redemption]:
        """Complete what was sent but not written down, from the chain's events. What is still planned then is simply tried again; what can
        never be paid any more (another amount was, or the channel is gone) is forgotten."""
        planned = [row for row in self._journal.read(_planned) if not self._claims.in_flight(Hash(row.channel))]
        over = [row for row in planned if await self._is_over(row)]
        if not over:
            return []
        seen = {(paid.channel, paid.cumulative): paid for paid in await self._claims.paid({Hash(row.channel) for row in over})}
        found, lost = [], []
        for row in over:
            paid = seen.get((row.channel, row.cumulative))
            if paid is None:
                lost.append(row)
            elif await self._claims.is_final(paid):
                gas = await self._claims.gas_used(paid.tx)
                done = Redemption(paid.channel, Address(row.payer), Address(row.payee), paid.amount, Money(row.cumulative), paid.tx, gas)
                found.append((row.cumulative, done))
        if lost:
            await self._journal.transact(partial(_forget, rows=lost))
        return await self._write_down(found)

    async def _is_over(self, row: Any) -> bool:
        """Whether the contract has nothing left to pay on a planned redemption."""
        state = await self._claims.state(Hash(row.channel))
        return state is None or state.claimed >= row.cumulative

    async def _choose(self, force: bool) -> list[ReceivedChannel]:
        channels = [c for c in self._source() if c.redeemable and not self._claims.in_flight(c.id)]
        if not channels:
            return []
        gas_price = await self._claims.gas_price()
        gas = REDEEM_GAS if len(channels) == 1 else _BATCHED_GAS + REDEEM_GAS // len(channels)
        now, chosen = self._clock.now(), []
        for channel in await self._looked_at(channels):
            reason = due(channel, gas_price=gas_price, gas_value=self._gas_value, now=now, policy=self._policy, gas=gas, force=force)
            if reason:
                _log.info("redeeming", channel=hex0x(channel.id), amount=channel.redeemable, reason=reason)
                chosen.append(channel)
        return chosen

    async def _looked_at(self, channels: list[ReceivedChannel]) -> list[ReceivedChannel]:
        """The channels, some of them in turn as the contract has them at this moment."""
        start = self._turn * LOOKS % len(channels)
        self._turn += 1
        looked = {}
        for channel in (channels + channels)[start : start + min(LOOKS, len(channels))]:
            state = await self._claims.state(channel.id)
            if state is None:
                looked[channel.id] = replace(channel, closed=True)
            else:
                redeemed = max(channel.redeemed, state.claimed)
                looked[channel.id] = replace(channel, closing=state.closes_at, expires_at=state.expires_at, redeemed=redeemed)
        return [looked.get(channel.id, channel) for channel in channels]

    async def _redeem_batch(self, channels: Sequence[ReceivedChannel]) -> list[Redemption]:
        payers = {c.id: self._payer_of(c.id) for c in channels}
        payee, now = self._actions.sender.address, self._clock.now()
        await self._journal.transact(partial(_plan, channels=channels, payers=payers, payee=payee, now=now))
        if len(channels) == 1:
            (only,) = channels
            receipt = await self._claims.confirmed(await self._actions.redeem(only.id, only.voucher, only.signature))
            gas = receipt.gas_used
        else:
            sent = await self._actions.redeem_many([(c.id, c.voucher, c.signature) for c in channels])
            receipt = await self._claims.confirmed(sent)
            gas = receipt.gas_used + await self._withdraw()
        self._report_skipped(receipt)
        paid = self._actions.redeemed(receipt)
        for channel in channels:
            if channel.id in paid:
                await self._claims.require_paid(channel.id, channel.voucher)
        share = gas // max(1, len(paid))
        return await self._write_down(
            [
                (c.voucher, Redemption(c.id, payers[c.id], payee, Money(paid[c.id]), Money(c.voucher), receipt.tx_hash, share))
                for c in channels
                if c.id in paid
            ]
        )

    async def _write_down(self, found: list[tuple[int, Redemption]]) -> list[Redemption]:
        """Journal redemptions, each with the cumulative amount of its voucher, then tell."""
        if found:
            await self._journal.transact(partial(_complete, found=found))
        for _, redemption in found:
            self.count += 1
            if self._on_redeemed is not None:
                self._on_redeemed(redemption)
        return [redemption for _, redemption in found]

    async def _withdraw(self) -> int:
        """Gas of paying the batch's credit out; 0 when there is none (every item was skipped)."""
        if not await self._actions.credited():
            return 0
        return (await self._actions.withdraw()).gas_used

    async def _left_over(self, force: bool) -> bool:
        """Whether to withdraw what a payer's push or close credited, or a batch that a crash cut off before its withdrawal."""
        credited = await self._actions.credited()
        if not credited or self._claims.withdrawing():
            return False
        return force or withdrawal_due(credited, gas_price=await self._claims.gas_price(), gas_value=self._gas_value, policy=self._policy)

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


def _forget(connection: Connection, rows: Sequence[Any]) -> None:
    """Plans that nothing can come of any more."""
    for row in rows:
        key = (_redemptions.c.channel == row.channel) & (_redemptions.c.cumulative == row.cumulative) & _redemptions.c.tx.is_(None)
        connection.execute(delete(_redemptions).where(key))


def _planned(connection: Connection) -> list[Any]:
    return list(connection.execute(select(_redemptions).where(_redemptions.c.tx.is_(None))))


def _done(connection: Connection) -> list[Redemption]:
    rows = connection.execute(
        select(_redemptions).where(_redemptions.c.tx.is_not(None)).order_by(_redemptions.c.at, _redemptions.c.channel)
    )
    return [Redemption(Hash(r.channel), Address(r.payer), Address(r.payee), r.amount, r.cumulative, Hash(r.tx), r.gas) for r in rows]

"""The client's side of its payment channel: when to open one, how far a voucher goes, and never past the limit.

Invariants: a voucher only grows, is journaled with its guard before it is signed (I2, I3), never exceeds the deposit, never exceeds what
was used by more than W (I4), and never grows within a day by more than the day's cap (`spending`). What counts as used is the smaller of
what the scheduler says and what our own acks add up to: neither a scheduler that invents usage nor one that hides it widens the exposure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, insert, select, update

from gpumarket.core.codec import voucher_proto
from gpumarket.core.errors import JournalError, OutOfFunds
from gpumarket.core.ports import Clock, Random
from gpumarket.core.signing import Signer
from gpumarket.core.terms import Voucher
from gpumarket.core.units import Address, Hash, Money, format_money, money_from_bytes
from gpumarket.sdk import spending, store
from gpumarket.sdk.chain_port import ChainPort, ChannelEntry
from gpumarket.sdk.funding import Funding
from gpumarket.sdk.settings import ClientSettings
from gpumarket.sdk.tables import CHANNELS, INTENTS
from gpumarket.settlement import guard
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.prepared import Prepared
from gpumarket.settlement.vouchers import sign_voucher
from gpumarket.v1 import market_pb2
from gpumarket.v1 import terms_pb2 as pb

TEST_CHAIN = 31_337
NOTHING = Money(0)
VIEW_PAUSE_SECONDS = 0.1
_ALL = Prepared(select(CHANNELS.c.id, CHANNELS.c.closing, CHANNELS.c.scheduler))
_ONE = Prepared(select(CHANNELS.c.voucher, CHANNELS.c.billed).where(CHANNELS.c.id == bindparam("at")))
_SET_VOUCHER = Prepared(update(CHANNELS).where(CHANNELS.c.id == bindparam("at")), ["voucher"])
_SET_BILLED = Prepared(update(CHANNELS).where(CHANNELS.c.id == bindparam("at")), ["billed"])


@dataclass(frozen=True, slots=True)
class Report:
    """The scheduler's account of a channel: its word, not a fact."""

    voucher: Money
    used: Money
    held: Money
    open: Money

    @staticmethod
    def of(message: market_pb2.Account) -> Report:
        return Report(
            money_from_bytes(message.voucher),
            money_from_bytes(message.used),
            money_from_bytes(message.held),
            money_from_bytes(message.open),
        )


@dataclass(slots=True)
class PaidChannelState:
    """Our channel to one scheduler. `open` is the sum of the maxima of our running jobs, `billed` what ended ones cost by our own acks."""

    id: Hash
    scheduler: Address
    deposit: Money
    expires_at: int
    voucher: Money
    billed: Money
    open: Money = NOTHING
    report: Report = Report(NOTHING, NOTHING, NOTHING, NOTHING)
    reported: bool = False
    """Whether `report` came from the scheduler; on a fresh channel nothing needs to."""
    topping_up: asyncio.Lock = field(default_factory=asyncio.Lock, compare=False, repr=False)
    """Held by the job that raises the voucher by the scheduler's account."""

    @property
    def used(self) -> Money:
        """What both sides agree was used."""
        return Money(min(self.billed, self.report.used))


def voucher_for(channel: PaidChannelState, maximum: Money, limit: Money, *, by_report: bool) -> Money:
    """Cumulative amount that the next voucher must reach so that an order of `maximum` is covered.

    `by_report` reckons with the scheduler's account (after it said that the voucher falls short), else with our own books. Raises
    OutOfFunds when that would pass the deposit or W.
    """
    report = channel.report
    taken = report.used + report.held + report.open if by_report else channel.billed + channel.open
    wanted = Money(max(channel.voucher, taken + maximum))
    if wanted == channel.voucher:
        return wanted
    if wanted > channel.deposit:
        raise OutOfFunds(
            f"the channel's deposit is {format_money(channel.deposit)}, this job needs a voucher of {format_money(wanted)}",
            hint=f"gpumarket wallet deposit {format_money(Money(wanted - channel.deposit))}",
        )
    if wanted - channel.used > limit:
        raise OutOfFunds(
            f"a voucher of {format_money(wanted)} would exceed what was used ({format_money(channel.used)}) by more than your limit "
            f"of {format_money(limit)}",
            hint="wait for running jobs to settle, give a lower max_cost, or raise GPUMARKET_CLIENT_EXPOSURE",
            retryable=True,
        )
    return wanted


class Account:
    """Channels of one wallet, kept in the journal and on chain."""

    def __init__(
        self,
        journal: Journal,
        chain: ChainPort,
        signer: Signer,
        settings: ClientSettings,
        clock: Clock,
        random: Random,
        *,
        funding: Funding | None = None,
    ) -> None:
        """`funding` says who pays where it is not the signer itself."""
        self._funding = funding
        self._journal, self._chain, self._signer, self._settings = journal, chain, signer, settings
        self._clock, self._random = clock, random
        self._channels: dict[Hash, PaidChannelState] = {}
        self._newest: dict[Hash, tuple[Money, pb.SignedVoucher]] = {}
        self._opening, self._raising = asyncio.Lock(), asyncio.Lock()
        self._under_way: dict[Address, asyncio.Task[ChannelEntry]] = {}
        self._started = clock.now() - clock.monotonic()

    async def channel(self, scheduler: Address, margin_seconds: int) -> PaidChannelState:
        """The channel to a scheduler that outlives a job started now; opened when there is none."""
        async with self._opening:
            return self._load(self._usable(scheduler, margin_seconds) or await self._opened(scheduler, margin_seconds))

    def known(self, channel: Hash) -> PaidChannelState | None:
        """A channel of the journal by its id, also one that takes no more orders."""
        entry = self._chain.channels.get(channel)
        return self._load(entry) if entry and self._row(channel) else None

    def current(self, scheduler: Address) -> PaidChannelState | None:
        """The channel to a scheduler as it is, None when there is none that takes orders."""
        found = self._usable(scheduler, -self._settings.job_seconds)
        return self._load(found) if found else None

    def closable(self, scheduler: Address | None = None) -> list[PaidChannelState]:
        """Every channel to a scheduler (None: to any) that still holds money and names our key: also one whose close was begun and did
        not come through, was asked for alone, or that has expired."""
        entries = [self._chain.channels.get(Hash(row["id"])) for row in self._rows() if scheduler in (None, row["scheduler"])]
        return [self._load(e) for e in entries if e is not None and not e.closed and e.signer == self._signer.address]

    async def seen_deposit(self, channel: PaidChannelState, deposit: Money) -> None:
        """Wait until the chain, confirmations deep, shows at least this deposit."""
        while self._chain.channels[channel.id].deposit < deposit:
            await asyncio.sleep(VIEW_PAUSE_SECONDS)
            await self._chain.refresh()
        channel.deposit = Money(self._chain.channels[channel.id].deposit)

    async def cover(
        self, channel: PaidChannelState, maximum: Money, also: Callable[[Connection], None], *, by_report: bool = False
    ) -> pb.SignedVoucher | None:
        """Make `also` (the job's record) durable together with a voucher that covers `maximum`, and count the job as running.

        `by_report`: for a job that runs already, whose voucher the scheduler found short (`voucher_for`). None when the scheduler
        already holds enough. Raises OutOfFunds or SpendLimitReached before anything is written.
        """
        self._journal.require_space()
        return await asyncio.shield(asyncio.ensure_future(self._cover(channel, maximum, also, by_report)))

    async def _cover(
        self, channel: PaidChannelState, maximum: Money, also: Callable[[Connection], None], by_report: bool
    ) -> pb.SignedVoucher | None:
        """In a task of its own: a caller that is cancelled meanwhile must not leave memory behind the journal."""
        async with self._raising:
            _require_newest(channel)
            wanted = voucher_for(channel, maximum, self._settings.exposure_limit, by_report=by_report)

            def work(connection: Connection) -> None:
                also(connection)
                if wanted > channel.voucher:
                    spending.spend(connection, self._time(), Money(wanted - channel.voucher), self._settings.spend_limit_amount)
                    guard.advance(connection, channel.id, wanted)
                    _SET_VOUCHER.run(connection, at=channel.id, voucher=wanted)

            await self._journal.transact(work)
            channel.voucher = wanted
            if not by_report:
                channel.open = Money(channel.open + maximum)
        return self.voucher(channel) if channel.voucher > channel.report.voucher else None

    async def catch_up(self, channel: PaidChannelState, signed: Money) -> None:
        """Our key has signed this much before, proven by the payee or the chain, and the journal, an older copy, knows less (I3). What it
        did not know of counts in the day's cap from now."""

        def work(connection: Connection) -> None:
            spending.found(connection, self._time(), Money(signed - channel.voucher))
            guard.advance(connection, channel.id, signed)
            _SET_VOUCHER.run(connection, at=channel.id, voucher=signed)

        async with self._raising:
            if signed > channel.voucher:  # else another job has taken it over meanwhile
                await self._journal.transact(work)
                channel.voucher = signed

    def voucher(self, channel: PaidChannelState) -> pb.SignedVoucher:
        """The newest voucher; its guard row is durable, and signing it again gives the same bytes (RFC 6979)."""
        if self._newest.get(channel.id, (None, None))[0] != channel.voucher:
            signature = sign_voucher(self._signer, self._chain.channels_domain, channel.id, channel.voucher)
            self._newest[channel.id] = channel.voucher, voucher_proto(Voucher(channel.id, channel.voucher), signature)
        return self._newest[channel.id][1]

    def release(self, channel: PaidChannelState, maximum: Money, billed: Money) -> None:
        """A job of this maximum ended and cost `billed` (journaled by the caller with `bill`)."""
        channel.open = Money(channel.open - maximum)
        channel.billed = Money(channel.billed + billed)

    def forgive(self, channel: Hash, amount: Money) -> None:
        """A rejected job's cost is ours again (journaled by the caller with `refund`)."""
        state = self._channels.get(channel)
        if state is not None:
            state.billed = Money(state.billed - amount)

    def spending(self) -> spending.Spending:
        """The day's cap and what of it is spent."""
        return self._journal.read(lambda c: spending.standing(c, self._time(), self._settings.spend_limit_amount))

    async def limit_spending(self, limit: Money | None) -> None:
        """Set the day's cap in the journal, None to have none there."""
        await self._journal.transact(lambda c: spending.set_limit(c, self._clock.now(), limit))

    def _time(self) -> int:
        """Unix seconds that a clock set back while we run does not take back."""
        return max(self._clock.now(), int(self._started + self._clock.monotonic()))

    async def set_closing(self, channel: Hash) -> None:
        """No order goes on this channel any more."""
        await self._journal.transact(lambda c: c.execute(update(CHANNELS).where(CHANNELS.c.id == channel).values(closing=True)).close())

    # --- opening -----------------------------------------------------------------------------------------------------------

    def _usable(self, scheduler: Address, margin_seconds: int) -> ChannelEntry | None:
        need = self._clock.now() + self._settings.job_seconds + margin_seconds
        for row in self._rows():
            entry = self._chain.channels.get(Hash(row["id"]))
            if entry is None or row["scheduler"] != scheduler or row["closing"] or entry.closed or entry.closes_at:
                continue
            if entry.signer != self._signer.address:
                continue  # of a payment key that was replaced: our vouchers are worth nothing there
            if entry.expires_at > need:
                return entry
        return None

    async def _opened(self, scheduler: Address, margin_seconds: int) -> ChannelEntry:
        """Opening goes on when its caller is cancelled; whoever comes next waits for the same."""
        task = self._under_way.get(scheduler)
        if task is None or task.done():
            task = self._under_way[scheduler] = asyncio.create_task(self._open(scheduler, margin_seconds), name="open channel")
            task.add_done_callback(lambda done: None if done.cancelled() else done.exception() and None)  # seen, also when nobody waits
        return await asyncio.shield(task)

    async def _open(self, scheduler: Address, margin_seconds: int) -> ChannelEntry:
        await self._chain.refresh()
        if found := self._usable(scheduler, margin_seconds):
            return found
        self.require_payer()
        intent = self._journal.read(lambda c: c.execute(select(INTENTS).where(INTENTS.c.scheduler == scheduler)).first())
        if intent is None:
            intent = await self._intend(scheduler)
        channel = await self._chain.open_channel(intent.label, scheduler, Money(intent.amount), intent.expires_at)
        await self._journal.transact(lambda c: _admit(c, channel, scheduler, self._clock.now()))
        while channel not in self._chain.channels:  # confirmed on chain; our view is a block behind
            await self._chain.refresh()
            await asyncio.sleep(VIEW_PAUSE_SECONDS)
        return self._chain.channels[channel]

    async def _intend(self, scheduler: Address) -> Row[Any]:
        """Write down what is about to be opened: after a crash the same transaction is taken up again, not a second one sent."""
        amount, now = self._settings.deposit_amount, self._clock.now()
        await self.require_balance(amount)
        values = {
            "scheduler": scheduler,
            "label": f"open channel {self._random.token(8).hex()}",
            "amount": amount,
            "expires_at": now + self._settings.channel_days * store.DAY_SECONDS,
        }
        await self._journal.transact(lambda c: c.execute(insert(INTENTS).values(**values)).close())
        return self._journal.read(lambda c: c.execute(select(INTENTS).where(INTENTS.c.scheduler == scheduler)).one())

    @property
    def payer(self) -> Address:
        """Whose tokens the channels hold."""
        return self._funding.payer if self._funding is not None else self._signer.address

    def require_payer(self) -> None:
        """Raises OutOfFunds where the tokens are an owner's whose key is not at hand."""
        if self._funding is not None:
            self._funding.require(self._settings)

    async def require_balance(self, amount: Money) -> None:
        """Raises OutOfFunds unless the wallet holds this much; the faucet is asked first where that is allowed."""
        balance = await self._chain.balance()
        if balance < amount and self._settings.faucet and self._chain.chain_id == TEST_CHAIN:
            await self._chain.faucet()
            balance = await self._chain.balance()
        if balance < amount:
            raise OutOfFunds(
                f"the wallet 0x{self.payer.hex()} holds {format_money(balance)}, {format_money(amount)} are needed",
                hint="send tokens to the wallet, or lower GPUMARKET_CLIENT_DEPOSIT",
            )

    def _rows(self) -> list[dict[str, Any]]:
        return self._journal.read(_ALL.rows)

    def _row(self, channel: Hash) -> tuple[Money, Money] | None:
        row = self._journal.read(lambda c: _ONE.first(c, at=channel))
        return (row["voucher"], row["billed"]) if row else None

    def _load(self, entry: ChannelEntry) -> PaidChannelState:
        state = self._channels.get(entry.id)
        if state is None:
            row = self._row(entry.id)
            if row is None:
                raise JournalError(f"channel 0x{entry.id.hex()} is not in this journal")
            open_ = self._journal.read(lambda c: store.open_maxima(c, entry.id))
            state = PaidChannelState(entry.id, entry.payee, Money(entry.deposit), entry.expires_at, row[0], row[1], open_)
            self._channels[entry.id] = state
        state.deposit, state.expires_at = Money(entry.deposit), entry.expires_at
        return state


def _require_newest(channel: PaidChannelState) -> None:
    """Raises JournalError while the scheduler says that it holds a higher voucher than this journal knows of."""
    if channel.report.voucher > channel.voucher:
        raise JournalError(
            f"the scheduler says that it holds a voucher of {format_money(channel.report.voucher)} on channel 0x{channel.id.hex()}, this "
            f"journal has signed {format_money(channel.voucher)} at most: it is an older copy, or another process signs with this key",
            hint="stop whatever else uses this key, then try again: what the scheduler proves is taken over; if it cannot, choose another",
        )


def bill(connection: Connection, channel: Hash, amount: Money) -> None:
    """Add what an ended job costs to its channel; inside the transaction that ends the job."""
    _SET_BILLED.run(connection, at=channel, billed=Money(_billed(connection, channel) + amount))


def refund(connection: Connection, channel: Hash, amount: Money) -> None:
    """Take a rejected job's cost back out; inside the transaction that records the rejection."""
    _SET_BILLED.run(connection, at=channel, billed=Money(_billed(connection, channel) - amount))


def _billed(connection: Connection, channel: Hash) -> int:
    row = _ONE.first(connection, at=channel)
    assert row is not None, "what is billed has a channel"
    return int(row["billed"])


def _admit(connection: Connection, channel: Hash, scheduler: Address, now: int) -> None:
    guard.admit(connection, channel)
    connection.execute(
        insert(CHANNELS).values(id=channel, scheduler=scheduler, voucher=Money(0), billed=Money(0), closing=False, opened_at=now)
    )
    connection.execute(delete(INTENTS).where(INTENTS.c.scheduler == scheduler))

"""Bills to schedulers: every ended attempt is claimed, again and again, until it is owed, rejected or closed.

Invariants: "owed" is believed only with a voucher that covers all that was ever answered as owed on its channel; a voucher counts only when
its signature holds, it is not above the deposit, and its channel lives. A scheduler that is away costs nothing but the wait.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import grpc.aio
import structlog

from gpumarket.core.codec import signed_call, voucher_proto
from gpumarket.core.errors import ChannelExpiring, GpumarketError, JournalError, ProtocolError
from gpumarket.core.hostile_text import one_line
from gpumarket.core.ports import Clock, Random
from gpumarket.core.rpc import CALL_SECONDS, hangup_is_unreachable
from gpumarket.core.signing import Domain, Signer
from gpumarket.core.terms import Voucher
from gpumarket.core.units import Address, Hash, Money, format_money, hex0x, money_from_bytes
from gpumarket.node.accounts import Accounts, Bill, HeldVoucher
from gpumarket.node.admission import Spoke
from gpumarket.node.peers import Peers
from gpumarket.node.spans import Spans
from gpumarket.node.tables import CLOSED, HELD, OWED, REJECTED
from gpumarket.settlement.vouchers import verify_voucher
from gpumarket.telemetry.spans import Span
from gpumarket.telemetry.trace_context import to_metadata
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import terms_pb2 as terms

AT_ONCE = 16
"""Claims under way: enough for group commits on both sides, few enough to be no flood after a long outage."""
HELD_SECONDS = 3.0
HOLDINGS_MAX = 256
_log = structlog.get_logger()
_FINAL = {pb.CLAIM_STATE_OWED: OWED, pb.CLAIM_STATE_REJECTED: REJECTED, pb.CLAIM_STATE_CLOSED: CLOSED}


def check_voucher(message: terms.SignedVoucher, channels: Mapping[Hash, Spoke], me: Address, domain: Domain, now: int) -> HeldVoucher:
    """A voucher that can be redeemed. Raises BadSignature, ProtocolError or ChannelExpiring for any other."""
    channel = Hash(message.voucher.channel)
    spoke = channels.get(channel)
    if spoke is None or spoke.payee != me:
        raise ProtocolError(f"a voucher of channel {hex0x(channel)}, which is not one to this provider")
    try:
        cumulative = money_from_bytes(message.voucher.cumulative)
    except ValueError as error:
        raise ProtocolError(f"a voucher that is none: {error}") from error
    verify_voucher(domain, channel, cumulative, message.signature, spoke.signer)
    if cumulative > spoke.deposit:
        raise ProtocolError(f"a voucher of {format_money(cumulative)} on a deposit of {format_money(spoke.deposit)}")
    if spoke.closed or now >= spoke.expires_at:
        raise ChannelExpiring(f"a voucher of channel {hex0x(channel)}, which is over")
    return HeldVoucher(channel, spoke.payer, cumulative, message.signature)


@dataclass(slots=True)
class _Try:
    at: float = 0.0
    count: int = 0


class Claims:
    """The claimer. `run` until cancelled; `poke` when there is something new."""

    def __init__(
        self,
        accounts: Accounts,
        peers: Peers,
        signer: Signer,
        domain: Domain,
        channels_domain: Domain,
        channels: Mapping[Hash, Spoke],
        clock: Clock,
        randomness: Random,
        *,
        retry_seconds_max: float,
        spans: Spans | None = None,
    ) -> None:
        self._spans = spans or Spans()
        self._accounts, self._peers, self._signer = accounts, peers, signer
        self._domain, self._channels_domain, self._channels = domain, channels_domain, channels
        self._clock, self._random = clock, randomness
        self._retry_seconds_max = retry_seconds_max
        self._tries: dict[Hash, _Try] = {}
        self._running: set[Hash] = set()
        self.settled: Counter[str] = Counter()
        """Final answers since the start, by state."""
        self.failed: Counter[str] = Counter()
        """Tries that ended in an error, by its code."""
        self._wake = asyncio.Event()
        self._moved = asyncio.Event()

    def poke(self, lease: Hash | None = None) -> None:
        """Something changed: try this bill (or look for new ones) at once."""
        if lease is not None:
            self._tries.pop(lease, None)
        self._wake.set()

    async def run(self) -> None:
        """Claim for ever. Ends only by cancellation or a JournalError."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._wake.clear()
                for bill in self._ready():
                    self._running.add(bill.lease_hash)
                    group.create_task(self._attempt(bill))
                try:
                    await asyncio.wait_for(self._wake.wait(), self._pause())
                except TimeoutError:
                    continue

    async def answered(self, seconds: float) -> None:
        """Wait, at most so long, until every bill was answered once: held or final."""
        try:
            async with asyncio.timeout(seconds):
                while self._accounts.fresh_bills:
                    self._moved.clear()
                    self.poke()
                    await self._moved.wait()
        except TimeoutError:
            _log.warning("bills left for the next start", count=self._accounts.fresh_bills)

    async def take_voucher(self, message: terms.SignedVoucher) -> None:
        """A voucher that came unasked (heartbeat). Raises what is wrong with it."""
        voucher = check_voucher(message, self._channels, self._signer.address, self._channels_domain, self._clock.now())
        await self._accounts.keep_voucher(voucher)

    def holdings(self, scheduler: Address) -> list[terms.SignedVoucher]:
        """Newest vouchers of a scheduler's live channels: it learns from them when its ledger is an older copy."""
        held = [v for v in self._accounts.vouchers.values() if v.scheduler == scheduler]
        live = [v for v in held if (spoke := self._channels.get(v.channel)) is not None and not spoke.closed]
        return [_signed(v) for v in live[-HOLDINGS_MAX:]]

    def _ready(self) -> list[Bill]:
        now = self._clock.monotonic()
        self._tries = {lease: t for lease, t in self._tries.items() if lease in self._accounts.bills}
        waiting = [b for b in self._accounts.bills.values() if b.lease_hash not in self._running]
        due = [b for b in waiting if self._tries.get(b.lease_hash, _Try()).at <= now]
        return due[: AT_ONCE - len(self._running)]

    def _pause(self) -> float | None:
        waiting = [t.at for lease, t in self._tries.items() if lease not in self._running]
        if len(self._running) >= AT_ONCE or not waiting:
            return None  # the end of a try, or a new bill, wakes
        return max(0.01, min(waiting) - self._clock.monotonic())

    async def _attempt(self, bill: Bill) -> None:
        try:
            await self.claim(bill)
        except JournalError:
            raise
        except GpumarketError as error:
            self.failed[error.code] += 1
            wait = self._later(bill)
            _log.warning(
                "claim not settled", lease=hex0x(bill.lease_hash), code=error.code, reason=error.message, again_seconds=round(wait, 1)
            )
        finally:
            self._running.discard(bill.lease_hash)
            self._wake.set()
            self._moved.set()

    async def claim(self, bill: Bill) -> None:
        """One try. Raises what the scheduler or the way to it answered; what it settles is in the journal when this returns."""
        lease = bill.lease
        body = pb.ClaimRequest(lease=bill.signed_lease, receipt=bill.signed_receipt, last_ack=bill.signed_ack)
        if (held := self._accounts.vouchers.get(lease.provider_channel)) is not None:
            body.held.CopyFrom(_signed(held))
        nonce = Hash(self._random.token(32))
        call = signed_call(self._signer, self._domain, "Market/Claim", body, lease.scheduler, self._clock.now(), nonce)
        with self._spans.claim(bill) as span:
            line = await self._peers.line(lease.scheduler)
            try:
                with hangup_is_unreachable(f"scheduler {hex0x(lease.scheduler)}"):
                    reply = await line.market.Claim(call, timeout=CALL_SECONDS, metadata=to_metadata(span.context))
            except grpc.aio.AioRpcError as error:
                raise await self._peers.failed(line, error) from error
            await self._take(bill, reply, span)

    async def _take(self, bill: Bill, reply: pb.ClaimReply, span: Span) -> None:
        voucher, reason = None, one_line(reply.reason)
        if reply.HasField("voucher"):
            voucher = check_voucher(reply.voucher, self._channels, self._signer.address, self._channels_domain, self._clock.now())
        if reply.state == pb.CLAIM_STATE_HELD:
            await self._accounts.hold(bill, reason)
            span.note(state=HELD)
            self._tries[bill.lease_hash] = _Try(self._clock.monotonic() + HELD_SECONDS * self._jitter(), 0)
            return
        state = _FINAL.get(reply.state)
        if state is None:
            raise ProtocolError(f"a claim was answered with state {reply.state}")
        amount = self._amount(bill, reply) if state == OWED else Money(0)
        if state == OWED:
            self._require_cover(bill, amount, voucher)
        await self._accounts.settle(bill, state, amount, reason, voucher)
        self.settled[state] += 1
        self._spans.settled(bill, state, span)
        self._tries.pop(bill.lease_hash, None)
        if amount < bill.amount:
            _log.warning(
                "paid less than billed",
                lease=hex0x(bill.lease_hash),
                state=state,
                billed=format_money(bill.amount),
                paid=format_money(amount),
                reason=reason,
            )

    def _amount(self, bill: Bill, reply: pb.ClaimReply) -> Money:
        try:
            amount = money_from_bytes(reply.amount)
        except ValueError as error:
            raise ProtocolError(f"a claim was answered with an amount that is none: {error}") from error
        if amount > bill.lease.maximum:
            raise ProtocolError(f"a claim was answered with {format_money(amount)}, above the lease's maximum")
        return amount

    def _require_cover(self, bill: Bill, amount: int, voucher: HeldVoucher | None) -> None:
        channel = bill.lease.provider_channel
        held = self._accounts.vouchered(channel)
        if voucher is not None and voucher.channel == channel:
            held = max(held, voucher.cumulative)
        owed = self._accounts.owed_on(channel) + amount
        if held < owed:
            raise ProtocolError(f"the scheduler says {format_money(owed)} is owed in all and vouchers for {format_money(held)} only")

    def _later(self, bill: Bill) -> float:
        count = self._tries.get(bill.lease_hash, _Try()).count + 1
        wait = min(self._retry_seconds_max, 0.25 * 2.0 ** min(count, 16)) * self._jitter()
        self._tries[bill.lease_hash] = _Try(self._clock.monotonic() + wait, count)
        return wait

    def _jitter(self) -> float:
        return random.Random(self._random.token(8)).uniform(0.8, 1.2)  # noqa: S311  spreads retries, guards nothing


def _signed(held: HeldVoucher) -> terms.SignedVoucher:
    return voucher_proto(Voucher(held.channel, held.cumulative), held.signature)

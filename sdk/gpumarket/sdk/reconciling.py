"""What the scheduler and the chain know that this wallet's key has signed, against the journal: asked once per channel and process (I3).

A journal may be an older copy, brought back after its key had signed more: nothing is signed on a channel before its payee has been heard.
A higher voucher counts when it is under our own signature, or when the chain has paid it; a scheduler's bare word stops the client instead.
"""

from __future__ import annotations

from gpumarket.core.errors import OutOfFunds, ProtocolError
from gpumarket.core.units import Money, format_money, money_from_bytes
from gpumarket.sdk.account import PaidChannelState, Report
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.logs import log
from gpumarket.settlement.vouchers import verify_voucher
from gpumarket.v1 import market_pb2 as mpb


async def reconcile(desk: Desk, channel: PaidChannelState) -> None:
    """Read the scheduler's account of a channel, take over what was signed before. Raises BadSignature for a voucher that is not ours."""
    try:
        account = await desk.schedulers.line(channel.scheduler).account(channel.id)
    except OutOfFunds:
        if channel.voucher:
            raise
        return  # just opened: its view of the chain is a moment behind ours, and who has not seen a channel holds no voucher of it
    entry = desk.chain.channels.get(channel.id)
    signed = max(_proven(desk, channel, account), entry.claimed if entry is not None else 0)
    if signed > channel.voucher:
        log.warning("journal_is_older", channel=channel.id.hex(), signed=format_money(Money(signed)), known=format_money(channel.voucher))
        await desk.account.catch_up(channel, Money(signed))
    channel.report, channel.reported = Report.of(account), True


def _proven(desk: Desk, channel: PaidChannelState, account: mpb.Account) -> int:
    """The cumulative amount of the newest voucher that the scheduler shows, 0 when it shows none."""
    if not account.HasField("newest"):
        return 0
    try:
        cumulative = money_from_bytes(account.newest.voucher.cumulative)
    except ValueError as error:
        raise ProtocolError(f"the scheduler shows a voucher of an amount that is none: {error}") from error
    if account.newest.voucher.channel != channel.id:
        raise ProtocolError("the scheduler shows a voucher of another channel")
    if cumulative > channel.voucher:
        verify_voucher(desk.chain.channels_domain, channel.id, cumulative, account.newest.signature, desk.signer.address)
    return cumulative

"""The client's money for people: what there is, putting more in, taking it out."""

from __future__ import annotations

from gpumarket.core.errors import ChannelExpiring, ConfigError, NetworkError, ProtocolError, Unreachable
from gpumarket.core.units import Money, format_money, money_from_bytes
from gpumarket.sdk.account import PaidChannelState, Report
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.results import AccountView
from gpumarket.settlement.vouchers import verify_close
from gpumarket.v1 import terms_pb2 as pb

ALONE = "gpumarket wallet close-channel --alone"
"""The way out that asks no scheduler (`leaving`)."""


async def view(desk: Desk) -> AccountView:
    """Wallet and channel. A scheduler that does not answer leaves its column as it was last known, with a warning."""
    balance = await desk.chain.balance()
    channels = desk.account.closable(desk.hub.address)
    channel = desk.account.current(desk.hub.address) or next(iter(channels), None)
    warnings = tuple(_elsewhere(c) for c in desk.account.closable() if c.scheduler != desk.hub.address)
    if channel is None:
        return AccountView(desk.signer.address, balance, desk.hub.address, warnings=warnings, owner=desk.account.payer)
    others = [c for c in channels if c.id != channel.id]
    warnings += tuple(f"channel 0x{c.id.hex()} holds money besides: gpumarket wallet close-channel brings its rest back" for c in others)
    try:
        channel.report, channel.reported = Report.of(await desk.hub.account(channel.id)), True
    except (NetworkError, ChannelExpiring) as error:
        warnings += (error.message,)
    return AccountView(
        desk.signer.address,
        balance,
        desk.hub.address,
        channel.id,
        channel.deposit,
        channel.voucher,
        channel.billed,
        channel.report.used,
        channel.report.held,
        channel.report.open,
        channel.expires_at,
        warnings,
        desk.account.payer,
    )


def _elsewhere(channel: PaidChannelState) -> str:
    scheduler = f"0x{channel.scheduler.hex()}"
    return (
        f"channel 0x{channel.id.hex()} to scheduler {scheduler} holds money besides: name that one in GPUMARKET_CLIENT_SCHEDULER and run "
        f"gpumarket wallet close-channel, or where it is gone {ALONE}"
    )


async def deposit(desk: Desk, amount: Money) -> None:
    """Top the channel up; where there is none, one is opened with its usual deposit first."""
    desk.account.require_payer()
    info = await desk.hub.info()
    channel = await desk.account.channel(desk.hub.address, info.channel_margin_seconds)
    await desk.account.require_balance(amount)
    await desk.chain.top_up(channel.id, amount, channel.expires_at)
    await desk.account.seen_deposit(channel, Money(channel.deposit + amount))


async def close(desk: Desk) -> Money:
    """Close at what was used; what came back. Raises OutOfFunds where the owner's key is needed and not at hand.

    A close that failed half-way (the scheduler consented, the transaction did not come through) is taken up again: the consent is asked
    for anew, and a transaction that is on its way is not sent twice.
    """
    desk.account.require_payer()
    channels = desk.account.closable(desk.hub.address)
    if not channels:
        raise ConfigError("there is no open channel to this scheduler", hint="gpumarket wallet balance")
    before = await desk.chain.balance()
    for channel in channels:
        await _close_one(desk, channel)
    return Money(max(0, await desk.chain.balance() - before))


async def _close_one(desk: Desk, channel: PaidChannelState) -> None:
    if channel.open:
        raise ConfigError(
            f"jobs worth up to {format_money(channel.open)} still run on channel 0x{channel.id.hex()}",
            hint=f"gpumarket job list, then wait or resume them; where the scheduler is gone: {ALONE}",
        )
    consent = await _consent(desk, channel)
    used = _checked(desk, channel, consent.channel, consent.cumulative, consent.signature)
    await desk.account.set_closing(channel.id)
    await desk.chain.cooperative_close(channel.id, used, consent.signature)


async def _consent(desk: Desk, channel: PaidChannelState) -> pb.SignedClose:
    try:
        return await desk.hub.close_channel(channel.id)
    except Unreachable as error:
        raise Unreachable(error.message, hint=f"try again later, or leave without it: {ALONE}") from error


def _checked(desk: Desk, channel: PaidChannelState, found: bytes, cumulative: bytes, signature: bytes) -> Money:
    used = money_from_bytes(cumulative)
    if found != channel.id:
        raise ProtocolError("the scheduler signed the close of another channel")
    entry = desk.chain.channels.get(channel.id)
    claimed = entry.claimed if entry is not None else 0  # redeemed already: no close brings that back, and W bounds it
    if used > max(channel.billed, claimed):
        raise ProtocolError(
            f"the scheduler wants to close at {format_money(used)}; your own acks add up to {format_money(channel.billed)}",
            hint=f"gpumarket job list shows what was acked; without its consent, the rest back after the close window: {ALONE}",
        )
    verify_close(desk.chain.channels_domain, channel.id, used, signature, channel.scheduler)
    return used

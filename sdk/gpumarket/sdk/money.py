"""The client's money for people: what there is, putting more in, taking it out."""

from __future__ import annotations

from gpumarket.core.errors import ConfigError, NetworkError, ProtocolError
from gpumarket.core.units import Money, format_money, money_from_bytes
from gpumarket.sdk.account import PaidChannelState, Report
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.results import AccountView
from gpumarket.settlement.vouchers import verify_close


async def view(desk: Desk) -> AccountView:
    """Wallet and channel. A scheduler that does not answer leaves its column as it was last known, with a warning."""
    balance = await desk.chain.balance()
    channel = desk.account.current(desk.hub.address)
    if channel is None:
        return AccountView(desk.signer.address, balance, desk.hub.address)
    warnings: tuple[str, ...] = ()
    try:
        channel.report, channel.reported = Report.of(await desk.hub.account(channel.id)), True
    except NetworkError as error:
        warnings = (error.message,)
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
    )


async def deposit(desk: Desk, amount: Money) -> None:
    """Top the channel up; where there is none, one is opened with its usual deposit first."""
    info = await desk.hub.info()
    channel = await desk.account.channel(desk.hub.address, info.channel_margin_seconds)
    await desk.account.require_balance(amount)
    await desk.chain.top_up(channel.id, amount, channel.expires_at)
    await desk.account.seen_deposit(channel, Money(channel.deposit + amount))


async def close(desk: Desk) -> Money:
    """Close at what was used; what came back."""
    channel = desk.account.current(desk.hub.address)
    if channel is None:
        raise ConfigError("there is no open channel to this scheduler", hint="gpumarket wallet balance")
    if channel.open:
        raise ConfigError(f"jobs worth up to {format_money(channel.open)} still run", hint="gpumarket job list, then wait or resume them")
    close_ = await desk.hub.close_channel(channel.id)
    used = _checked(desk, channel, close_.channel, close_.cumulative, close_.signature)
    await desk.account.set_closing(channel.id)
    before = await desk.chain.balance()
    await desk.chain.cooperative_close(channel.id, used, close_.signature)
    return Money(max(0, await desk.chain.balance() - before))


def _checked(desk: Desk, channel: PaidChannelState, found: bytes, cumulative: bytes, signature: bytes) -> Money:
    used = money_from_bytes(cumulative)
    if found != channel.id:
        raise ProtocolError("the scheduler signed the close of another channel")
    entry = desk.chain.channels.get(channel.id)
    claimed = entry.claimed if entry is not None else 0  # redeemed already: no close brings that back, and W bounds it
    if used > max(channel.billed, claimed):
        raise ProtocolError(
            f"the scheduler wants to close at {format_money(used)}; your own acks add up to {format_money(channel.billed)}",
            hint="gpumarket job list shows what was acked; without its consent the channel closes at its expiry",
        )
    verify_close(desk.chain.channels_domain, channel.id, used, signature, channel.scheduler)
    return used

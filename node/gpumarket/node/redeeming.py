"""A provider's vouchers into tokens: by policy while the daemon runs, and from the journal alone when it does not.

A running daemon is asked through `settlement.redeem_request`. Invariant: two processes never work on one journal; the state folder's lock
decides which way it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from gpumarket.core import keystore
from gpumarket.core.daemon import StateFolder
from gpumarket.core.errors import ConfigError
from gpumarket.core.ports import Clock, SystemClock
from gpumarket.core.settings import ChainSettings
from gpumarket.core.units import Address, Hash, parse_money
from gpumarket.node.accounts import Accounts, HeldVoucher
from gpumarket.node.settings import ProviderSettings
from gpumarket.node.tables import metadata
from gpumarket.settlement.chain import Actions, ChainEvent, ChainView, ChannelChanged, Follower, Sender, connect
from gpumarket.settlement.channel import ReceivedChannel
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.redeem import RedeemPolicy
from gpumarket.settlement.redeemer import Redeemer, Redemption

JOURNAL = "journal.db"


def journal_url(state: Path) -> str:
    """Database of a provider's journal."""
    return f"sqlite:///{(state / JOURNAL).resolve()}"


def make_redeemer(
    settings: ProviderSettings,
    actions: Actions,
    journal: Journal,
    vouchers: Callable[[], Iterable[HeldVoucher]],
    view: ChainView,
    clock: Clock,
    on_redeemed: Callable[[Redemption], None] = lambda redemption: None,
) -> Redeemer:
    """The redeemer of this provider's channels."""
    redeemed: dict[Hash, int] = {}

    def note(redemption: Redemption) -> None:
        redeemed[redemption.channel] = redeemed.get(redemption.channel, 0) + redemption.amount

    def arrived(redemption: Redemption) -> None:
        note(redemption)
        on_redeemed(redemption)

    def source() -> list[ReceivedChannel]:
        return [c for c in (_received(v, view, redeemed.get(v.channel, 0)) for v in vouchers()) if c is not None]

    def payer_of(channel: Hash) -> Address:
        return view.channels[channel].payer

    policy = RedeemPolicy(
        gas_share_ppm=int(settings.redeem_gas_share * 1_000_000),
        margin_seconds=settings.redeem_margin_seconds,
        exposure_limit=parse_money(settings.redeem_exposure) if settings.redeem_exposure else 0,
    )
    redeemer = Redeemer(
        actions,
        journal,
        source,
        clock,
        payer_of=payer_of,
        policy=policy,
        gas_value=settings.gas_value,
        every_seconds=settings.redeem_seconds,
        on_redeemed=arrived,
    )
    for redemption in redeemer.done():
        note(redemption)
    view.subscribe(lambda event: redeemer.wake() if _is_closing(view, event) else None)
    return redeemer


def _is_closing(view: ChainView, event: ChainEvent) -> bool:
    channel = view.channels.get(event.id) if isinstance(event, ChannelChanged) else None
    return channel is not None and channel.closes_at > 0 and not channel.closed


async def redeem_offline(settings: ProviderSettings, chain_settings: ChainSettings) -> list[Redemption]:
    """Redeem all that the journal holds. Raises StateLocked when the daemon runs: ask it then (`settlement.redeem_request`)."""
    if not (settings.state / JOURNAL).exists():
        raise ConfigError(f"there is no provider's journal in {settings.state}", hint="name the folder with --state")
    with StateFolder(settings.state):
        key = keystore.unlock(settings.key_file, settings.password_file)
        journal = Journal(journal_url(settings.state), metadata)
        journal.open()
        try:
            chain = await connect(chain_settings)
            try:
                keystore.refuse_test_key(key.address, chain.book.chain_id)
                view = ChainView()
                await Follower(chain, view).sync()
                accounts = Accounts(journal)
                await accounts.load(key, chain.market_domain, SystemClock().now())
                actions = Actions(chain, Sender(chain, key, journal))
                return await make_redeemer(settings, actions, journal, accounts.vouchers.values, view, SystemClock()).redeem_now()
            finally:
                await chain.close()
        finally:
            await journal.close()


def _received(voucher: HeldVoucher, view: ChainView, redeemed: int) -> ReceivedChannel | None:
    channel = view.channels.get(voucher.channel)
    if channel is None:
        return None
    return ReceivedChannel(
        id=voucher.channel,
        signer=channel.signer,
        deposit=channel.deposit,
        expires_at=channel.expires_at,
        voucher=voucher.cumulative,
        signature=voucher.signature,
        redeemed=max(channel.claimed, redeemed),
        closing=channel.closes_at,
        closed=channel.closed,
    )

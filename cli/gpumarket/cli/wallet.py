"""`gpumarket wallet`: keys and money. Passwords come from a file or a prompt, never from a flag or a variable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gpumarket.cli import buyer, settings
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption, noun, verb
from gpumarket.core.units import format_money, hex0x

app = noun("Keys and money.")
KeyOption = Annotated[Path | None, typer.Option("--key-file", help="Keystore; the client's of the settings by default.")]
PasswordOption = Annotated[Path | None, typer.Option("--password-file", help="File with the password (mode 0600); asked for otherwise.")]


@verb(app, "create")
def create(key_file: KeyOption = None, password_file: PasswordOption = None, config: ConfigOption = None) -> None:
    """Make a new key in an encrypted keystore. An existing file is never overwritten."""
    from gpumarket.core import keystore

    path = key_file or _client(config).key_file
    password = keystore.read_password(password_file) if password_file else buyer.ask_password(f"New password for {path}", confirm=True)
    key = keystore.create(path, password)
    current().emit({"address": hex0x(key.address), "key_file": str(path)})


@verb(app, "address")
def address(key_file: KeyOption = None, config: ConfigOption = None) -> None:
    """The address of a keystore, without opening it."""
    from gpumarket.core import keystore

    path = key_file or _client(config).key_file
    current().emit({"address": hex0x(keystore.address_in(path)), "key_file": str(path)})


@verb(app, "balance")
async def balance(config: ConfigOption = None) -> None:
    """Wallet and channel: what there is, what is promised, what was used."""
    async with buyer.market(config) as market:
        account = await market.account()
    _show_account(account)


@verb(app, "deposit")
async def deposit(amount: Annotated[str, typer.Argument(help="Tokens, e.g. 5 or 0.5.")], config: ConfigOption = None) -> None:
    """Add to the channel's deposit; opens the channel where there is none."""
    async with buyer.market(config) as market:
        account = await market.deposit(amount)
    _show_account(account)


@verb(app, "close-channel")
async def close_channel(config: ConfigOption = None) -> None:
    """Close the channel at what was used; the rest of the deposit comes back at once."""
    async with buyer.market(config) as market:
        refunded = await market.close_channel()
    current().emit({"refunded": refunded}, lambda _: current().text(f"{format_money(refunded)} came back\n"))


@verb(app, "redeem")
async def redeem(
    state: Annotated[Path | None, typer.Option("--state", help="The provider's folder; the settings' one by default.")] = None,
    config: ConfigOption = None,
) -> None:
    """Bring a provider's vouchers to the chain: through its daemon when that runs, else from its journal."""
    import asyncio

    from gpumarket.core.errors import StateLocked
    from gpumarket.node import redeeming
    from gpumarket.node.settings import ProviderSettings
    from gpumarket.settlement import redeem_request

    provider = settings.role(ProviderSettings, config, {"state": state})
    try:
        lines = [redeem_request.as_line(found) for found in await redeeming.redeem_offline(provider, settings.chain(config))]
    except StateLocked:
        lines = await asyncio.to_thread(redeem_request.ask_daemon, provider.state)
    current().emit(lines)


@verb(app, "withdraw")
async def withdraw(config: ConfigOption = None) -> None:
    """Pull what batch redemptions credited to this wallet in the channels' contract."""
    from gpumarket.cli.withdrawal import withdraw_credit
    from gpumarket.core import keystore

    client = _client(config)
    password = (
        keystore.read_password(client.password_file) if client.password_file else buyer.ask_password(f"Password of {client.key_file}")
    )
    amount = await withdraw_credit(client, settings.chain(config), password)
    current().emit({"withdrawn": amount}, lambda _: current().text(f"{format_money(amount)} withdrawn\n"))


def _show_account(account: Any) -> None:
    document = {
        "address": hex0x(account.address),
        "balance": account.balance,
        "scheduler": hex0x(account.scheduler),
        "channel": hex0x(account.channel) if account.channel else "",
        "deposit": account.deposit,
        "voucher": account.voucher,
        "billed": account.billed,
        "held": account.held,
        "open": account.open,
        "expires_at": account.expires_at,
        "warnings": list(account.warnings),
    }
    money = ("balance", "deposit", "voucher", "billed", "held", "open")
    current().emit(document, lambda _: current().table({k: format_money(v) if k in money else v for k, v in document.items()}))


def _client(config: Path | None) -> Any:
    from gpumarket.sdk.settings import ClientSettings

    return settings.role(ClientSettings, config)

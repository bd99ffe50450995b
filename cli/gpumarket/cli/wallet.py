"""`gpumarket wallet`: keys and money. Passwords come from a file or a prompt, never from a flag or a variable."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpumarket.cli import buyer, settings
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption, noun, verb
from gpumarket.core.errors import ConfigError
from gpumarket.core.units import Address, Hash, Money, format_money, hex0x, parse_address, parse_hash, parse_money

if TYPE_CHECKING:
    from gpumarket.sdk.settings import ClientSettings

app = noun("Keys and money.")
KeyOption = Annotated[Path | None, typer.Option("--key-file", help="Keystore; the client's of the settings by default.")]
PasswordOption = Annotated[Path | None, typer.Option("--password-file", help="File with the password (mode 0600); asked for otherwise.")]
NewPasswordOption = Annotated[Path | None, typer.Option("--new-password-file", help="File with the new password; asked for otherwise.")]


@verb(app, "create")
def create(key_file: KeyOption = None, password_file: PasswordOption = None, config: ConfigOption = None) -> None:
    """Make a new key in an encrypted keystore. An existing file is never overwritten."""
    from gpumarket.core import keystore, private_files

    path = key_file or _client(config).key_file
    private_files.refuse_existing(path)
    key = keystore.create(path, _new_password(path, password_file), n=keystore.SCRYPT_N_CHOSEN)
    current().emit({"address": hex0x(key.address), "key_file": str(path)})


@verb(app, "address")
def address(key_file: KeyOption = None, config: ConfigOption = None) -> None:
    """The address of a keystore, without opening it."""
    from gpumarket.core import keystore

    path = key_file or _client(config).key_file
    current().emit({"address": hex0x(keystore.address_in(path)), "key_file": str(path)})


@verb(app, "show")
async def show(config: ConfigOption = None) -> None:
    """Your keys and what each may do, and the day's cap; asks no chain and opens no key."""
    from gpumarket.core import keystore
    from gpumarket.sdk.funding import owner_of

    client = _client(config)
    key, owner = keystore.address_in(client.key_file), owner_of(client)
    current().emit(
        {
            "payment_key": hex0x(key),
            "payment_key_file": str(client.key_file),
            "owner": hex0x(owner or key),
            "owner_key_file": str(client.owner_key_file or ("" if owner else client.key_file)),
            "separate_keys": owner is not None,
            **await _spending(client),
        }
    )


@verb(app, "export")
def export(
    file: Annotated[Path, typer.Argument(help="New keystore file.")],
    key_file: KeyOption = None,
    password_file: PasswordOption = None,
    new_password_file: NewPasswordOption = None,
    config: ConfigOption = None,
) -> None:
    """Write the key to another keystore, encrypted anew. There is no way to see it in plain."""
    from gpumarket.core import keystore, private_files

    client = _client(config)
    private_files.refuse_existing(file)
    key = buyer.unlock(key_file or client.key_file, password_file or (client.password_file if key_file is None else None))
    keystore.create(file, _new_password(file, new_password_file), key.secret, n=keystore.SCRYPT_N_CHOSEN)
    current().emit({"address": hex0x(key.address), "file": str(file)})
    current().note("what this key has signed is not in the file: gpumarket guard export FILE")


@verb(app, "import")
def import_(
    file: Annotated[Path, typer.Argument(help="A version 3 keystore.")],
    key_file: KeyOption = None,
    password_file: Annotated[
        Path | None, typer.Option("--password-file", help="File with the password of FILE; asked for otherwise.")
    ] = None,
    new_password_file: NewPasswordOption = None,
    config: ConfigOption = None,
) -> None:
    """Take a key from another keystore into yours, encrypted anew. A weak derivation is refused; nothing is overwritten."""
    from gpumarket.core import keystore, private_files

    path = key_file or _client(config).key_file
    private_files.refuse_existing(path)
    document = keystore.read_document(file)
    password = keystore.read_password(password_file) if password_file else buyer.ask_password(f"Password of {file}")
    key = keystore.open_document(file, document, password)
    keystore.create(path, _new_password(path, new_password_file), key.secret, n=keystore.SCRYPT_N_CHOSEN)
    current().emit({"address": hex0x(key.address), "key_file": str(path)})
    current().note(
        "a key that has signed vouchers needs its guard: gpumarket guard import FILE; on channels it does not know it will not sign"
    )


@verb(app, "limit")
async def limit(
    amount: Annotated[
        str | None, typer.Argument(help="Most that vouchers may add within 24 hours, in tokens; shows it when left out.")
    ] = None,
    none: Annotated[bool, typer.Option("--none", help="Take the journal's limit away; one in the settings stays.")] = False,
    config: ConfigOption = None,
) -> None:
    """Show or set the day's cap. Jobs that would pass it are refused before anything is signed, with the time when enough is free."""
    from gpumarket.core.ports import SystemClock
    from gpumarket.sdk import spending
    from gpumarket.sdk.offline import journal_of

    client = _client(config)
    if amount is not None and none:
        raise ConfigError("give either an amount or --none", hint="gpumarket wallet limit --help")
    if amount is not None or none:
        value = None if amount is None else _money(amount)
        async with journal_of(client) as journal:
            await journal.transact(lambda c: spending.set_limit(c, SystemClock().now(), value))
    day = await _spending(client)
    current().emit(day, lambda _: current().table({k: v if k == "day_frees_at" or v is None else format_money(v) for k, v in day.items()}))


@verb(app, "balance")
async def balance(config: ConfigOption = None) -> None:
    """Wallet and channel: what there is, what is promised, what was used."""
    async with buyer.market(config) as market:
        account = await market.account()
    _show_account(account)


@verb(app, "deposit")
async def deposit(amount: Annotated[str, typer.Argument(help="Tokens, e.g. 5 or 0.5.")], config: ConfigOption = None) -> None:
    """Add to the channel's deposit; opens the channel where there is none. Paid by the owner's key where the settings name one."""
    async with buyer.market(config, paying=True) as market:
        account = await market.deposit(amount)
    _show_account(account)


@verb(app, "close-channel")
async def close_channel(
    alone: Annotated[
        bool, typer.Option("--alone", help="Ask no scheduler: request the close on chain, and close when its window is over.")
    ] = False,
    channel: Annotated[str | None, typer.Option("--channel", help="With --alone, this channel only, e.g. of a lost payment key.")] = None,
    config: ConfigOption = None,
) -> None:
    """Close the channel at what was used; the rest of the deposit comes back at once, to the owner. With --alone each run does what is due,
    and says when to come back."""
    if alone:
        await _leave(channel, config)
        return
    if channel is not None:
        raise ConfigError("--channel goes with --alone", hint="gpumarket wallet close-channel --help")
    async with buyer.market(config, paying=True) as market:
        refunded = await market.close_channel()
    current().emit({"refunded": refunded}, lambda _: current().text(f"{format_money(refunded)} came back\n"))


async def _leave(channel: str | None, config: Path | None) -> None:
    from gpumarket.sdk.leaving import Step, leave_alone

    client = _client(config)
    found = await leave_alone(client, settings.chain(config), buyer.payer_key(client), channel=None if channel is None else _hash(channel))
    rows: list[dict[str, Any]] = [
        {
            "channel": hex0x(leaving.channel),
            "scheduler": hex0x(leaving.scheduler),
            "state": str(leaving.step),
            "closes_at": leaving.closes_at,
            "refunded": leaving.refunded,
        }
        for leaving in found
    ]
    current().emit(rows, lambda _: current().table([row | {"refunded": format_money(row["refunded"])} for row in rows]))
    waiting = [leaving.closes_at for leaving in found if leaving.step is not Step.CLOSED]
    if waiting:
        when = datetime.datetime.fromtimestamp(max(waiting), datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        current().note(f"the scheduler may redeem what it holds until then; run this again after {when}")


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
async def withdraw(
    to: Annotated[
        str | None, typer.Option("--to", help="Address that gets it, e.g. your owner key's; the wallet itself by default.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Pull what batch redemptions credited to this wallet in the channels' contract."""
    from gpumarket.cli.withdrawal import withdraw_credit

    client = _client(config)
    target = None if to is None else _address(to)
    key = buyer.unlock(client.key_file, client.password_file)
    amount = await withdraw_credit(client, settings.chain(config), key, target)
    current().emit({"withdrawn": amount}, lambda _: current().text(f"{format_money(amount)} withdrawn\n"))


def _show_account(account: Any) -> None:
    document = {
        "address": hex0x(account.address),
        "owner": hex0x(account.owner),
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


def _client(config: Path | None) -> ClientSettings:
    from gpumarket.sdk.settings import ClientSettings

    return settings.role(ClientSettings, config)


async def _spending(client: ClientSettings) -> dict[str, Any]:
    from gpumarket.core.ports import SystemClock
    from gpumarket.sdk import spending
    from gpumarket.sdk.offline import journal_of

    async with journal_of(client) as journal:
        day = journal.read(lambda c: spending.standing(c, SystemClock().now(), client.spend_limit_amount))
    return {"day_limit": day.limit, "day_spent": day.spent, "day_left": day.left, "day_frees_at": day.frees_at if day.spent else 0}


def _new_password(path: Path, file: Path | None) -> str:
    from gpumarket.core import keystore

    return keystore.read_password(file) if file else buyer.ask_password(f"New password for {path}", confirm=True)


def _money(text: str) -> Money:
    try:
        return parse_money(text)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _hash(text: str) -> Hash:
    try:
        return parse_hash(text)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _address(text: str) -> Address:
    try:
        return parse_address(text)
    except ValueError as error:
        raise ConfigError(str(error)) from error

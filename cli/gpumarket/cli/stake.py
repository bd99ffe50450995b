"""`gpumarket stake`: the stake behind a provider or scheduler, moved by its owner's key, which no daemon ever holds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpumarket.cli import buyer, settings
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption, noun, verb
from gpumarket.core.errors import ConfigError
from gpumarket.core.units import Address, Money, format_money, hex0x, parse_address, parse_money

if TYPE_CHECKING:
    from gpumarket.settlement.chain import Actions

app = noun("The stake of a node, by its owner's key.")
OperatorArgument = Annotated[str, typer.Argument(help="Address of the daemon's key.")]
AmountArgument = Annotated[str, typer.Argument(help="Tokens, e.g. 100.")]
KeyOption = Annotated[Path | None, typer.Option("--key-file", help="The owner's keystore; the client's owner key by default.")]
PasswordOption = Annotated[Path | None, typer.Option("--password-file", help="File with its password (mode 0600); asked for otherwise.")]


@verb(app, "approve")
async def approve(
    operator: OperatorArgument,
    revoke: Annotated[bool, typer.Option("--revoke", help="No longer agree; a node that is registered keeps its owner.")] = False,
    key_file: KeyOption = None,
    password_file: PasswordOption = None,
    config: ConfigOption = None,
) -> None:
    """Agree to own the stake of a daemon that names you as its owner; before it registers."""
    async with _owner(config, key_file, password_file) as actions:
        await actions.approve_operator(_address(operator), not revoke)
    current().emit({"operator": operator.lower(), "owner": hex0x(actions.sender.address), "approved": not revoke})


@verb(app, "add")
async def add(
    operator: OperatorArgument,
    amount: AmountArgument,
    key_file: KeyOption = None,
    password_file: PasswordOption = None,
    config: ConfigOption = None,
) -> None:
    """Add to the stake of a registered node of yours; it is paid from your tokens."""
    value = _money(amount)
    async with _owner(config, key_file, password_file) as actions:
        await _own(actions, operator)
        await actions.approve()
        await actions.stake(value, _address(operator))
        await _emit(actions, operator)


@verb(app, "unbond")
async def unbond(
    operator: OperatorArgument,
    amount: AmountArgument,
    key_file: KeyOption = None,
    password_file: PasswordOption = None,
    config: ConfigOption = None,
) -> None:
    """Start taking stake out. It can be slashed until the delay is over, which counts anew for all that is unbonding."""
    value = _money(amount)
    async with _owner(config, key_file, password_file) as actions:
        await _own(actions, operator)
        await actions.begin_unbond(_address(operator), value)
        await _emit(actions, operator)


@verb(app, "withdraw")
async def withdraw(
    operator: OperatorArgument, key_file: KeyOption = None, password_file: PasswordOption = None, config: ConfigOption = None
) -> None:
    """Take out what has finished unbonding and no dispute holds."""
    async with _owner(config, key_file, password_file) as actions:
        await _own(actions, operator)
        await actions.withdraw_stake(_address(operator))
        await _emit(actions, operator)


@verb(app, "show")
async def show(operator: OperatorArgument, config: ConfigOption = None) -> None:
    """Owner and stake of a node, as the registry has them."""
    from gpumarket.settlement.chain import connect

    chain = await connect(settings.chain(config))
    try:
        document = _document(operator, await _node(chain, operator))
    finally:
        await chain.close()
    _print(document)


@asynccontextmanager
async def _owner(config: Path | None, key_file: Path | None, password_file: Path | None) -> AsyncIterator[Actions]:
    """The chain with the owner's key; its nonces lie in a journal of its own in the client's folder."""
    from gpumarket.core import keystore
    from gpumarket.core.daemon import StateFolder
    from gpumarket.sdk.funding import owner_journal
    from gpumarket.sdk.logs import log_to_stderr
    from gpumarket.sdk.settings import ClientSettings
    from gpumarket.settlement.chain import Actions, Sender, connect

    log_to_stderr()
    client = settings.role(ClientSettings, config)
    if key_file is None and client.owner_key_file is None:
        raise ConfigError("whose stake is it?", hint="name the owner's keystore: --key-file, or GPUMARKET_CLIENT_OWNER_KEY_FILE")
    path = key_file or client.owner_key_file
    assert path is not None
    key = buyer.unlock(path, password_file or (client.owner_password_file if key_file is None else None))
    with StateFolder(client.state) as state:
        journal = owner_journal(state, key.address)
        try:
            chain = await connect(settings.chain(config))
            try:
                keystore.refuse_test_key(key.address, chain.book.chain_id)
                sender = Sender(chain, key, journal)
                yield Actions(chain, sender)
                await sender.close()
            finally:
                await chain.close()
        finally:
            await journal.close()


async def _own(actions: Actions, operator: str) -> None:
    """Raises ConfigError unless the node is registered and ours: the contract would only refuse after the gas is paid."""
    node = await _node(actions.chain, operator)
    if parse_address(node["owner"]) != actions.sender.address:
        raise ConfigError(
            f"the owner of {operator} is {node['owner'].lower()}, not {hex0x(actions.sender.address)}",
            hint="use its key: --key-file" if int(node["owner"], 16) else "start the daemon once: it registers, then its owner stakes",
        )


async def _node(chain: Any, operator: str) -> dict[str, Any]:
    from gpumarket.settlement.chain.connection import reachable

    with reachable(chain.settings.rpc_url):
        call = chain.registry.functions.node(chain.w3.to_checksum_address(_address(operator)))
        values = await call.call()
    (function,) = [entry for entry in chain.registry.abi if entry.get("name") == "node" and entry["type"] == "function"]
    return dict(zip((part["name"] for part in function["outputs"][0]["components"]), values, strict=True))


async def _emit(actions: Actions, operator: str) -> None:
    _print(_document(operator, await _node(actions.chain, operator)))


def _document(operator: str, node: dict[str, Any]) -> dict[str, Any]:
    return {
        "operator": operator.lower(),
        "owner": str(node["owner"]).lower(),
        "roles": node["roles"],
        "stake": node["stake"],
        "unbonding": node["unbonding"],
        "available_at": node["availableAt"],
        "locked": node["locked"],
    }


def _print(document: dict[str, Any]) -> None:
    money = ("stake", "unbonding", "locked")
    current().emit(document, lambda _: current().table({k: format_money(v) if k in money else v for k, v in document.items()}))


def _address(text: str) -> Address:
    try:
        return parse_address(text)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _money(text: str) -> Money:
    try:
        return parse_money(text)
    except ValueError as error:
        raise ConfigError(str(error)) from error

"""`gpumarket gateway`: sell the market on to programs that speak OpenAI's API, each with a key and a budget of its own."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpumarket.cli import buyer, daemons, settings
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption, noun, verb
from gpumarket.core.errors import ConfigError
from gpumarket.core.units import Money, format_money, parse_money

if TYPE_CHECKING:
    from gpumarket.gateway.keys import Key

app = noun("An OpenAI endpoint on the market, with keys and budgets.")
key_app = noun("API keys of a gateway.")
app.add_typer(key_app, name="key", help="API keys: create, list, revoke.")
StateOption = Annotated[Path | None, typer.Option("--state", help="The gateway's folder: keys, ledger.")]


@verb(app, "start")
def start(
    config: ConfigOption = None,
    state: StateOption = None,
    listen: Annotated[str | None, typer.Option(help="host:port of the API; port 0 takes a free one.")] = None,
) -> None:
    """Run a gateway until SIGTERM, which drains; a second one ends at once. It pays with the wallet of the [client] table."""
    from gpumarket.gateway.daemon import main
    from gpumarket.gateway.settings import GatewaySettings
    from gpumarket.sdk import ClientSettings

    gateway = settings.role(GatewaySettings, config, {"state": state, "listen": listen})
    client = settings.role(ClientSettings, config)
    main(gateway, client, settings.chain(config), password=buyer.asked_password(client.key_file, client.password_file))


@verb(app, "status")
def status(config: ConfigOption = None, state: StateOption = None) -> None:
    """Whether the gateway of a state folder runs, and where."""
    current().emit(daemons.ready_file(_state(config, state), "gateway"))


@verb(key_app, "create")
def create(
    name: Annotated[str, typer.Argument(help="What you call it.")],
    day: Annotated[str | None, typer.Option("--per-day", help="Most it may spend in a UTC day, in tokens: 0.5.")] = None,
    total: Annotated[str | None, typer.Option("--total", help="Most it may ever spend, in tokens.")] = None,
    per_minute: Annotated[int | None, typer.Option("--per-minute", min=1, help="Most requests a minute.")] = None,
    model: Annotated[list[str] | None, typer.Option("--model", help="An alias that it may use, once for each; all without.")] = None,
    config: ConfigOption = None,
    state: StateOption = None,
) -> None:
    """Make a key. It is shown once, on stdout; only its hash is kept."""
    from gpumarket.gateway.keys import KeyFile, Limits

    limits = Limits(_money(day, "--per-day"), _money(total, "--total"), per_minute, frozenset(model) if model else None)
    with closing(KeyFile(_state(config, state))) as keys:
        made, secret = keys.create(name, limits)
    current().note(f"{made.id}: keep it, it is not shown again")
    current().emit({**_document(made), "key": secret}, lambda _: current().text(f"{secret}\n"))


@verb(key_app, "list")
def list_keys(config: ConfigOption = None, state: StateOption = None) -> None:
    """All keys, what each may do and has spent."""
    from gpumarket.core.ports import SystemClock
    from gpumarket.gateway.keys import KeyFile
    from gpumarket.gateway.ledger import spent_by_key

    folder = _state(config, state)
    with closing(KeyFile(folder)) as keys:
        found = keys.all()
    spent = spent_by_key(folder, [key.id for key in found], SystemClock())
    documents = [_document(key) | {"spent_today": spent[key.id][0], "spent": spent[key.id][1]} for key in found]
    current().emit(documents, lambda _: current().table([_row(document) for document in documents], title="API keys"))


@verb(key_app, "revoke")
def revoke(key: Annotated[str, typer.Argument(help="Its id or name.")], config: ConfigOption = None, state: StateOption = None) -> None:
    """End a key: a gateway that runs refuses it within a second. What it has spent stays on record."""
    from gpumarket.gateway.keys import KeyFile

    with closing(KeyFile(_state(config, state))) as keys:
        document = _document(keys.revoke(key))
    current().emit(document, lambda _: current().table(_row(document)))


def _state(config: Path | None, state: Path | None) -> Path:
    from gpumarket.gateway.settings import GatewaySettings

    return settings.role(GatewaySettings, config, {"state": state}).state


def _money(text: str | None, option: str) -> Money | None:
    if text is None:
        return None
    try:
        return parse_money(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from error


def _document(key: Key) -> dict[str, Any]:
    """For programs: money in base units."""
    limits = key.limits
    return {
        "id": key.id,
        "name": key.name,
        "per_day": limits.day,
        "total": limits.total,
        "per_minute": limits.per_minute,
        "models": None if limits.models is None else sorted(limits.models),
        "created_at": key.created_at,
        "revoked_at": key.revoked_at,
    }


def _row(document: dict[str, Any]) -> dict[str, Any]:
    """For people: money in tokens, times as dates; no limit is "any"."""
    money = ("per_day", "total", "spent_today", "spent")
    row: dict[str, Any] = {name: format_money(value) if name in money and value is not None else value for name, value in document.items()}
    for name in ("created_at", "revoked_at"):
        row[name] = datetime.fromtimestamp(document[name], UTC).strftime("%Y-%m-%d %H:%M") if document[name] else ""
    return {name: "any" if value is None else value for name, value in row.items()}

"""`gpumarket provider`: sell the work of your GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gpumarket.cli import daemons, settings
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption, noun, verb

app = noun("Sell the work of your GPUs.")
StateOption = Annotated[Path | None, typer.Option("--state", help="The provider's folder: journal, keys of its server.")]


@verb(app, "start")
def start(
    config: ConfigOption = None,
    state: StateOption = None,
    listen: Annotated[str | None, typer.Option(help="host:port of the Provider service; port 0 takes a free one.")] = None,
    advertise: Annotated[str | None, typer.Option(help="host:port that others reach it at.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="Wallet key.")] = None,
    password_file: Annotated[Path | None, typer.Option(help="File with the key's password, mode 0600.")] = None,
) -> None:
    """Run a provider until SIGTERM, which drains; a second one ends at once."""
    from gpumarket.node.daemon import main
    from gpumarket.node.settings import ProviderSettings

    flags = {"state": state, "listen": listen, "advertise": advertise, "key_file": key_file, "password_file": password_file}
    provider = settings.role(ProviderSettings, config, flags)
    main(provider, settings.chain(config), password=daemons.asked_password(provider.key_file, provider.password_file))


@verb(app, "status")
def status(config: ConfigOption = None, state: StateOption = None) -> None:
    """Whether the provider of a state folder runs, where, and what it sells."""
    from gpumarket.node.settings import ProviderSettings

    current().emit(daemons.ready_file(settings.role(ProviderSettings, config, {"state": state}).state, "provider"))

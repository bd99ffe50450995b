"""`gpumarket scheduler`: match jobs to providers for a fee."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gpumarket.cli import daemons, settings
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption, noun, verb

app = noun("Match jobs to providers for a fee.")
StateOption = Annotated[Path | None, typer.Option("--state", help="The scheduler's folder: ledger, keys of its server.")]


@verb(app, "start")
def start(
    config: ConfigOption = None,
    state: StateOption = None,
    listen: Annotated[str | None, typer.Option(help="host:port of the Market service; port 0 takes a free one.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="Wallet key.")] = None,
    password_file: Annotated[Path | None, typer.Option(help="File with the key's password, mode 0600.")] = None,
) -> None:
    """Run a scheduler until SIGTERM, which drains; a second one ends at once."""
    from gpumarket.scheduler.daemon import main
    from gpumarket.scheduler.settings import SchedulerSettings

    flags = {"state": state, "listen": listen, "key_file": key_file, "password_file": password_file}
    scheduler = settings.role(SchedulerSettings, config, flags)
    main(scheduler, settings.chain(config), password=daemons.asked_password(scheduler.key_file, scheduler.password_file))


@verb(app, "status")
def status(config: ConfigOption = None, state: StateOption = None) -> None:
    """Whether the scheduler of a state folder runs, and where."""
    from gpumarket.scheduler.settings import SchedulerSettings

    current().emit(daemons.ready_file(settings.role(SchedulerSettings, config, {"state": state}).state, "scheduler"))

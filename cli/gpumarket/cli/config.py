"""`gpumarket config`: the settings in force, and where each value comes from."""

from __future__ import annotations

import importlib
import os
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gpumarket.cli import settings
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption, noun, verb
from gpumarket.core.settings import ENV_PREFIX, Settings

app = noun("The settings in force.")
_CLASSES = {
    "chain": "gpumarket.core.settings:ChainSettings",
    "client": "gpumarket.sdk.settings:ClientSettings",
    "gateway": "gpumarket.gateway.settings:GatewaySettings",
    "provider": "gpumarket.node.settings:ProviderSettings",
    "scheduler": "gpumarket.scheduler.settings:SchedulerSettings",
}


class Section(StrEnum):
    """Tables of the settings file."""

    chain = "chain"
    client = "client"
    gateway = "gateway"
    provider = "provider"
    scheduler = "scheduler"


@verb(app, "show")
def show(
    section: Annotated[Section | None, typer.Argument(help="One table; all of them by default.")] = None,
    config: ConfigOption = None,
) -> None:
    """Every setting, its value, and whether a variable, the file or the default gave it. Secrets are never settings, so none is shown."""
    file = settings.config_file(config)
    rows = [row for name in ([section] if section else list(Section)) for row in _rows(name, file)]
    current().emit(rows)


def _rows(section: Section, file: Path | None) -> list[dict[str, Any]]:
    module, _, name = _CLASSES[section].partition(":")
    cls: type[Settings] = getattr(importlib.import_module(module), name)
    values = settings.role(cls, file).model_dump(mode="json")
    in_file = tomllib.loads(file.read_text()).get(section, {}) if file else {}
    return [
        {"setting": f"{section}.{key}", "value": value, "origin": _origin(section, key, file, in_file)} for key, value in values.items()
    ]


def _origin(section: str, key: str, file: Path | None, in_file: dict[str, Any]) -> str:
    variable = f"{ENV_PREFIX}{section.upper()}_{key.upper()}"
    if variable in os.environ:
        return variable
    return str(file) if key in in_file else "default"

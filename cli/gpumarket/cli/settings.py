"""Where a command finds its settings: --config, else GPUMARKET_CONFIG, else the user's file, else defaults alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from gpumarket.core.settings import ChainSettings, Settings, load

S = TypeVar("S", bound=Settings)


def user_file() -> Path:
    """The user's settings file ($XDG_CONFIG_HOME/gpumarket/config.toml)."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "gpumarket" / "config.toml"


def config_file(given: Path | None) -> Path | None:
    """The file in force, or None where there is none."""
    if given is not None:
        return given
    return user_file() if user_file().is_file() else None


def role(cls: type[S], config: Path | None, flags: Mapping[str, Any] | None = None) -> S:
    """One role's settings, flags over variables over the file over defaults. Raises ConfigError."""
    return load(cls, file=config_file(config), flags=flags)


def chain(config: Path | None) -> ChainSettings:
    """Which chain and contracts."""
    return load(ChainSettings, file=config_file(config))

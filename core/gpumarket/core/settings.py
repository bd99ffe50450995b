"""Configuration: one TOML file, `GPUMARKET_*` variables, flags; flags win, then variables, then the file, then defaults.

A role's settings are one frozen `Settings` class, read from the file's section of the same name. A key that no setting has is an error with
the nearest name. Secrets are never settings: they are paths to files.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from gpumarket.core.errors import ConfigError
from gpumarket.core.units import Address, parse_address

S = TypeVar("S", bound="Settings")
ENV_PREFIX = "GPUMARKET_"


class Settings(BaseModel):
    """Base of every role's settings. `section` is its table in the TOML file and the middle of its variables' names."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    section: ClassVar[str] = ""


class StakedSettings(Settings):
    """Base of the roles that stake."""

    owner: str = ""
    """Address of a cold key that owns the stake; empty: this daemon's own key does. The owner agrees with `gpumarket stake approve` and
    stakes with `gpumarket stake add`; whoever steals the daemon's key can then not take the stake out."""

    @field_validator("owner")
    @classmethod
    def _is_address(cls, value: str) -> str:
        if value:
            parse_address(value)
        return value

    @property
    def owner_address(self) -> Address | None:
        """Who owns the stake, None for the daemon's own key."""
        return parse_address(self.owner) if self.owner else None


class ChainSettings(Settings):
    """Which chain, and which contracts on it."""

    section: ClassVar[str] = "chain"
    rpc_url: str = "http://127.0.0.1:8545"
    address_book: Path = Path("contracts.json")
    """File that `gpumarket.contracts.deploy` writes: chain id, addresses, code hashes."""
    confirmations: int = 2
    """Blocks on top of an event before money decisions follow it."""
    poll_seconds: float = 0.5
    audit_seconds: float = 10.0
    """Between two comparisons of some of what did not change with the contracts' own state; what changed is compared at once. Events that a
    node leaves out are found by it: in a few of these, where a daemon's channels are few."""
    check_url: str = ""
    """A second endpoint of the same chain, of somebody else, for state reads that must agree with the first one's events; empty: the first
    one is compared with itself."""
    stale_seconds: float = 300.0
    """Without news from the chain for so long, nobody takes on new work that its money depends on."""


def load(cls: type[S], *, file: Path | None = None, flags: Mapping[str, Any] | None = None, env: Mapping[str, str] = os.environ) -> S:
    """Settings of one role. Raises ConfigError naming the key, where it came from and the nearest right name.

    Variables: GPUMARKET_<SECTION>_<KEY>. Flags with value None count as not given.
    """
    values = _from_file(cls, file) if file else {}
    values |= _from_env(cls, env)
    values |= {key: value for key, value in (flags or {}).items() if value is not None}
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or cls.section
        hint = "" if name in cls.model_fields else _nearest(name, cls)
        raise ConfigError(f"setting {cls.section}.{name}: {first['msg']}", hint=hint) from error


def _from_file(cls: type[Settings], file: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", hint="give another file with --config") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
    values = document.get(cls.section, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: [{cls.section}] must be a table")
    for key in values:
        if key not in cls.model_fields:
            raise ConfigError(f"{file}: [{cls.section}] has no setting {key!r}", hint=_nearest(key, cls))
    return values


def _from_env(cls: type[Settings], env: Mapping[str, str]) -> dict[str, Any]:
    prefix = f"{ENV_PREFIX}{cls.section.upper()}_"
    values: dict[str, Any] = {}
    for name, value in env.items():
        if not name.startswith(prefix):
            continue
        key = name.removeprefix(prefix).lower()
        if key not in cls.model_fields:
            raise ConfigError(f"variable {name}: [{cls.section}] has no setting {key!r}", hint=_nearest(key, cls))
        values[key] = value
    return values


def _nearest(key: str, cls: type[Settings]) -> str:
    close = difflib.get_close_matches(key, cls.model_fields, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known settings: {', '.join(sorted(cls.model_fields))}"

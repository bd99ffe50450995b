"""The command line's client: opened from the settings in force, its password asked for where no file gives it."""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gpumarket.cli import settings
from gpumarket.core import keystore
from gpumarket.core.errors import ConfigError
from gpumarket.core.units import format_money, hex0x

if TYPE_CHECKING:
    from gpumarket.core.signing import LocalKey
    from gpumarket.sdk import Client, ClientSettings
    from gpumarket.sdk.results import InferResult, JobOutcome


@asynccontextmanager
async def market(config: Path | None, *, paying: bool = False) -> AsyncIterator[Client]:
    """An open client; `paying` opens the owner's key too, where the settings name one. Raises ConfigError, WalletError, NetworkError."""
    from gpumarket.sdk import Client, ClientSettings

    client_settings = settings.role(ClientSettings, config)
    password = asked_password(client_settings.key_file, client_settings.password_file)
    owner_key = _owner_key(client_settings) if paying else None
    async with Client(client_settings, settings.chain(config), password=password, owner_key=owner_key) as client:
        yield client


def payer_key(client: ClientSettings) -> LocalKey:
    """The key that pays: the owner's where the settings name an owner, else the payment key. Raises ConfigError, WalletError."""
    owner = _owner_key(client)
    if owner is not None:
        return owner
    return keystore.unlock(client.key_file, client.password_file, asked_password(client.key_file, client.password_file))


def _owner_key(client: ClientSettings) -> LocalKey | None:
    if client.owner_key_file is not None:
        return unlock(client.owner_key_file, client.owner_password_file)
    if client.owner:
        raise ConfigError(f"this takes the key of the owner {client.owner}", hint="name its file: GPUMARKET_CLIENT_OWNER_KEY_FILE")
    return None


def unlock(key_file: Path, password_file: Path | None) -> LocalKey:
    """Open a key that no daemon holds: its password from its file, else from the terminal. Raises ConfigError, WalletError."""
    if password_file is not None:
        return keystore.load(key_file, keystore.read_password(password_file))
    if not sys.stdin.isatty():
        raise ConfigError(f"the key {key_file} needs a password", hint="name its password file, or run this on a terminal")
    return keystore.load(key_file, ask_password(f"Password of {key_file}"))


def asked_password(key_file: Path, password_file: Path | None) -> str | None:
    """The password from the terminal, where neither a credential nor a file is to give it; None where one does or nobody can be asked."""
    if password_file is not None or keystore.credential() is not None or not sys.stdin.isatty():
        return None
    return ask_password(f"Password of {key_file}")


def ask_password(prompt: str, *, confirm: bool = False) -> str:
    """A password from the terminal; never echoed, never from argv."""
    text: str = typer.prompt(prompt, hide_input=True, confirmation_prompt=confirm, err=True)
    return text


def outcome_document(result: JobOutcome) -> dict[str, Any]:
    """What every result carries, for programs."""
    return {
        "job": hex0x(result.job),
        "model": result.model,
        "provider": hex0x(result.provider),
        "verdict": {"state": str(result.verdict.state), "reason": result.verdict.reason},
        "cost": result.cost,
        "check_cost": result.check_cost,
        "total_cost": result.total_cost,
        "usage": {"prompt_tokens": result.usage.prompt_tokens, "output_tokens": result.usage.output_tokens},
        "attempts": [
            {"number": a.number, "provider": hex0x(a.provider), "outcome": a.outcome, "units": a.units, "amount": a.amount}
            for a in result.attempts
        ],
        "rejected": [{"job": hex0x(r.job), "provider": hex0x(r.provider), "reason": r.reason, "cost": r.cost} for r in result.rejected],
        "receipt": hex0x(result.receipt.struct_hash) if result.receipt is not None else None,
        "warnings": [str(warning) for warning in result.warnings],
    }


def tensors_document(result: InferResult) -> dict[str, Any]:
    """Output tensors for programs: nested lists by name. Floats that are not finite have no JSON; they come as null."""
    return {name: _finite(array.tolist()) for name, array in result.outputs.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def outcome_line(result: JobOutcome) -> str:
    """The same in a line for people."""
    checked = f"{result.verdict.state}" + (f" ({result.verdict.reason})" if result.verdict.reason else "")
    total = format_money(result.total_cost)
    return f"job {hex0x(result.job)[:18]}  provider {hex0x(result.provider)}  {checked}  cost {total}"

"""The command line's client: opened from the settings in force, its password asked for where no file gives it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gpumarket.cli import settings
from gpumarket.core.units import format_money, hex0x

if TYPE_CHECKING:
    from gpumarket.sdk import Client
    from gpumarket.sdk.results import JobOutcome


@asynccontextmanager
async def market(config: Path | None) -> AsyncIterator[Client]:
    """An open client. Raises ConfigError, WalletError, NetworkError."""
    from gpumarket.sdk import Client, ClientSettings

    client_settings = settings.role(ClientSettings, config)
    password = None
    if client_settings.password_file is None and sys.stdin.isatty():
        password = ask_password(f"Password of {client_settings.key_file}")
    async with Client(client_settings, settings.chain(config), password=password) as client:
        yield client


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
        "usage": {"prompt_tokens": result.usage.prompt_tokens, "output_tokens": result.usage.output_tokens},
        "attempts": [
            {"number": a.number, "provider": hex0x(a.provider), "outcome": a.outcome, "units": a.units, "amount": a.amount}
            for a in result.attempts
        ],
        "rejected": [{"job": hex0x(r.job), "provider": hex0x(r.provider), "reason": r.reason} for r in result.rejected],
        "receipt": hex0x(result.receipt.struct_hash),
        "warnings": [str(warning) for warning in result.warnings],
    }


def outcome_line(result: JobOutcome) -> str:
    """The same in a line for people."""
    checked = f"{result.verdict.state}" + (f" ({result.verdict.reason})" if result.verdict.reason else "")
    total = format_money(result.cost + result.check_cost)
    return f"job {hex0x(result.job)[:18]}  provider {hex0x(result.provider)}  {checked}  cost {total}"

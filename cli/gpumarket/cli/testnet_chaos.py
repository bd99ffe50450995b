"""`gpumarket testnet chaos`: a market of processes that is broken on purpose while it works, and audited at the end."""

from __future__ import annotations

import asyncio
import secrets
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpumarket.cli.output import current
from gpumarket.core.errors import ConfigError, VerificationError

if TYPE_CHECKING:
    from gpumarket.testnet.chaos_report import ChaosReport


async def command(
    minutes: Annotated[float, typer.Option("--minutes", min=0.5, max=1_440, help="How long things break.")] = 3.0,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="The same seed breaks the same things; drawn by default.")] = None,
    providers: Annotated[int, typer.Option("--providers", min=2, max=16, help="Honest providers.")] = 3,
    folder: Annotated[Path | None, typer.Option("--dir", help="The testnet's folder, a new one; a temporary one by default.")] = None,
) -> None:
    """Break a market of processes while clients use it: kills, hangs, cut and slow links, partitions, the chain; then audit it.

    The folder keeps faults.jsonl, jobs.jsonl, chaos.json and all logs. Ends with exit code 8 when a job or money is lost, anything is paid
    twice or too much, or a job has no end.
    """
    from gpumarket.testnet import chaos

    running = asyncio.current_task()
    assert running is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    place = folder or Path(tempfile.mkdtemp(prefix="gpumarket-chaos-"))
    if place.exists() and any(place.iterdir()):
        raise ConfigError(f"{place} is not empty: a run begins with an empty market", hint="give another folder with --dir")
    drawn = secrets.randbelow(2**32) if seed is None else seed
    current().note(f"seed {drawn}, folder {place}")
    with _bar() as tick:
        report = await chaos.run(chaos.ChaosOptions(place, minutes, drawn, providers), current().progress, tick)
    current().emit(report.as_json(), lambda _: _show(report))
    if problems := report.problems():
        error = VerificationError("the market did not come through: " + "; ".join(problems), hint=f"all that happened is in {place}")
        if not current().machine:
            raise error
        current().stderr.write(f"error: {error.message}\n")
        raise typer.Exit(error.exit_code)


@contextmanager
def _bar() -> Iterator[Callable[[float, str], None]]:
    """A progress bar on stderr where somebody watches."""
    out = current()
    if not out.stderr.isatty():
        yield lambda share, what: out.progress(f"{100 * share:3.0f} % {what}") if what else None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=out.stderr, markup=False, highlight=False), transient=True) as progress:
        task = progress.add_task("chaos", total=1.0)

        def tick(share: float, what: str) -> None:
            progress.update(task, completed=share, **({"description": what} if what else {}))  # type: ignore[arg-type]

        yield tick


def _show(report: ChaosReport) -> None:
    out, found = current(), report.as_json()
    kinds = sorted({*report.faults, *report.detection})
    out.table(
        [
            {
                "fault": kind,
                "times": report.faults.get(kind, 0),
                "noticed": found["detection_by_kind"].get(kind, {}).get("count", 0),
                "after s (p50)": found["detection_by_kind"].get(kind, {}).get("p50"),
                "(p99)": found["detection_by_kind"].get(kind, {}).get("p99"),
                "next job done s (p50)": found["recovery_by_kind"].get(kind, {}).get("p50"),
            }
            for kind in kinds
        ],
        title=f"Faults of seed {report.seed}, {report.seconds:.0f} s",
    )
    out.table([{"jobs": what, "count": count} for what, count in report.jobs.items()], title="Jobs")
    rows = [{"invariant": name, "holds": finding.holds, "seen": finding.seen} for name, finding in report.audit.findings.items()]
    out.table(rows, title="Audit")
    out.text(f"failovers {report.failovers}, lost {found['lost']}, overpaid {found['overpaid']}\n")

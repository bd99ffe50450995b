"""`gpumarket demo`: the market runs, from advert to settled payment, and shows it."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpumarket.cli.output import current
from gpumarket.cli.verbs import with_common_options
from gpumarket.core.errors import VerificationError
from gpumarket.core.units import format_money, hex0x

if TYPE_CHECKING:
    from gpumarket.testnet.demo_report import DemoReport

_SHORT = 10


@with_common_options
async def command(
    file: Annotated[Path | None, typer.Option("--file", help="Text to embed; one about the market by default.")] = None,
    question: Annotated[str | None, typer.Option("--question", help="What to answer from it.")] = None,
    folder: Annotated[Path | None, typer.Option("--dir", help="The testnet's folder; a temporary one by default.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the folder with all journals and logs.")] = False,
) -> None:
    """A market on this machine: four providers, one of which cheats; real jobs; every voucher settled on a local chain.

    Ends with exit code 8 when anything does not hold.
    """
    from gpumarket.testnet import demo, passages

    running = asyncio.current_task()
    assert running is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    options = demo.DemoOptions(file, question or passages.DEFAULT_QUESTION, folder, keep)
    report = await demo.run(options, current().progress)
    current().emit(report.as_json(), lambda _: _show(report))
    if problems := report.problems():
        error = VerificationError("the demo does not hold: " + "; ".join(problems), hint="run it again with --keep and read the logs")
        if not current().machine:
            raise error
        current().stderr.write(f"error: {error.message}\n")  # stdout holds the report already
        raise typer.Exit(error.exit_code)


def _show(report: DemoReport) -> None:
    out = current()
    verdicts = {line.job: line.verdict for line in report.verifications}
    valid = {line.job: line.valid for line in report.receipts}
    out.table(
        [
            {
                "job": hex0x(line.id)[:_SHORT],
                "for": line.purpose,
                "task": line.task,
                "model": line.model,
                "provider": report.name(line.provider),
                "state": line.state,
                "tries": line.attempts,
                "cost": format_money(line.amount),
                "receipt": "valid" if valid.get(line.id) else "none" if line.id not in valid else "INVALID",
                "verdict": verdicts.get(line.id, ""),
            }
            for line in report.jobs
        ],
        title="Jobs",
    )
    out.table([{"job": hex0x(line.id)[:_SHORT], "why it went there": line.why} for line in report.jobs if line.why], title="Matches")
    caught = [
        {"provider": report.name(v.provider), "job": hex0x(v.job)[:_SHORT], "why": v.reason}
        for v in report.verifications
        if v.verdict == "rejected"
    ]
    out.table(caught, title="Rejected results: not paid, done again elsewhere")
    out.table(
        [
            {
                "payer": report.name(s.payer),
                "payee": report.name(s.payee),
                "amount": format_money(s.amount),
                "transaction": hex0x(s.tx),
                "gas": s.gas,
            }
            for s in report.settlements
        ],
        title=f"Settlements: {report.gas} gas for {len(report.jobs)} jobs, {report.gas_per_job:,.0f} each",
    )
    out.table(
        [
            {"wallet": w.name, "address": hex0x(w.address), "before": format_money(w.before), "after": format_money(w.after)}
            for w in report.wallets
        ],
        title="Wallets",
    )
    out.table([{"invariant": name, "holds": holds, "seen": seen} for name, (holds, seen) in report.invariants.items()], title="Invariants")
    out.text(f"\nText from tiny-llama (random weights, so it means nothing):\n  {report.text}\n")
    out.text(f"\n{report.question}\n" + "".join(f"  {passage}\n" for passage in report.answer))
    s = report.seconds
    out.text(f"\nup after {s.up:.1f} s, first result after {s.first_result:.1f} s, all settled after {s.total:.1f} s\n")

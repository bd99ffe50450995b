"""`gpumarket dispute`: take a provider that delivered something grossly different before a panel of five."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpumarket.cli import buyer
from gpumarket.cli.jobs import find_job
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption, noun, verb
from gpumarket.core.errors import ConfigError
from gpumarket.core.units import format_money, hex0x

if TYPE_CHECKING:
    from gpumarket.sdk.dispute_view import DisputeView

app = noun("Take a cheating provider before a panel.")
WaitOption = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Stay to the end, or only until the panel has the evidence: who misses it then needs you.")
]


@verb(app, "open")
async def open_(
    job: Annotated[str, typer.Argument(help="Job id of a rejected result, or the beginning of one.")],
    wait: WaitOption = True,
    config: ConfigOption = None,
) -> None:
    """Open a dispute, or go on with the one that is open. The bond comes back unless the panel finds the result in order."""
    async with buyer.market(config) as market:
        found = await market.dispute(find_job(market, job).job, wait=wait, on_change=lambda view: current().progress(_line(view)))
    current().emit(_document(found), lambda _: _show(found))


@verb(app, "status")
async def status(
    job: Annotated[str | None, typer.Argument(help="Job id, or the beginning of one; all disputes by default.")] = None,
    config: ConfigOption = None,
) -> None:
    """Your disputes, newest first, or one in full."""
    async with buyer.market(config) as market:
        found = await market.disputes()
        wanted = None if job is None else find_job(market, job).job
    if wanted is None:
        current().emit([_document(view) for view in found], lambda _: current().table([_row(view) for view in found]))
        return
    mine = [view for view in found if view.job == wanted]
    if not mine:
        raise ConfigError(f"there is no dispute about job {hex0x(wanted)}", hint=f"gpumarket dispute open {hex0x(wanted)}")
    current().emit(_document(mine[0]), lambda _: _show(mine[0]))


def _document(view: DisputeView) -> dict[str, Any]:
    return {
        "job": hex0x(view.job),
        "dispute": hex0x(view.dispute),
        "state": view.state,
        "outcome": view.outcome,
        "provider": hex0x(view.provider) if view.provider else "",
        "amount": view.amount,
        "locked": view.locked,
        "bond": view.bond,
        "bound": view.bound,
        "panel": [{"member": hex0x(seat.operator), "state": seat.state, "number": seat.number} for seat in view.panel],
        "beyond": view.beyond,
        "within": view.within,
        "taken": view.taken,
        "burned": view.burned,
        "ends_by": view.ends_by,
    }


def _row(view: DisputeView) -> dict[str, Any]:
    return {
        "job": hex0x(view.job)[:18],
        "provider": hex0x(view.provider)[:18] if view.provider else "",
        "state": view.state,
        "outcome": view.outcome,
        "beyond": f"{view.beyond} of {len(view.panel)}" if view.outcome and view.panel else "",
        "taken": format_money(view.taken),
        "bond": format_money(view.bond),
    }


def _show(view: DisputeView) -> None:
    current().table({**_row(view), "job": hex0x(view.job), "dispute": hex0x(view.dispute), "locked": format_money(view.locked)})
    current().table([{"member": hex0x(s.operator), "state": s.state, "number": "" if s.number is None else s.number} for s in view.panel])


def _line(view: DisputeView) -> str:
    seats = ", ".join(f"{sum(s.state == state for s in view.panel)} {state}" for state in dict.fromkeys(s.state for s in view.panel))
    return f"dispute {view.state}" + (f": panel {seats}" if seats else "")

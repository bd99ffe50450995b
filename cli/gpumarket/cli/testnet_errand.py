"""`gpumarket testnet errand`: the demo's jobs on a market that runs already, bought, checked and settled."""

from __future__ import annotations

from gpumarket.cli import buyer
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption
from gpumarket.core.units import format_money, hex0x

_SHORT = 10


async def command(config: ConfigOption = None) -> None:
    """Embed a text and have one written on the market of this configuration, wait until all is decided, close the channel at its cost."""
    from gpumarket.testnet import errand

    async with buyer.market(config) as market:
        done = await errand.run(market, current().progress)
    rows = [{**job, "job": job["job"][:_SHORT], "rejected": ", ".join(job["rejected"])} for job in done.as_json()["jobs"]]
    current().emit(done.as_json(), lambda _: current().table(rows, title="Bought, checked and decided"))
    current().progress(
        f"settled in {done.seconds:.1f} s: {format_money(done.paid)} went to the scheduler {hex0x(done.scheduler)[:_SHORT]} and through it "
        f"to the providers; the rest of the deposit is back"
    )

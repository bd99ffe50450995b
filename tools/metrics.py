"""Writes the tables of docs/metrics.md from what the daemons' own tables of metrics say: `.venv/bin/python tools/metrics.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpumarket.gateway import metrics as gateway
from gpumarket.node import metrics as provider
from gpumarket.scheduler import metrics as scheduler
from gpumarket.telemetry.measuring import Measuring
from gpumarket.telemetry.metrics import Metric

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
BEGIN, END = "<!-- tables: tools/metrics.py -->", "<!-- end of tables -->"
MODELS = "your models"
UNITS = (
    ("_tokens_per_second", "tokens of text a second"),
    ("prompt_tokens_total", "tokens of text"),
    ("gpumarket_tokens_total", "tokens of text"),
    ("output_tokens_total", "tokens of text"),
    ("spent_tokens_total", "tokens of money"),
    ("_tokens", "tokens of money"),
    ("_seconds", "seconds"),
    ("_bytes", "bytes"),
    ("_ether", "coins of the chain"),
    ("_ether_total", "coins of the chain"),
    ("_flops", "FLOP/s"),
    ("_used_total", "gas"),
)
"""By the end of a name; a metric without one of these counts things."""


def unit(metric: Metric) -> str:
    """What a metric is counted in."""
    return next((words for end, words in UNITS if metric.full_name.endswith(end)), "")


def row(metric: Metric) -> str:
    """One line of the table."""
    values = "" if metric.label == "version" else ": " + ", ".join(metric.values)
    label = f"`{metric.label}`{values}" if metric.label else ""
    return f"| `{metric.full_name}` | {metric.kind.value} | {label} | {unit(metric)} | {metric.help} |"


def both() -> tuple[Sequence[Metric], Sequence[Metric]]:
    """The metrics of a provider, and of a scheduler."""
    source = Measuring({"p2p": (_unasked, 0.0), "wallet": (_unasked, 0.0)}).metric
    return provider.metrics_of([MODELS], source), scheduler.metrics_of(source)


def of_gateway() -> Sequence[Metric]:
    """The metrics of a gateway; `build_info` it has like every daemon."""
    return [metric for metric in gateway.metrics_of([MODELS]) if metric.name != "build_info"]


def tables() -> str:
    """All tables, and what is in both of the daemons that follow the chain."""
    of_provider, of_scheduler = both()
    names = {metric.name for metric in of_provider} & {metric.name for metric in of_scheduler}
    shared = [metric for metric in of_provider if metric.name in names and metric in of_scheduler]
    parts = [_table("Of every daemon", shared)]
    for title, metrics in (("Of a provider", of_provider), ("Of a scheduler", of_scheduler)):
        parts.append(_table(title, [metric for metric in metrics if metric not in shared]))
    parts.append(_table("Of a gateway", of_gateway()))
    return "\n".join(parts)


def _table(title: str, metrics: Sequence[Metric]) -> str:
    head = f"## {title}\n\n| metric | type | label and its values | unit | tells |\n|---|---|---|---|---|"
    return "\n".join([head, *(row(metric) for metric in metrics), ""])


async def _unasked() -> dict[str, float]:
    """Only the names of the sources matter here."""
    return {}


def main() -> None:
    """Rewrite the page's tables."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()

"""Writes the table of parameters in docs/openai.md from the tables that the gateway reads requests with."""

from __future__ import annotations

import sys
from pathlib import Path

from gpumarket.gateway.endpoints import OPENAI
from gpumarket.gateway.openai.fields import rules

PAGE = Path(__file__).resolve().parents[1] / "docs" / "openai.md"
BEGIN, END = "<!-- parameters -->\n", "<!-- end -->\n"
HEAD = "| endpoint | supported | only where it changes nothing | refused |\n|---|---|---|---|\n"


def table() -> str:
    """One row an endpoint that takes a body."""
    rows = []
    for endpoint in OPENAI:
        if endpoint.table is not None:
            found = rules(endpoint.table)
            cells = [", ".join(f"`{name}`" for name, rule in found.items() if rule == kind) for kind in ("supported", "no-op", "refused")]
            rows.append(f"| `{endpoint.path}` | {' | '.join(cells)} |\n")
    return HEAD + "".join(rows)


def page(text: str) -> str:
    """The page with its table as it should be."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
    sys.stdout.write(f"{PAGE} is as the tables are\n")

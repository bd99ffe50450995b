"""`gpumarket economics` says where its figures come from."""

from __future__ import annotations

import io
from typing import Any

from gpumarket.cli import economics
from gpumarket.cli.output import Output, active


def test_economics_says_whose_check_probability_it_reckons_with() -> None:
    """A cheat meets its clients' p, which nobody can read from the market: the table must not pass ours off as the network's."""
    document: dict[str, Any] = {
        "check_probability": 0.05,
        "hostile_seats": 0.1,
        "quorum": 0.92,
        "disputes": True,
        "formula": "expected = g",
        "rows": [],
        "not_promised": ["anything"],
    }
    mine = Output(stdout=io.StringIO(), stderr=io.StringIO())
    with active(mine):
        economics._show(document)
    shown = " ".join(mine.stdout.getvalue().split())  # type: ignore[attr-defined]
    assert "p is your own setting (check_probability in [client]), not measured" in shown
    assert "each of its clients has set" in shown

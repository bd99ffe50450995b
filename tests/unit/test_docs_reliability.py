"""docs/reliability.md, as `make reliability` last wrote it, has a figure in every row, each from a test that is still there."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES = (ROOT / "docs" / "reliability.md").read_text("utf-8").splitlines()
ROWS = [line for line in LINES if line.startswith("| ") and not line.endswith("| test |")]
NAMED = re.compile(r"\| `(?P<file>[\w/]+\.py)::(?P<name>\w+)(?P<id>\[.*\])?` \|$")


@lru_cache
def functions(file: str) -> frozenset[str]:
    path = ROOT / "tests" / file
    if not path.is_file():
        return frozenset()
    tree = ast.parse(path.read_text("utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_reliability_page_has_a_figure_in_every_row() -> None:
    assert len(ROWS) > 40
    assert [row for row in ROWS if "not measured" in row] == []


def test_reliability_page_names_tests_that_exist() -> None:
    found = {row: NAMED.search(row) for row in ROWS if "not measured" not in row}
    assert [row for row, named in found.items() if named is None] == []
    assert [row for row, named in found.items() if named and named["name"] not in functions(named["file"])] == []

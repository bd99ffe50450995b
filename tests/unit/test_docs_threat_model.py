"""docs/threat-model.md claims nothing without a test: each one named exists, and each row names one or says that it is not protected."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "threat-model.md"
NAME = re.compile(r"`((?:test|testFuzz|invariant)_\w+)`")


def rows() -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every table row, without heads and rulers."""
    lines = PAGE.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        follows_head = number < len(lines) and set(lines[number]) <= set("|-") and lines[number]
        if line.startswith("|") and not set(line) <= set("|-") and not follows_head:
            yield number, [cell.strip() for cell in line.strip("|").split("|")]


def test_threat_model_names_only_tests_that_exist() -> None:
    sources = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "contracts" / "test").rglob("*.sol")]
    there = {
        name for file in sources for name in re.findall(r"(?:def|function) ((?:test|testFuzz|invariant)_\w+)", file.read_text("utf-8"))
    }
    named = set(NAME.findall(PAGE.read_text("utf-8")))
    assert len(named) > 60
    assert named <= there, sorted(named - there)


def test_threat_model_rows_each_name_a_test_or_say_not_protected() -> None:
    found = list(rows())
    assert len(found) > 60
    bare = [number for number, cells in found if not NAME.search(cells[-1]) and "**not protected**" not in cells[-1]]
    assert bare == [], f"lines {bare} claim something that nothing holds"


def test_threat_model_rows_have_the_columns_of_their_table() -> None:
    widths: dict[int, set[int]] = {}
    table = 0
    previous = 0
    for number, cells in rows():
        table = table if number == previous + 1 else number
        widths.setdefault(table, set()).add(len(cells))
        previous = number
    assert all(len(found) == 1 for found in widths.values()), widths

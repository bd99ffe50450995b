"""tools/reliability.py and tests/reliability.py: what a test records is on the page under its whole id, and a gap fails the command."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from reliability import record

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command's module, which writes its page into the test's folder."""
    spec = importlib.util.spec_from_file_location("reliability_tool", ROOT / "tools" / "reliability.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "reliability_tool", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAGE", tmp_path / "reliability.md")
    return module


def lines(file: Path, rows: list[str]) -> str:
    file.write_text("".join(json.dumps({"row": r, "injected": 1, "figure": f"{r} held", "bound": "0"}) + "\n" for r in rows))
    return str(file)


@pytest.mark.parametrize("name", ["one word", "HTML with 502 (bad gateway)"])
def test_record_keeps_a_test_id_with_spaces_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUMARKET_RELIABILITY", str(tmp_path / "figures.jsonl"))
    record("a row of its own", 5, "none", "0")
    told = json.loads((tmp_path / "figures.jsonl").read_text())["test"]
    assert told.endswith(f"test_record_keeps_a_test_id_with_spaces_whole[{name}]")


def test_page_with_a_figure_for_every_row_ends_well(tool: ModuleType, tmp_path: Path) -> None:
    assert tool.main([lines(tmp_path / "all.jsonl", [*tool.WANTED, "something else"])]) == 0
    page = tool.PAGE.read_text()
    assert tool.NOT_MEASURED not in page
    assert "| something else | 1 | something else held | 0 |" in page


@pytest.mark.parametrize("gone", ["F37", "I9"])
def test_page_with_a_missing_row_fails_and_names_the_tests_that_record_it(
    gone: str, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([lines(tmp_path / "most.jsonl", [row for row in tool.WANTED if row != gone])]) == 1
    told = capsys.readouterr().err
    assert f"{gone} {tool.WANTED[gone]}: recorded by " in told
    assert "::test_" in told.partition("recorded by ")[2]
    assert tool.PAGE.read_text().count(tool.NOT_MEASURED) == 1


def test_page_keeps_the_figures_of_tests_that_did_not_run(tool: ModuleType, tmp_path: Path) -> None:
    def figures(name: str, figure: str, tests: list[str]) -> str:
        rows = [{"row": r, "injected": 1_000, "figure": figure, "bound": "a | b", "test": t} for t in tests for r in tool.WANTED]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    first = figures("first.jsonl", "held | once", ["tests/unit/test_a.py::test_a", "tests/unit/test_b.py::test_b[x | y]"])
    assert tool.main([first]) == 0
    whole = tool.PAGE.read_text()
    assert tool.main(["--keep", figures("none.jsonl", "", [])]) == 0
    assert tool.PAGE.read_text() == whole
    assert tool.main(["--keep", figures("second.jsonl", "held twice", ["tests/unit/test_a.py::test_a"])]) == 0
    page = tool.PAGE.read_text()
    assert page.count("held twice") == page.count("held \\| once") == len(tool.WANTED)


def test_every_fault_and_promise_is_recorded_by_a_test(tool: ModuleType) -> None:
    assert [row for row in tool.WANTED if not tool.recorders(row)] == []

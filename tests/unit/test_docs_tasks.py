"""docs/tasks.md names endpoints, models, commands and files that exist; test_cli_testnet runs its programs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpumarket.cli.main import run
from gpumarket.gateway.endpoints import ENDPOINTS
from gpumarket.testnet import plan

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "tasks.md").read_text("utf-8")
COMMANDS = sorted(set(re.findall(r"^ {4}gpumarket ([^#\n]+)|`gpumarket ([^`]+)`", PAGE, re.MULTILINE)))


def test_tasks_page_names_endpoints_that_exist_and_one_that_does_not() -> None:
    named, paths = set(re.findall(r"`(/v\d[^`]*)`", PAGE)), {endpoint.path for endpoint in ENDPOINTS}
    assert len(named) > 4
    assert named - paths == {"/v1/audio"}, "of which the page says that it is not there"
    assert not [path for path in paths if path.startswith("/v1/audio")]


def test_tasks_page_tells_of_every_model_of_the_testnet() -> None:
    assert [name for name in (plan.MINILM, plan.TINY_LLAMA, *plan.TENSOR_MODELS) if name not in PAGE] == []


@pytest.mark.parametrize("words", ["".join(found).split() for found in COMMANDS], ids=" ".join)
def test_tasks_page_names_commands_that_exist(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*words[:2], "--help"]) == 0
    shown = capsys.readouterr().out
    assert [option for option in words if option.startswith("--") and option not in shown] == []


def test_tasks_page_shows_more_than_two_commands() -> None:
    assert len(COMMANDS) > 2


def test_tasks_page_has_links_that_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)", PAGE)
    assert len(targets) > 3 and [target for target in targets if not (DOCS / target).exists()] == []

"""Every folder has a README of at most a page that says nothing which is no longer so: links, paths, commands, settings and examples."""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumarket.cli.main import NOUNS, run
from gpumarket.core.settings import load
from gpumarket.gateway.settings import GatewaySettings
from gpumarket.node.settings import ProviderSettings
from gpumarket.scheduler.settings import SchedulerSettings
from gpumarket.sdk.settings import ClientSettings

ROOT = Path(__file__).resolve().parents[2]
LINES_MAX = 60
ROOMS = sorted({path.parent.name for path in ROOT.glob("*/gpumarket") if path.is_dir()} | {"benchmarks", "docs", "tests", "tools"})
READMES = [ROOT / "README.md", *(ROOT / room / "README.md" for room in ROOMS)]
SETTINGS = {kind.section: kind for kind in (ProviderSettings, SchedulerSettings, ClientSettings, GatewaySettings)}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in FENCED.findall(page.read_text("utf-8")) if name == language]


def of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", READMES, ids=of)
def test_readme_is_there_and_at_most_a_page(page: Path) -> None:
    assert page.is_file(), f"{of(page)} is missing"
    assert len(page.read_text("utf-8").splitlines()) <= LINES_MAX


@pytest.mark.parametrize("page", READMES, ids=of)
def test_readme_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", page.read_text("utf-8"))
    assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", READMES, ids=of)
def test_readme_names_only_files_that_exist(page: Path) -> None:
    """A path in backticks lies beside the page, in the page's package or below the root; * stands for some."""
    named = re.findall(r"`((?:[\w.*-]+/)*[\w.*-]+\.(?:py|sh|md|proto|sol|toml|txt|cjs))`", page.read_text("utf-8"))
    package = page.parent / "gpumarket"
    assert [n for n in named if not (any(page.parent.glob(n)) or any(ROOT.glob(n)) or any(package.glob(f"**/{n}")))] == []


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `gpumarket` wherever a page shows a command; `a | b` shows two verbs of one noun."""
    text = page.read_text("utf-8")
    code = [*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^ {4}(.*)", text, re.MULTILINE), *"\n".join(blocks(page, "")).splitlines()]
    for line in code:
        for found in re.findall(r"(?:^|[\s(/])gpumarket ([^#)\"]+)", line):
            noun, _, rest = found.strip().partition(" ")
            yield from ([noun, *part.split()[:1]] for part in rest.split(" | "))


@pytest.mark.parametrize("page", READMES, ids=of)
def test_readme_commands_exist(page: Path) -> None:
    for noun, *verb in commands(page):
        if noun == "NOUN":
            continue
        assert noun in NOUNS, f"{of(page)}: gpumarket {noun}"
        own_verb = hasattr(importlib.import_module(NOUNS[noun][0]), "command")
        assert run([noun, *([] if own_verb else verb), "--help"]) == 0, f"{of(page)}: gpumarket {noun} {' '.join(verb)}"


def test_readmes_show_commands() -> None:
    assert {tuple(words) for page in READMES for words in commands(page)} >= {("testnet", "logs"), ("testnet", "up"), ("provider", "start")}


def test_command_table_lists_every_noun() -> None:
    table = [line for line in (ROOT / "cli" / "README.md").read_text("utf-8").splitlines() if line.startswith("| `")]
    listed = {word.split()[0] for line in table for word in re.findall(r"`([^`]+)`", line.split("|")[1])}
    assert listed == set(NOUNS)


def test_settings_files_in_readmes_are_read_by_their_program(tmp_path: Path) -> None:
    found = [(page, text) for page in READMES if page.is_file() for text in blocks(page, "toml")]
    assert found
    for page, text in found:
        file = tmp_path / "settings.toml"
        file.write_text(text)
        sections = set(tomllib.loads(text))
        assert sections <= set(SETTINGS), of(page)
        for section in sections:
            load(SETTINGS[section], file=file, env={})


def test_python_examples_are_all_the_one_that_is_run() -> None:
    (example,) = blocks(ROOT / "README.md", "python")
    others = [(of(page), text) for page in READMES if page.is_file() for text in blocks(page, "python")]
    assert [name for name, text in others if text != example] == [], (
        "the example of README.md is run by test_cli_testnet; others must equal it"
    )

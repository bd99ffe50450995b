"""What holds for every verb of the command line: one JSON document on stdout, a refusal with code and next step, exit codes as written."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from gpumarket import cli
from gpumarket.cli import main
from gpumarket.cli.verbs import TERMINATED
from gpumarket.core import errors
from gpumarket.core.errors import GpumarketError
from gpumarket.testnet import models as testnet_models

ROOT = Path(__file__).resolve().parents[2]
BY_ITSELF = {0: "ok", 2: "usage", 130: "interrupted", TERMINATED: "terminated"}
"""Exit codes that no error of the tree has."""
NO_FILE = "/dev/null/file"
ARGUMENTS = {
    "run": ["no-model", "some text"],
    "demo": ["--dir", NO_FILE],
    "doctor rescue": [NO_FILE],
    "market explain": ["no-model", "some text"],
    "model add": ["no-model", "0x" + "12" * 32],
    "model import": [NO_FILE, "--name", "x", "--task", "embed", "--licence", "MIT", "--max-input", "8"],
    "receipt save": ["0x12", NO_FILE],
    "receipt verify": [NO_FILE],
    "gateway key create": ["somebody"],
    "gateway key revoke": ["somebody"],
    "guard export": [NO_FILE],
    "guard import": [NO_FILE],
    "stake add": ["0x" + "12" * 20, "1"],
    "stake unbond": ["0x" + "12" * 20, "1"],
    "stake approve": ["0x" + "12" * 20],
    "stake withdraw": ["0x" + "12" * 20],
    "stake show": ["0x" + "12" * 20],
    "wallet export": [NO_FILE],
    "wallet import": [NO_FILE],
    "wallet deposit": ["1"],
    "dispute open": ["0x12"],
    "job get": ["0x12"],
    "job wait": ["0x12"],
    "testnet up": ["--dir", NO_FILE],
    "testnet logs": ["no-role"],
    "testnet provision": ["no-role", "--rpc", "http://127.0.0.1:1"],
}
"""What a verb cannot do without, where it is to fail. Everything reads a settings file with a key that nobody knows."""
ANSWERS = {"model make-tiny": {0}, "doctor": {0, 1}}
"""Verbs that need nothing, with their exit codes: 1 when doctor finds something wrong with this machine."""


def verbs() -> list[str]:
    """Every verb of the tree as it is typed, from the tree itself."""
    return [words for noun in main.NOUNS for words in _of(noun)]


def _of(noun: str) -> Iterator[str]:
    command: Any = typer.main.get_command(main._tree([noun])).commands[noun]  # type: ignore[attr-defined]
    yield from _below(noun, command)


def _below(words: str, command: Any) -> Iterator[str]:
    commands = getattr(command, "commands", {})
    if not commands or command.invoke_without_command:
        yield words
    for name, sub in commands.items():
        yield from _below(f"{words} {name}", sub)


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without anything, whose settings file is wrong."""
    config = tmp_path / "gpumarket.toml"
    tables = ("client", "provider", "scheduler", "gateway", "chain")
    config.write_text("".join(f"[{table}]\nno_such_key = 1\n" for table in tables))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GPUMARKET_CONFIG", str(config))

    async def tiny(_say: Callable[[str], None]) -> Path:
        return tmp_path

    monkeypatch.setattr(testnet_models, "tiny_llama", tiny)


@pytest.mark.parametrize("words", verbs())
def test_verb_in_json_mode_writes_one_document_and_a_refusal_leads_on(words: str, away: None, capsys: pytest.CaptureFixture[str]) -> None:
    code = main.run([*words.split(), *ARGUMENTS.get(words, []), "-o", "json"])
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.err == ""
    if words in ANSWERS:
        assert code in ANSWERS[words] and "error" not in document
        return
    assert code in {cls.exit_code for cls in tree()} - {1}, document
    assert set(document) == {"error"}
    assert set(document["error"]) == {"code", "message", "hint", "retryable"}
    assert errors.by_code()[document["error"]["code"]].exit_code == code
    assert document["error"]["message"] and document["error"]["hint"], document


@pytest.mark.parametrize("words", verbs())
def test_verb_refuses_an_unknown_option_as_a_usage_document(words: str, away: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([*words.split(), "--no-such-option", "-o", "json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["code"] == "usage"
    assert captured.err == ""


def test_verbs_write_to_stdout_through_the_output_layer_alone() -> None:
    wrong = []
    for file in sorted(Path(inspect.getfile(cli)).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            used = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""
            if used in ("print", "typer.echo", "sys.stdout") and file.name != "output.py":
                wrong.append(f"{file.name}:{node.lineno} uses {used}")  # type: ignore[attr-defined]
    allowed = {"main.py": {"typer.echo", "sys.stdout"}}  # --version, and a reader that left
    assert [line for line in wrong if line.split()[-1] not in allowed.get(line.partition(":")[0], ())] == []


# --- exit codes ----------------------------------------------------------------------------------------------------------------


def tree() -> set[type[GpumarketError]]:
    """The classes of core.errors; a room may have its own below them."""
    return {cls for cls in errors.by_code().values() if cls.__module__ == errors.__name__}


def written(text: str) -> dict[int, str]:
    """The table after "Exit codes:"."""
    table = text.partition("Exit codes:")[2].partition(".")[0]
    return {int(code): word for code, word in (entry.strip().split(maxsplit=1) for entry in re.split("[,·]", table))}


def test_exit_codes_of_the_help_and_of_the_readme_are_those_of_the_errors() -> None:
    table = written(str(main.__doc__))
    assert table == written((ROOT / "cli" / "README.md").read_text())
    assert set(table) == {cls.exit_code for cls in tree()} | set(BY_ITSELF)
    assert {code: table[code] for code in BY_ITSELF} == BY_ITSELF


def test_exit_codes_drawn_in_the_tree_of_errors_are_those_of_its_classes() -> None:
    """Each line: a class under its base, with its exit code or the base's."""
    line = re.compile(r"^ {4}(?P<indent>[│├└─ ]*)(?P<name>[A-Z]\w+)(?: +(?P<code>\d+))?")
    bases: list[tuple[int, type[Any]]] = []
    drawn = set()
    for found in filter(None, map(line.match, str(errors.__doc__).splitlines())):
        cls, depth = getattr(errors, found["name"]), len(found["indent"])
        bases = [base for base in bases if base[0] < depth]
        if bases:
            assert cls.__bases__ == (bases[-1][1],), found["name"]
        inherited = bases[-1][1].exit_code if len(bases) > 1 else None
        code = found["code"] if found["code"] else inherited
        if cls is not GpumarketError:
            assert code is not None and cls.exit_code == int(code), found["name"]
        bases.append((depth, cls))
        drawn.add(cls)
    assert drawn == tree()

"""The command line's output layer and its exit codes."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from gpumarket.cli import main
from gpumarket.cli.output import Format, Output, active, clean, current, error_document
from gpumarket.cli.verbs import noun, verb
from gpumarket.core.errors import Busy, FundsError, GpumarketError, NoProvider, OverMaxCost, WrongPassword

Run = Callable[..., tuple[int, str, str]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def output(format: Format = Format.table, *, terminal: bool = False) -> Output:
    return Output(format, stdout=io.StringIO(), stderr=Terminal() if terminal else io.StringIO())


def text(stream: Any) -> str:
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `gpumarket test VERB` with a verb that does what it is told."""

    def call(body: Callable[[], Any], *argv: str) -> tuple[int, str, str]:
        app = noun("A noun for tests.")
        verb(app, "go")(body)
        verb(app, "other")(lambda: None)
        module = types.ModuleType("gpumarket_test_noun")
        module.app = app  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "gpumarket_test_noun", module)
        monkeypatch.setitem(main.NOUNS, "test", ("gpumarket_test_noun", "A noun for tests."))
        code = main.run(["test", "go", *argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("character", ["\x1b", "\x07", "\r", "\x7f", "\x9b", "\u202e", "\u2066", "\u2028"])
def test_clean_shows_control_characters_instead_of_obeying_them(character: str) -> None:
    cleaned = clean(f"a{character}[31mb")
    assert character not in cleaned and cleaned.startswith("a\\")


def test_clean_leaves_ordinary_text_alone() -> None:
    assert clean("Zwölf Boxkämpfer\n\t漢字 🦊") == "Zwölf Boxkämpfer\n\t漢字 🦊"


def test_streamed_text_of_a_peer_reaches_the_terminal_without_escapes() -> None:
    out = output()
    out.text("\x1b]0;owned\x07hi")
    assert text(out.stdout) == "\\x1b]0;owned\\x07hi"


def test_tables_do_not_interpret_markup_or_escapes() -> None:
    out = output()
    out.emit([{"name": "[red]x[/red]", "n": "\x1b[2J"}])
    assert "[red]x[/red]" in text(out.stdout) and "\x1b" not in text(out.stdout)


@pytest.mark.parametrize(("format", "parse"), [(Format.json, json.loads), (Format.yaml, yaml.safe_load)])
def test_machine_formats_hold_exactly_one_document(format: Format, parse: Callable[[str], Any]) -> None:
    out = output(format)
    out.text("streamed")
    out.table({"ignored": 1})
    out.note("ignored")
    out.emit({"amount": 10**20, "text": "ü"})
    assert parse(text(out.stdout)) == {"amount": 10**20, "text": "ü"}
    assert text(out.stderr) == ""


def test_progress_is_silent_where_nobody_watches_and_shown_on_a_terminal() -> None:
    hidden, shown = output(), output(terminal=True)
    for out in (hidden, shown):
        out.progress("starting")
    assert (text(hidden.stderr), text(shown.stderr)) == ("", "starting\n")
    assert text(shown.stdout) == ""


def test_error_says_what_why_and_what_next() -> None:
    out = output()
    out.error(OverMaxCost("the quote is 2, your limit 1", hint="raise --max-cost"))
    assert text(out.stderr) == "error: the quote is 2, your limit 1\n  next: raise --max-cost\n"


def test_error_of_a_failed_match_counts_its_reasons() -> None:
    error = NoProvider("nobody", removed={"price": 2, "stake": 1}, considered=3)
    out = output()
    out.error(error)
    assert "price removed 2 of 3" in text(out.stderr)
    assert error_document(error)["removed"] == {"price": 2, "stake": 1}


def test_current_output_is_that_of_the_block() -> None:
    mine = output()
    with active(mine):
        assert current() is mine
    assert current() is not mine


def fail_with(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WrongPassword("no"), 4),
        (FundsError("no"), 5),
        (Busy("later"), 7),
        (GpumarketError("no"), 1),
        (KeyboardInterrupt(), 130),
        (typer.Exit(9), 9),
    ],
)
def test_exit_code_is_that_of_the_error(run: Run, error: BaseException, code: int) -> None:
    assert run(fail_with(error))[0] == code


def test_json_mode_tells_errors_as_json_on_stdout(run: Run) -> None:
    code, out, err = run(fail_with(Busy("later", hint="wait")), "-o", "json")
    assert code == 7 and err == ""
    assert json.loads(out) == {"error": {"code": "busy", "message": "later", "hint": "wait", "retryable": True}}


@pytest.mark.parametrize("argv", [["-o", "json", "--nope"], ["--nope", "--output=json"], ["-ojson", "--nope"]])
def test_usage_errors_are_json_too_and_exit_2(run: Run, argv: list[str]) -> None:
    code, out, _ = run(lambda: None, *argv)
    assert code == 2
    assert json.loads(out)["error"]["code"] == "usage"


def test_unknown_noun_exits_2_and_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["nope"]) == 2
    assert "nope" in capsys.readouterr().err


def test_missing_package_of_an_extra_is_told_with_the_pip_line(run: Run) -> None:
    code, _, err = run(fail_with(ModuleNotFoundError("No module named 'libp2p'", name="libp2p")))
    assert code == 3
    assert "pip install 'gpumarket[p2p]'" in err


def test_untyped_crash_is_one_line_and_a_traceback_only_when_verbose(run: Run) -> None:
    code, _, quiet = run(fail_with(ZeroDivisionError("boom")))
    assert code == 1 and "Traceback" not in quiet and "unexpected ZeroDivisionError: boom" in quiet
    assert "Traceback" in run(fail_with(ZeroDivisionError("boom")), "-v")[2]


def test_async_verb_runs_and_emits(run: Run) -> None:
    async def body() -> None:
        current().emit({"done": True})

    assert run(body, "-o", "yaml")[:2] == (0, "done: true\n")


def test_every_noun_loads_and_answers_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in main.NOUNS:
        assert main.run([name, "--help"]) == 0, name
        assert "Usage: gpumarket" in capsys.readouterr().out


def test_error_inside_a_task_group_is_told_as_itself(run: Run) -> None:
    group = ExceptionGroup("tasks", [ValueError("other"), ExceptionGroup("inner", [WrongPassword("the key stays shut")])])
    code, _, err = run(fail_with(group))
    assert code == 4 and "error: the key stays shut" in err


@pytest.mark.parametrize("argv", [[], ["-o", "json"], ["-v"]])
def test_verb_that_sigterm_ends_tidies_up_and_exits_143_without_a_traceback(run: Run, argv: list[str]) -> None:
    tidied: list[bool] = []

    async def body() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.sleep(30)
        finally:
            tidied.append(True)

    code, out, err = run(body, *argv)
    assert (code, out, tidied) == (143, "", [True])
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "extra"),
    [
        ("provider start", "provider"),
        ("scheduler start", "scheduler"),
        ("demo", "testnet"),
        ("testnet up", "testnet"),
    ],
)
def test_command_on_a_plain_install_names_the_extra_that_brings_all_it_needs(argv: str, extra: str, tmp_path: Path) -> None:
    """Every package of every extra is away, as after `pip install gpumarket`; which one is imported first must not matter."""
    program = f"""
import sys
from gpumarket.cli import main
class Away:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in main.EXTRAS:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Away())
sys.exit(main.run({argv.split()!r}))
"""
    env = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    assert f"pip install 'gpumarket[{extra}]'" in done.stderr

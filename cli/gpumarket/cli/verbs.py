"""How a verb is made: a typed function, plain or async, that gets the options every verb has, and runs with its output in place."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from gpumarket.cli.output import Format, Output, active, current

Verb = Callable[..., Any]
TERMINATED = 143
"""Exit code of a verb that SIGTERM ended: 128 + 15, as a shell has it."""

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", envvar="GPUMARKET_CONFIG", help="TOML file with the settings; variables and flags win over it.", show_default=False
    ),
]
_OUTPUT = Annotated[Format, typer.Option("--output", "-o", help="How data is written to stdout.")]
_VERBOSE = Annotated[bool, typer.Option("--verbose", "-v", help="Progress even without a terminal, and tracebacks.")]


def noun(help_text: str) -> typer.Typer:
    """The Typer application of one noun."""
    return typer.Typer(help=help_text, no_args_is_help=True, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


def verb(app: typer.Typer, name: str) -> Callable[[Verb], Verb]:
    """Register a function as a verb of `app`; async functions get an event loop of their own."""

    def register(function: Verb) -> Verb:
        app.command(name, help=inspect.getdoc(function))(with_common_options(function))
        return function

    return register


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run an async verb. One that takes SIGTERM cancels its own task, so that it tidies up, and ends with that signal's exit code."""
    try:
        asyncio.run(work)
    except asyncio.CancelledError:
        current().note("terminated")
        raise typer.Exit(TERMINATED) from None


def with_common_options(function: Verb) -> Verb:
    """`function` as Typer should see it: its own parameters, then -o and -v."""
    hints = get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def call(*, output: Format, verbose: bool, **given: Any) -> None:
        with active(Output(output, verbose)):
            result = function(**given)
            if inspect.iscoroutine(result):
                _run(result)

    own = [p.replace(annotation=hints[n], kind=p.KEYWORD_ONLY) for n, p in inspect.signature(function).parameters.items()]
    common = [
        inspect.Parameter("output", inspect.Parameter.KEYWORD_ONLY, default=Format.table, annotation=_OUTPUT),
        inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_VERBOSE),
    ]
    call.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in [*own, *common]}
    del call.__wrapped__  # Typer would read the signature behind it
    return call

"""The one way out of the command line: data on stdout as a table, JSON or YAML; progress and errors on stderr.

Invariants: in JSON and YAML mode stdout holds exactly one document; progress shows only on a terminal; text that came from a peer never
reaches a terminal with its control characters. rich and yaml are imported when they are needed, so that `--help` stays quick.
"""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import IO, TYPE_CHECKING, Any

from gpumarket.core.errors import GpumarketError, NoProvider

if TYPE_CHECKING:
    from rich.console import Console

Row = Mapping[str, Any]
REPORT_HINT = "run it again with -v for the traceback, and report it as a bug of gpumarket"


class Format(StrEnum):
    """How data is written."""

    table = "table"
    json = "json"
    yaml = "yaml"


@dataclass
class Output:
    """Where a command writes. Made once per run, reached by `current()`."""

    format: Format = Format.table
    verbose: bool = False
    stdout: IO[str] = field(default_factory=lambda: sys.stdout)
    stderr: IO[str] = field(default_factory=lambda: sys.stderr)

    @property
    def machine(self) -> bool:
        """Whether stdout is for a program."""
        return self.format is not Format.table

    def emit(self, data: Any, view: Callable[[Console], None] | None = None) -> None:
        """Write the command's result: `data` (JSON types) for programs, `view` or a plain table of `data` for people."""
        if self.format is Format.json:
            self.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        elif self.format is Format.yaml:
            import yaml

            self.stdout.write(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
        elif view is not None:
            view(self.console())
        else:
            self.table(data)
        self.stdout.flush()

    def table(self, data: Any, *, title: str = "") -> None:
        """A mapping as name and value, a sequence of mappings as columns; does nothing in JSON and YAML mode."""
        if self.machine:
            return
        if isinstance(data, Mapping):
            _print_pairs(self.console(), data, title)
        elif isinstance(data, Sequence) and not isinstance(data, str):
            _print_rows(self.console(), data, title)
        else:
            self.stdout.write(f"{clean(str(data))}\n")

    def text(self, piece: str) -> None:
        """A piece of streamed text; people see it at once, programs get the whole with `emit`."""
        if not self.machine:
            self.stdout.write(clean(piece))
            self.stdout.flush()

    def note(self, message: str) -> None:
        """A line for people on stderr, also where it is no terminal: what they must know but did not ask for."""
        if not self.machine:
            self.stderr.write(f"{clean(message)}\n")

    def progress(self, message: str) -> None:
        """A line of progress on stderr; silent where nobody watches."""
        if self.stderr.isatty() or self.verbose:
            self.stderr.write(f"{clean(message)}\n")
            self.stderr.flush()

    def error(self, error: GpumarketError) -> None:
        """Say what failed, why, and what to do next."""
        if self.machine:
            self.emit({"error": error_document(error)})
            return
        self.stderr.write(f"error: {clean(error.message)}\n")
        if isinstance(error, NoProvider):
            for name, count in error.removed.items():
                self.stderr.write(f"  {clean(name)} removed {count} of {error.considered}\n")
        if error.hint:
            self.stderr.write(f"  next: {clean(error.hint)}\n")

    def console(self) -> Console:
        """A rich console on stdout; no markup is ever interpreted, and NO_COLOR is obeyed."""
        from rich.console import Console

        width = None if self.stdout.isatty() else int(os.environ.get("COLUMNS", "160"))
        return Console(file=self.stdout, markup=False, highlight=False, emoji=False, width=width)


_current: ContextVar[Output | None] = ContextVar("gpumarket-output", default=None)


def current() -> Output:
    """The output of the running command."""
    return _current.get() or Output()


@contextmanager
def active(output: Output) -> Iterator[Output]:
    """Make `output` the current one inside the block."""
    token = _current.set(output)
    try:
        yield output
    finally:
        _current.reset(token)


def error_document(error: GpumarketError) -> dict[str, Any]:
    """The documented JSON shape {code, message, hint, retryable}; a failed match adds its counted reasons."""
    document: dict[str, Any] = dict(error.as_dict())
    if isinstance(error, NoProvider):
        document |= {"considered": error.considered, "removed": error.removed}
    return document


def clean(text: str) -> str:
    """`text` safe for a terminal: control characters, escapes and direction overrides are shown, not obeyed. Newline and tab stay."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _UNSAFE else _escaped(c) for c in text)


_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(str(k))}={_cell(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(v) for v in value)
    return "" if value is None else clean(str(value)).replace("\n", " ")


def _print_pairs(console: Console, data: Row, title: str) -> None:
    from rich.table import Table

    table = Table(title=title or None, show_header=False, box=None, title_justify="left")
    for name, value in data.items():
        table.add_row(clean(str(name)), _cell(value))
    console.print(table)


def _print_rows(console: Console, rows: Sequence[Row], title: str) -> None:
    from rich import box
    from rich.table import Table

    if not rows:
        console.print(f"{title}: none" if title else "none")
        return
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for name in rows[0]:
        table.add_column(clean(str(name)), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)

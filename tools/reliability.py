"""Writes docs/reliability.md from the figures that tests have recorded: `make reliability`, which runs them first.

With --keep first, what the page says of tests that recorded nothing this time stays: `make compose-test` runs by itself.

The tables say what was injected how often and what was found. A fault that no test injects and a promise that no test looks at are in them
too, and say so; the exit code is then 1, and stderr names the tests that would have recorded it.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
NOT_MEASURED = "not measured in the run that wrote this page"
FAULTS = {
    "F01": "provider killed in mid-stream",
    "F02": "provider stopped for a while in mid-stream, then continued (zombie)",
    "F03": "scheduler killed between match and claim",
    "F04": "scheduler away for long; all providers come back at once",
    "F05": "two daemons on one key",
    "F06": "killed at every write and sync of a money database",
    "F07": "power lost: unsynced writes gone or torn",
    "F08": "disk full",
    "F09": "fsync fails",
    "F10": "database damaged: bits flipped, cut short, emptied, log deleted",
    "F11": "old backup restored",
    "F12": "database of an older or a newer version",
    "F13": "out of file descriptors or memory",
    "F14": "told to end while it works (SIGTERM), once and twice",
    "F15": "link cut, or swallowing everything, at the n-th message",
    "F16": "link slow: 200 ms there and back, 1 Mbit/s",
    "F17": "peer hung: its connections stay open and say nothing",
    "F18": "partition of the scheduler from everybody, then healed",
    "F31": "chain node away, then back",
    "F32": "reorganisations of the chain",
    "F33": "chain node that lies: wrong chain, stale, logs left out or doubled, broken answers",
    "F34": "transactions dropped, stuck or refused; killed around a broadcast",
    "F35": "gas a hundred times dearer",
    "F36": "chain congested through the close window",
    "F37": "vouchers repeated, replayed or out of order",
    "F38": "vouchers of another chain, contract or channel, or with a bent signature",
    "F39": "one deposit promised to many",
    "F40": "client closes with an old voucher, or while its payee is away",
    "F41": "client stops paying",
    "F42": "provider is paid for and sends nothing",
    "F43": "token that calls back (reentrant)",
    "F44": "token with a fee, without an answer, with a false answer, that bars a payee, that changes balances",
    "F45": "donations, dust, zero and the largest amounts, rounding",
    "F46": "griefing of registration, closes and disputes",
    "F47": "honest provider before checks and panels",
    "F54": "key file that others can read or replace",
    "F55": "wrong password; keystore cut short, weak or costly",
    "F56": "secrets in logs, arguments, environment or traces",
    "F60": "daemon answers while its engines are stuck",
}


PROMISES = {
    "I1": "nothing is owed that is not there",
    "I2": "durable before visible",
    "I3": "never two messages for one channel and amount, never a lower amount",
    "I4": "exposure stays within its limit, on both sides",
    "I5": "paid at most once for each attempt",
    "I6": "every accepted job ends, whoever dies",
    "I7": "what was billed is what was promised",
    "I8": "resources are bounded for each peer",
    "I9": "no secret and no prompt in a log, metric, trace or argument",
    "I10": "fail closed, with the reason and the command that mends it",
}
WANTED = FAULTS | PROMISES


@dataclass(frozen=True)
class Figure:
    """One line that a test wrote (tests/reliability.py)."""

    row: str
    injected: int
    figure: str
    bound: str
    test: str = ""

    @property
    def of(self) -> str:
        """The fault or promise: the row's first word."""
        return self.row.split(" ")[0]


def main(files: list[str]) -> int:
    keep = files[:1] == ["--keep"]
    figures = [Figure(**json.loads(line)) for file in files[keep:] for line in Path(file).read_text().splitlines()]
    if keep:
        renewed = {f.test for f in figures}
        figures = [f for f in kept(PAGE.read_text()) if f.test not in renewed] + figures
    PAGE.write_text(page(figures))
    missing = [row for row in WANTED if not any(f.of == row for f in figures)]
    print(f"wrote {PAGE.name}: {len(figures)} figures; no figure for {', '.join(missing) or 'none'}", file=sys.stderr)
    for row in missing:
        print(f"{row} {WANTED[row]}: recorded by {', '.join(recorders(row)) or 'no test'}", file=sys.stderr)
    return 1 if missing else 0


def page(figures: Iterable[Figure]) -> str:
    """The document: faults in order, then promises in order, then what else was tried."""
    newest = list({(f.row, f.test, f.figure.partition(":")[0]): f for f in figures}.values())
    lines = [
        "# What was broken on purpose, and what came of it",
        "",
        "Written by `make reliability` from the figures that the tests record; do not edit. Each figure is asserted by the test beside it.",
    ]
    lines += _table("| fault | injected | found | bound | test |", FAULTS, newest)
    lines += _table("| promise | tried | found | bound | test |", PROMISES, newest)
    others = sorted({f.row for f in newest if f.of not in WANTED})
    lines += _table("| also | tried | found | bound | test |", {row: "" for row in others}, newest)
    return "\n".join(lines) + "\n"


def kept(text: str) -> Iterator[Figure]:
    """The figures of a page."""
    for line in text.splitlines():
        cells = [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 5 and cells[1].replace(",", "").isdecimal() and cells[2] != NOT_MEASURED:
            first = cells[0].split(" ")[0]
            test = f"tests/{cells[4].strip('`')}" if cells[4] else ""
            yield Figure(first if first in WANTED else cells[0], int(cells[1].replace(",", "")), cells[2], cells[3], test)


def recorders(row: str, tests: Path = ROOT / "tests") -> list[str]:
    """Functions that name a row and record figures: `unit/test_x.py::test_y`."""
    return [
        f"{file.relative_to(tests)}::{function.name}"
        for file in sorted(tests.rglob("test_*.py"))
        if "record(" in (text := file.read_text(encoding="utf-8")) and f'"{row}' in text
        for function in _functions(ast.parse(text))
        if _records(function) and any(re.match(rf"{row}\b", words) for words in _strings(function))
    ]


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _records(function: ast.AST) -> bool:
    called = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    return any("record" in (getattr(name, "id", ""), getattr(name, "attr", "")) for name in called)


def _strings(tree: ast.AST) -> Iterator[str]:
    return (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def _table(head: str, rows: dict[str, str], figures: list[Figure]) -> list[str]:
    lines = ["", head, "|---|---|---|---|---|"]
    for row, words in rows.items():
        name = f"{row} {words}".rstrip()
        found = [f for f in figures if row in (f.of, f.row)]
        lines += [_line(name, f) for f in found] or [f"| {name} | 0 | {NOT_MEASURED} | | |"]
    return lines


def _line(name: str, figure: Figure) -> str:
    cells = (name, f"{figure.injected:,}", figure.figure, figure.bound, f"`{figure.test.removeprefix('tests/')}`" if figure.test else "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Text of peers in logs, errors and terminals: one printable line, bounded."""

from __future__ import annotations

import pytest

from gpumarket.core.errors import NoProvider
from gpumarket.core.hostile_text import one_line
from gpumarket.core.rpc import FILTERS_MAX, MESSAGE_MAX, rebuild


@pytest.mark.parametrize("text", ["", "stake below 10", "größer als 1 €, 模型"])
def test_hostile_text_that_is_harmless_stays_as_it_is(text: str) -> None:
    assert one_line(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ok\n2026 [info] paid", "ok\\n2026 [info] paid"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("txt\u202egpj", "txt\\u202egpj"),
        ("\ud800", "\\ud800"),
        ("a\x00b\x7f", "a\\x00b\\x7f"),
    ],
    ids=["line break", "escape sequence", "direction", "surrogate", "control"],
)
def test_hostile_text_that_a_terminal_obeys_is_escaped(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_hostile_text_that_is_long_is_cut_and_says_so() -> None:
    assert one_line("x" * 10**6, most=10) == "xxxxxxxxxx… (1000000 characters)"
    assert len(one_line("\x00" * 10**6, most=10)) < 40, "escapes count too"
    assert one_line("x" * 10, most=10) == "x" * 10


def test_hostile_text_in_an_error_of_a_peer_is_bounded() -> None:
    told = {"code": NoProvider.code, "message": "m" * 10**5, "hint": "\x1b" * 10**5, "removed": {f"f{i}\n": i for i in range(1_000)}}
    error = rebuild(told)
    assert isinstance(error, NoProvider)
    assert len(error.message) < MESSAGE_MAX + 50
    assert len(error.hint) < 600
    assert error.hint.isprintable()
    assert len(error.removed) == FILTERS_MAX
    assert all(name.isprintable() for name in error.removed)

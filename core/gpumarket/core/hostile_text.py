"""Text from strangers, before it stands in a log, an error or a terminal: bounded, and without characters that a terminal obeys.

What is not printable (control characters, line breaks, direction marks, unpaired surrogates) is shown as its escape, so that nobody writes
lines into another's log or moves its cursor; the words stay readable.
"""

from __future__ import annotations

LINE_CHARACTERS_MAX = 500
"""Longer than any sentence of ours."""


def one_line(text: str, *, most: int = LINE_CHARACTERS_MAX) -> str:
    """`text` as one printable line of at most `most` characters; where something is left out, it says how long the text was."""
    shown = text[:most]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    if len(shown) <= most and len(text) <= most:
        return shown
    return f"{shown[:most]}… ({len(text)} characters)"

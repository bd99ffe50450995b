"""W3C Trace Context as it crosses this market: one `traceparent`, of version 00, and no `tracestate`. Pure.

A remote one is a stranger's text: what is not exactly of this form is no context, and nothing of it is kept or told on.
https://www.w3.org/TR/trace-context/#traceparent-header
"""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any, NamedTuple

HEADER = "traceparent"
_FORM = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_LENGTH = 55
TRAILS_MAX = 10_000


class TraceContext(NamedTuple):
    """A span of some trace, as others may refer to it."""

    trace_id: int
    span_id: int
    flags: int

    def __str__(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.flags:02x}"


def parse(text: object) -> TraceContext | None:
    """The context that a `traceparent` names; None for anything that is not exactly one."""
    if not isinstance(text, str) or len(text) != _LENGTH:
        return None
    found = _FORM.fullmatch(text)
    if found is None:
        return None
    context = TraceContext(int(found[1], 16), int(found[2], 16), int(found[3], 16))
    return context if context.trace_id and context.span_id else None


def from_metadata(metadata: Iterable[Any] | None) -> str:
    """The caller's `traceparent` in a call's metadata (pairs); empty where there is none, several, or one that is none."""
    found = [value for key, value in metadata or () if key == HEADER]
    return found[0] if len(found) == 1 and parse(found[0]) is not None else ""


def to_metadata(traceparent: str) -> tuple[tuple[str, str], ...] | None:
    """Metadata that carries a context; None for none."""
    return ((HEADER, traceparent),) if traceparent else None


class Trails:
    """Contexts of things under way, by key: in memory only, the oldest forgotten when there are too many."""

    def __init__(self, most: int = TRAILS_MAX) -> None:
        self._kept: OrderedDict[bytes, str] = OrderedDict()
        self._most = most

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, key: bytes, traceparent: str) -> None:
        """Remember; an empty context is not worth a place."""
        if not traceparent:
            return
        self._kept[key] = traceparent
        self._kept.move_to_end(key)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def of(self, key: bytes) -> str:
        """The context of a key; empty where it is not known (any more)."""
        return self._kept.get(key, "")


class Links:
    """Contexts that some later event will refer to, by key: bounded in keys and in contexts of each, the oldest forgotten."""

    def __init__(self, keys_most: int = 1_000, each_most: int = 64) -> None:
        self._kept: OrderedDict[bytes, deque[str]] = OrderedDict()
        self._keys_most, self._each_most = keys_most, each_most

    def add(self, key: bytes, traceparent: str) -> None:
        """Remember one more; an empty context is none."""
        if not traceparent:
            return
        self._kept.setdefault(key, deque(maxlen=self._each_most)).append(traceparent)
        if len(self._kept) > self._keys_most:
            self._kept.popitem(last=False)

    def take(self, key: bytes) -> list[str]:
        """What was remembered of a key, which is forgotten with it."""
        return list(self._kept.pop(key, ()))

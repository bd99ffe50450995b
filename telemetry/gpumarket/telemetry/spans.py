"""Spans as everybody here sees them: one trace leads from a client's order to its settlement.

    with tracing.span("client.quote", parent=traceparent, task="embed") as span: ...

Parents are handed along as W3C `traceparent` text; there is no ambient context. Invariant: a span carries only the attributes listed here,
numbers and short words; no prompt, output, key, signature or message body is ever one of them, and neither is an error's text (I9). Off, a
span is one shared object that does nothing, and no package of OpenTelemetry is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from gpumarket.core.errors import GpumarketError

Attribute = str | int | bool
ATTRIBUTES = frozenset({"attempt", "code", "count", "job", "lease", "outcome", "reason", "state", "task", "units", "verdict"})
"""All that a span may say, each as `gpumarket.<name>`. `job` and `lease` are hashes that both sides know."""
TEXT_MAX = 80


class Span(Protocol):
    """Something under way. As a context manager it ends with its block, failed when that raises."""

    @property
    def context(self) -> str:
        """Its `traceparent`, to be handed to what belongs to it; empty when nothing is traced."""
        ...

    def note(self, **attributes: Attribute) -> None:
        """Say more of it."""
        ...

    def fail(self, code: str) -> None:
        """It went wrong; `code` is that of an error of the tree."""
        ...

    def end(self) -> None:
        """It is over. Ending twice is fine."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Tracing(Protocol):
    """Where spans come from."""

    @property
    def on(self) -> bool: ...

    def span(self, name: str, *, parent: str = "", links: Sequence[str] = (), **attributes: Attribute) -> Span:
        """Begin a span: of the parent's trace, or, without one or with one that is malformed, of a new one."""
        ...

    def close(self) -> None:
        """Send what is left, for a few seconds at most. May block: not on the event loop."""
        ...


class NoSpan:
    """The span of a process that does not trace."""

    context = ""

    def note(self, **attributes: Attribute) -> None:
        return None

    def fail(self, code: str) -> None:
        return None

    def end(self) -> None:
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


class NoTracing:
    """A process that does not trace."""

    on = False

    def span(self, name: str, *, parent: str = "", links: Sequence[str] = (), **attributes: Attribute) -> Span:
        return NO_SPAN

    def close(self) -> None:
        return None


NO_SPAN, OFF = NoSpan(), NoTracing()


def code_of(error: BaseException) -> str:
    """What a span may say of an error: its code, or the name of its class."""
    return error.code if isinstance(error, GpumarketError) else type(error).__name__

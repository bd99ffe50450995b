"""Stop strings in a text that comes in pieces. Pure.

Invariant: however the text is cut into pieces, what comes out joined is the text before the first stop string (of several, the one that
begins first). What could still become a stop string is held back, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpumarket.core.errors import InvalidRequest

STOP_STRINGS_MAX = 4


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as the caller gave them. Raises InvalidRequest for more than 4, or an empty one."""
    found = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(found) > STOP_STRINGS_MAX:
        raise InvalidRequest(f"{len(found)} stop strings; at most {STOP_STRINGS_MAX} are taken")
    for text in found:
        if not isinstance(text, str) or not text:
            raise InvalidRequest(f"a stop string is {text!r}; it must be a text of at least one character")
    return found


def before_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before its first stop string, and whether there was one."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


class StopMatcher:
    """Looks for stop strings while the text comes. `stopped` says that one came; nothing comes out after it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What is certain to come before every stop string."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        open_at = self._open_at()
        if found and min(found) <= open_at:
            self.stopped = True
            return self._out(min(found))
        return self._out(open_at)

    def finish(self) -> str:
        """The text has ended: what was held back, up to a stop string that is in it."""
        if self.stopped:
            return ""
        text, self.stopped = before_stop(self._held, self._stops)
        self._held = ""
        return text

    def _open_at(self) -> int:
        """Where the first stop string begins that the text ends within; its length where there is none."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for at in range(max(0, len(self._held) - longest), len(self._held)):
            tail = self._held[at:]
            if any(stop.startswith(tail) and stop != tail for stop in self._stops):
                return at
        return len(self._held)

    def _out(self, end: int) -> str:
        text, self._held = self._held[:end], self._held[end:]
        return text

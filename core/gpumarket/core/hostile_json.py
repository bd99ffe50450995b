"""JSON from strangers: bounded in depth before a parser that recurses sees it.

The interpreter's recursion limit is no such bound: a library that raises it lets a few thousand brackets overflow the C stack, which ends
the process (seen with CPython 3.11).
"""

from __future__ import annotations

import json
import re
from typing import Any

DEPTH_MAX = 64
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{\]}]')
_OPENING, _CLOSING = frozenset(b"[{"), frozenset(b"]}")


def loads(raw: bytes | str, *, depth_max: int = DEPTH_MAX) -> Any:
    """The value that `raw` holds. Raises ValueError for what is no JSON, no UTF-8, or nested deeper than `depth_max`."""
    data = raw.encode() if isinstance(raw, str) else raw
    require_shallow(data, depth_max=depth_max)
    return json.loads(data)


def require_shallow(data: bytes, *, depth_max: int = DEPTH_MAX) -> None:
    """Raises ValueError for JSON that is nested deeper than `depth_max`; what is no JSON may pass."""
    depth = 0
    for token in _TOKEN.finditer(data):
        first = data[token.start()]
        if first in _OPENING:
            depth += 1
            if depth > depth_max:
                raise ValueError(f"JSON nested deeper than {depth_max}")
        elif first in _CLOSING:
            depth -= 1

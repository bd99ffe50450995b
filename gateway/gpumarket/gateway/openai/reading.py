"""From a request body to a table's struct, or a problem that names the parameter at fault."""

from __future__ import annotations

import re
from functools import cache
from typing import Generic, TypeVar

import msgspec
from msgspec import Struct

from gpumarket.core.hostile_json import DEPTH_MAX, require_shallow
from gpumarket.gateway.openai.fields import rules
from gpumarket.gateway.problems import Problem, invalid, unsupported

T = TypeVar("T", bound=Struct)
_PLACE = re.compile(r" - at `\$\.?(.*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_MISSING = re.compile(r"Object missing required field `(.*)`")
_VALUE = re.compile(r"Invalid (?:enum )?value '(.*)'")


class Reader(Generic[T]):
    """Reads bodies of one endpoint."""

    def __init__(self, table: type[T]) -> None:
        self._decoder = msgspec.json.Decoder(table)
        self._rules = rules(table)

    def read(self, body: bytes) -> T:
        """Raises Problem (400)."""
        try:
            if body.count(b"[") + body.count(b"{") > DEPTH_MAX:  # else it cannot be nested deeper
                require_shallow(body)
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise self._told(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise invalid(f"the body is not JSON that can be read: {error}", code="invalid_json") from None

    def _told(self, text: str) -> Problem:
        """msgspec's word as a caller needs it."""
        found = _PLACE.search(text)
        path, text = (found[1], text[: found.start()]) if found else ("", text)
        if match := _UNKNOWN.match(text):
            param = _joined(path, match[1][:100])
            return Problem(400, "unknown_parameter", f"there is no parameter {param}", param=param)
        if match := _MISSING.match(text):
            param = _joined(path, match[1])
            return Problem(400, "missing_required_parameter", f"{param} is missing", param=param)
        top = re.split(r"[.\[]", path, maxsplit=1)[0]
        rule = self._rules.get(top, "supported")
        if rule == "refused":
            return unsupported(top)
        if rule == "no-op":
            return unsupported(top, f"it is taken only where it changes nothing ({_plain(text)})")
        if match := _VALUE.match(text):
            what = match[1][:100]
            return Problem(400, "unsupported_value", f"{path} {what!r} is not supported by this gateway", param=path)
        return invalid(f"{path or 'the body'}: {_plain(text)}", path or None)


@cache
def reader_of(table: type[T]) -> Reader[T]:
    """The reader of one table, made once."""
    return Reader(table)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _plain(text: str) -> str:
    return text.replace("`", "")[:1].lower() + text.replace("`", "")[1:]

"""A strict reader of protobuf's wire format, for files whose every byte must have been looked at before a library in C++ sees them.

Stricter than protobuf itself: unknown fields, groups, a second value of a singular field and invalid UTF-8 are refused, so that no other
reader can find in the bytes what this one did not. Messages and numbers are counted, depth is that of the schemas, which must not refer to
themselves; long data stays a view of the input.
Source: the encoding page of the Protocol Buffers documentation.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
_WIRE: Final = {"int": VARINT, "float": FIXED32, "double": FIXED64, "bytes": LENGTH, "text": LENGTH, "message": LENGTH}
_FIXED_BYTES: Final = {"float": 4, "double": 8}

Message = dict[str, Any]
"""Field name → value; a repeated field is a list, an absent one is missing (`field` reads either)."""


class WireError(ValueError):
    """Bytes that are refused. `reason` is one word for it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a schema. `kind`: int, float, double, bytes, text or message."""

    name: str
    kind: str
    repeated: bool = False
    of: str = ""
    """Name of a message's schema."""


Schemas = Mapping[str, Mapping[int, Field]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one file may hold. `numbers` are those of repeated integers; floats are never taken apart."""

    messages: int
    numbers: int


class Reader:
    """Reads one file."""

    def __init__(self, schemas: Schemas, limits: Limits) -> None:
        self._schemas, self._limits = schemas, limits
        self._messages = self._numbers = 0

    def read(self, data: memoryview, schema: str) -> Message:
        """A message. Raises WireError."""
        self._messages += 1
        if self._messages > self._limits.messages:
            raise WireError("too-many-messages", f"more than {self._limits.messages} messages")
        fields, found, at = self._schemas[schema], Message(), 0
        while at < len(data):
            tag, at = _varint(data, at)
            field = fields.get(tag >> 3)
            if field is None:
                raise WireError("unknown-field", f"field {tag >> 3} of {schema}, which is none")
            raw, at = _value(data, at, tag & 7)
            self._keep(found, field, tag & 7, raw, schema)
        return found

    def _keep(self, found: Message, field: Field, wire: int, raw: int | memoryview, schema: str) -> None:
        if wire == LENGTH and field.kind in ("int", "float", "double") and field.repeated:
            assert isinstance(raw, memoryview)
            found.setdefault(field.name, []).extend(self._packed(field, raw))
            return
        if wire != _WIRE[field.kind]:
            raise WireError("malformed", f"{schema}.{field.name} in another form than it has")
        value = self._one(field, raw)
        if field.repeated:
            self._count(field)
            found.setdefault(field.name, []).append(value)
        elif field.name in found:
            raise WireError("repeated-field", f"{schema}.{field.name} twice")
        else:
            found[field.name] = value

    def _one(self, field: Field, raw: int | memoryview) -> Any:
        if isinstance(raw, int):
            return raw - (1 << 64) if raw >= 1 << 63 else raw
        if field.kind == "message":
            return self.read(raw, field.of)
        if field.kind == "text":
            try:
                return bytes(raw).decode()
            except UnicodeDecodeError as error:
                raise WireError("malformed", f"{field.name} is no UTF-8") from error
        return raw

    def _packed(self, field: Field, raw: memoryview) -> list[Any]:
        """Floats stay one view of all of them; integers are taken apart."""
        if field.kind != "int":
            if len(raw) % _FIXED_BYTES[field.kind]:
                raise WireError("malformed", f"{field.name} ends in the middle of a number")
            return [raw]
        values, at = [], 0
        while at < len(raw):
            value, at = _varint(raw, at)
            self._count(field)
            values.append(value - (1 << 64) if value >= 1 << 63 else value)
        return values

    def _count(self, field: Field) -> None:
        if field.kind != "message":
            self._numbers += 1
            if self._numbers > self._limits.numbers:
                raise WireError("too-many-numbers", f"more than {self._limits.numbers} numbers outside raw data")


def floats(views: list[memoryview]) -> list[float]:
    """The numbers of a repeated float field."""
    return [value for view in views for (value,) in struct.iter_unpack("<f", view)]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            if value >= 1 << 64:
                raise WireError("malformed", "a number of more than 64 bits")
            return value, at
    raise WireError("malformed", "the file ends in the middle of a number" if at >= len(data) else "a number of more than ten bytes")


def _value(data: memoryview, at: int, wire: int) -> tuple[int | memoryview, int]:
    if wire == VARINT:
        return _varint(data, at)
    if wire == LENGTH:
        size, at = _varint(data, at)
    elif wire in (FIXED32, FIXED64):
        size = 4 if wire == FIXED32 else 8
    else:
        raise WireError("malformed", f"wire type {wire}, which is not used")
    if size > len(data) - at:
        raise WireError("malformed", "the file ends in the middle of a field")
    return data[at : at + size], at + size

"""EIP-712 typed data from frozen dataclasses.

A term's type string is its class name and its fields in order, in camelCase, with the types of `_WORD` (an enum is a uint8); every field is
one 32-byte word, so a struct hash is one packing and one keccak (EIP-712, "Definition of hashStruct").
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Annotated, Any, ClassVar, TypeVar, dataclass_transform, get_type_hints

from gpumarket.core import keccak as _keccak
from gpumarket.core.units import MONEY_MAX, Address, Hash, Money

T = TypeVar("T", bound="Term")


def keccak256(data: bytes) -> Hash:
    """Keccak-256 as Ethereum uses it."""
    return Hash(_keccak.digest(data))


Uint32 = Annotated[int, "uint32"]
Uint64 = Annotated[int, "uint64"]


@dataclass(frozen=True, slots=True)
class _Word:
    """How a Python value becomes one EIP-712 word."""

    solidity: str
    format: str
    """The word as `struct` packs it; money enters as 12 bytes."""
    type: type
    length: int
    """Of bytes; 0 for what is none."""
    valid: Callable[[Any], bool]


def _uint(bits: int, letter: str) -> _Word:
    top = 1 << bits
    return _Word(f"uint{bits}", f"{32 - bits // 8}x{letter}", int, 0, lambda v: isinstance(v, int) and 0 <= v < top)


_WORD: dict[Any, _Word] = {
    Address: _Word("address", "12x20s", bytes, 20, lambda v: isinstance(v, bytes) and len(v) == 20),
    Hash: _Word("bytes32", "32s", bytes, 32, lambda v: isinstance(v, bytes) and len(v) == 32),
    Money: _Word("uint96", "20x12s", int, 0, lambda v: isinstance(v, int) and 0 <= v <= MONEY_MAX),
    bool: _Word("bool", "31x?", bool, 0, lambda v: isinstance(v, bool)),
    Uint32: _uint(32, "I"),
    Uint64: _uint(64, "Q"),
}
_ENUM = _uint(8, "B")


def _word(hint: Any) -> _Word:
    return _ENUM if _is_enum(hint) else _WORD[hint]


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.IntEnum)


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


class _Layout:
    """A term's words, taken apart by what is done with their values."""

    __slots__ = ("_lengths", "_pack", "_types", "money")

    def __init__(self, kinds: list[tuple[_Word, type]]) -> None:
        self._pack = struct.Struct(">" + "".join(word.format for word, _ in kinds)).pack
        self._types = [kind for _, kind in kinds]
        self._lengths = [(at, word.length) for at, (word, _) in enumerate(kinds) if word.length]
        self.money = tuple(at for at, (word, _) in enumerate(kinds) if word is _WORD[Money])

    def packed(self, values: tuple[Any, ...]) -> bytes:
        """The words of valid values, one after another."""
        row = list(values)
        for at in self.money:
            row[at] = row[at].to_bytes(12, "big")
        return self._pack(*row)

    def surely_valid(self, values: tuple[Any, ...]) -> bool:
        """Whether values of just the expected types are valid; others may be, and are looked at one by one."""
        if list(map(type, values)) != self._types:
            return False
        for at, length in self._lengths:
            if len(values[at]) != length:
                return False
        try:
            self.packed(values)  # refuses every number that does not fit its word
        except (struct.error, OverflowError):
            return False
        return True


class Term:
    """Base of every signed statement."""

    __slots__ = ()
    TYPE: ClassVar[str]
    TYPE_HASH: ClassVar[Hash]
    WORDS: ClassVar[tuple[tuple[str, _Word], ...]]
    ENUMS: ClassVar[tuple[tuple[str, type[enum.IntEnum]], ...]]

    # WORDS taken apart once per class, for the hot path: an order makes, checks and hashes three terms.
    VALUES: ClassVar[Any]
    MONEY: ClassVar[tuple[int, ...]]
    """Positions of the fields that hold money."""
    ENUMS_AT: ClassVar[tuple[tuple[int, type[enum.IntEnum]], ...]]
    """Positions of the fields that are enums, and which."""
    _LAYOUT: ClassVar[_Layout]

    def __post_init__(self) -> None:
        values = self.VALUES(self)
        if not self._LAYOUT.surely_valid(values):
            for (name, word), value in zip(self.WORDS, values, strict=True):
                if not word.valid(value):
                    raise ValueError(f"{type(self).__name__}.{name} is not a {word.solidity}: {value!r}")
        self.check()

    def check(self) -> None:
        """Rules between fields. Raises ValueError."""

    def plain(self) -> tuple[Any, ...]:
        """The values in the order of the fields, enums as integers."""
        enums = {name for name, _ in self.ENUMS}
        return tuple(int(value) if name in enums else value for (name, _), value in zip(self.WORDS, self.VALUES(self), strict=True))

    @property
    def struct_hash(self) -> Hash:
        """EIP-712 hashStruct."""
        return keccak256(self.TYPE_HASH + self._LAYOUT.packed(self.VALUES(self)))

    @classmethod
    def typed_fields(cls) -> list[dict[str, str]]:
        """Field list as wallets' sign-typed-data calls take it."""
        return [{"name": _camel(name), "type": word.solidity} for name, word in cls.WORDS]

    def typed_message(self) -> dict[str, Any]:
        """Message as wallets' sign-typed-data calls take it (addresses as bytes)."""
        return {_camel(name): getattr(self, name) for name, _ in self.WORDS}


@dataclass_transform(frozen_default=True)
def term(cls: type[T]) -> type[T]:
    """Make a class a frozen term and derive its EIP-712 type string from its fields."""
    made = dataclass(frozen=True, slots=True)(cls)
    hints = get_type_hints(made, include_extras=True)
    words = tuple((field.name, _word(hints[field.name])) for field in fields(made))  # type: ignore[arg-type]
    made.WORDS = words
    made.VALUES = staticmethod(attrgetter(*(name for name, _ in words)))
    made.ENUMS = tuple((name, kind) for name, kind in hints.items() if _is_enum(kind))
    made._LAYOUT = _Layout([(word, dict(made.ENUMS).get(name, word.type)) for name, word in words])
    made.MONEY = made._LAYOUT.money
    made.ENUMS_AT = tuple((at, hints[name]) for at, (name, _) in enumerate(words) if _is_enum(hints[name]))
    made.TYPE = f"{cls.__name__}({','.join(f'{w.solidity} {_camel(n)}' for n, w in words)})"
    made.TYPE_HASH = keccak256(made.TYPE.encode())
    return made

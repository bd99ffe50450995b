"""EIP-712 typed data from frozen dataclasses.

A term's type string is its class name and its fields in order, in camelCase, with the types of `_WORD` (an enum is a uint8); every field is
one 32-byte word, so a struct hash is one join and one keccak (EIP-712, "Definition of hashStruct").
"""

from __future__ import annotations

import enum
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
    encode: Callable[[Any], bytes]
    valid: Callable[[Any], bool]


def _uint(bits: int) -> _Word:
    top = 1 << bits
    return _Word(f"uint{bits}", lambda v: v.to_bytes(32, "big"), lambda v: isinstance(v, int) and 0 <= v < top)


_WORD: dict[Any, _Word] = {
    Address: _Word("address", lambda v: v.rjust(32, b"\0"), lambda v: isinstance(v, bytes) and len(v) == 20),
    Hash: _Word("bytes32", lambda v: v, lambda v: isinstance(v, bytes) and len(v) == 32),
    Money: _Word("uint96", lambda v: v.to_bytes(32, "big"), lambda v: isinstance(v, int) and 0 <= v <= MONEY_MAX),
    bool: _Word("bool", lambda v: bytes(31) + (b"\1" if v else b"\0"), lambda v: isinstance(v, bool)),
    Uint32: _uint(32),
    Uint64: _uint(64),
}


def _word(hint: Any) -> _Word:
    return _uint(8) if _is_enum(hint) else _WORD[hint]


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.IntEnum)


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


class Term:
    """Base of every signed statement."""

    __slots__ = ()
    TYPE: ClassVar[str]
    TYPE_HASH: ClassVar[Hash]
    WORDS: ClassVar[tuple[tuple[str, _Word], ...]]
    ENUMS: ClassVar[tuple[tuple[str, type[enum.IntEnum]], ...]]

    # WORDS taken apart once per class, for the hot path: an order makes, checks and hashes three terms.
    VALUES: ClassVar[Any]
    VALID: ClassVar[tuple[Callable[[Any], bool], ...]]
    ENCODE: ClassVar[tuple[Callable[[Any], bytes], ...]]

    def __post_init__(self) -> None:
        for position, (valid, value) in enumerate(zip(self.VALID, self.VALUES(self), strict=True)):
            if not valid(value):
                name, word = self.WORDS[position]
                raise ValueError(f"{type(self).__name__}.{name} is not a {word.solidity}: {value!r}")
        self.check()

    def check(self) -> None:
        """Rules between fields. Raises ValueError."""

    @property
    def struct_hash(self) -> Hash:
        """EIP-712 hashStruct."""
        words = [encode(value) for encode, value in zip(self.ENCODE, self.VALUES(self), strict=True)]
        return keccak256(self.TYPE_HASH + b"".join(words))

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
    made.VALID = tuple(word.valid for _, word in words)
    made.ENCODE = tuple(word.encode for _, word in words)
    made.ENUMS = tuple((name, kind) for name, kind in hints.items() if _is_enum(kind))
    made.TYPE = f"{cls.__name__}({','.join(f'{w.solidity} {_camel(n)}' for n, w in words)})"
    made.TYPE_HASH = keccak256(made.TYPE.encode())
    return made

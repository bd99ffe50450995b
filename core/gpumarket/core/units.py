"""Quantities. Money is an int of base units, never a float; rounding goes against whoever claims it, and the function's name says so."""

from __future__ import annotations

from decimal import Context, Decimal, Inexact, InvalidOperation
from typing import NewType

Address = NewType("Address", bytes)
"""20 bytes of an Ethereum account."""
Hash = NewType("Hash", bytes)
"""32 bytes."""
Money = NewType("Money", int)
"""Base units of the market's token (10^-18 of it for MarketToken), 0 .. 2^96 - 1."""
Seconds = NewType("Seconds", int)
"""Unix seconds where it names a point in time."""

MONEY_MAX = 2**96 - 1
TOKEN_DECIMALS = 18
PER_MILLION = 1_000_000
_EXACT = Context(prec=120, traps=[InvalidOperation, Inexact])
"""uint96 has 29 digits, the default context 28: it would round money without a word."""
ZERO_HASH = Hash(bytes(32))
ZERO_ADDRESS = Address(bytes(20))


def parse_money(text: str, decimals: int = TOKEN_DECIMALS) -> Money:
    """Base units of a decimal amount such as "0.01".

    Raises ValueError for anything that is not a finite, non-negative decimal with at most `decimals` places within uint96.
    """
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{text!r} is not an amount; write it like 0.01") from None
    if not value.is_finite() or value < 0:
        raise ValueError(f"{text!r} is not an amount of money: it must be finite and not negative")
    if value and value.adjusted() + decimals > len(str(MONEY_MAX)):
        raise ValueError(f"{text!r} is more than a channel can hold")
    if value and value.adjusted() < -decimals - 1:
        raise ValueError(f"{text!r} has more than {decimals} decimal places")
    try:
        scaled = value.scaleb(decimals, _EXACT).to_integral_exact(context=_EXACT)
    except (Inexact, InvalidOperation):
        raise ValueError(f"{text!r} has more than {decimals} decimal places") from None
    if scaled > MONEY_MAX:
        raise ValueError(f"{text!r} is more than a channel can hold")
    return Money(int(scaled))


def format_money(amount: int, decimals: int = TOKEN_DECIMALS) -> str:
    """Decimal text of base units, exact, without trailing zeros."""
    text = format(Decimal(amount).scaleb(-decimals, _EXACT), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def price_floor(units: int, price_per_million: int) -> Money:
    """What `units` earn at a price per 1,000,000 units, rounded down: against the payee, who claims it."""
    return Money(units * price_per_million // PER_MILLION)


def price_ceil(units: int, price_per_million: int) -> Money:
    """What must be covered for `units`, rounded up: a maximum is never too small for what may be earned."""
    return Money(-(-units * price_per_million // PER_MILLION))


def fee_floor(amount: int, fee_ppm: int) -> Money:
    """The scheduler's fee on an earned amount, rounded down: against the scheduler."""
    return Money(amount * fee_ppm // PER_MILLION)


def money_bytes(amount: int) -> bytes:
    """Wire form of money: big-endian, no leading zero byte, empty for 0. Raises ValueError outside uint96."""
    if not 0 <= amount <= MONEY_MAX:
        raise ValueError(f"{amount} does not fit uint96")
    return amount.to_bytes((amount.bit_length() + 7) // 8, "big")


def money_from_bytes(raw: bytes) -> Money:
    """Inverse of `money_bytes`. Raises ValueError for a form that is not canonical."""
    if len(raw) > 12 or (raw and raw[0] == 0):
        raise ValueError("money is at most 12 big-endian bytes without a leading zero")
    return Money(int.from_bytes(raw, "big"))


def hex0x(raw: bytes) -> str:
    """0x-prefixed hex."""
    return "0x" + raw.hex()


def parse_address(text: str) -> Address:
    """20 bytes of a 0x address. Raises ValueError."""
    return Address(_parse_hex(text, 20, "an address"))


def parse_hash(text: str) -> Hash:
    """32 bytes of a 0x hash. Raises ValueError."""
    return Hash(_parse_hex(text, 32, "a hash"))


def _parse_hex(text: str, size: int, what: str) -> bytes:
    try:
        raw = bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        raise ValueError(f"{text!r} is not {what}: it must be 0x and {2 * size} hex digits") from None
    if len(raw) != size:
        raise ValueError(f"{text!r} is not {what}: it has {len(raw)} bytes, not {size}")
    return raw

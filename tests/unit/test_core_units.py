"""Money and hex: exact both ways, canonical on the wire, rounded against the claimant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumarket.core.units import (
    MONEY_MAX,
    fee_floor,
    format_money,
    money_bytes,
    money_from_bytes,
    parse_address,
    parse_hash,
    parse_money,
    price_ceil,
    price_floor,
)

amounts = st.integers(0, MONEY_MAX)


@given(amounts)
def test_money_text_round_trip_is_exact(amount: int) -> None:
    assert parse_money(format_money(amount)) == amount


@pytest.mark.parametrize("amount", [MONEY_MAX, MONEY_MAX - 1, 12345678901123456789012345678])
def test_money_text_of_29_digits_is_not_rounded(amount: int) -> None:
    assert format_money(amount).replace(".", "") == str(amount)


@given(amounts)
def test_money_bytes_round_trip_is_canonical(amount: int) -> None:
    raw = money_bytes(amount)
    assert money_from_bytes(raw) == amount
    assert len(raw) <= 12 and not raw.startswith(b"\0")


@pytest.mark.parametrize("raw", [b"\0", b"\0\1", b"\1" * 13])
def test_money_bytes_not_canonical_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="12 big-endian bytes"):
        money_from_bytes(raw)


@pytest.mark.parametrize("amount", [-1, MONEY_MAX + 1])
def test_money_bytes_outside_uint96_is_refused(amount: int) -> None:
    with pytest.raises(ValueError, match="uint96"):
        money_bytes(amount)


@pytest.mark.parametrize(
    "text", ["-1", "nan", "inf", "", "one", "0.0000000000000000001", "1e-30", "1e30", "79228162514.264337593543950336"]
)
def test_money_text_that_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"amount|decimal places|channel can hold"):
        parse_money(text)


@pytest.mark.parametrize(("text", "amount"), [("0.01", 10**16), ("1", 10**18), ("1e3", 10**21), ("0", 0), ("1.10", 11 * 10**17)])
def test_money_text_in_tokens_becomes_base_units(text: str, amount: int) -> None:
    assert parse_money(text) == amount


@given(st.integers(0, 2**32), st.integers(0, 2**64), st.integers(0, 1_000_000))
def test_prices_round_against_whoever_claims(units: int, price: int, fee_ppm: int) -> None:
    floor, ceil = price_floor(units, price), price_ceil(units, price)
    assert floor * 1_000_000 <= units * price <= ceil * 1_000_000
    assert ceil - floor <= 1
    assert fee_floor(floor, fee_ppm) * 1_000_000 <= floor * fee_ppm


@pytest.mark.parametrize("text", ["0x", "0x12", "zz" * 20, "0x" + "11" * 21])
def test_hex_of_wrong_size_or_letters_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="address"):
        parse_address(text)
    with pytest.raises(ValueError, match="hash"):
        parse_hash(text)

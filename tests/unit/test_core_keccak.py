"""The two Keccak-256 implementations are one function."""

from __future__ import annotations

import pytest

from gpumarket.core import keccak


@pytest.mark.parametrize("size", [0, 1, 31, 32, 64, 135, 136, 137, 704, 5_000])
def test_keccak_of_any_size_equals_the_portable_one(size: int) -> None:
    data = bytes(i * 7 % 256 for i in range(size))
    assert keccak.digest(data) == keccak.portable(data)


def test_keccak_of_nothing_is_the_known_vector() -> None:
    assert keccak.digest(b"").hex() == "c5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470"

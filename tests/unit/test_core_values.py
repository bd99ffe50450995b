"""Copies of frozen values: like dataclasses.replace, and refused where that would do more."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from gpumarket.core.terms import Voucher
from gpumarket.core.units import Hash, Money
from gpumarket.core.values import replace


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: int = 0


def test_replace_of_fields_equals_that_of_dataclasses() -> None:
    point = Point(1, 2)
    assert replace(point, y=5) == dataclasses.replace(point, y=5) == Point(1, 5)
    assert point == Point(1, 2)


def test_replace_of_a_field_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="no field z"):
        replace(Point(1), z=1)


def test_replace_of_a_value_that_checks_itself_is_refused() -> None:
    with pytest.raises(TypeError, match=r"dataclasses\.replace"):
        replace(Voucher(Hash(b"c" * 32), Money(1)), cumulative=-1)

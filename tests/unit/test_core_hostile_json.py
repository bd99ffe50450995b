"""JSON from strangers."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumarket.core.hostile_json import DEPTH_MAX, loads

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


@given(values)
def test_hostile_json_sound_document_comes_back(value: object) -> None:
    assert loads(json.dumps(value)) == value
    assert loads(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":['])
def test_hostile_json_deep_nesting_is_refused_whatever_the_recursion_limit(opening: str) -> None:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10**9)
    try:
        with pytest.raises(ValueError, match="nested deeper"):
            loads(opening * 100_000)
    finally:
        sys.setrecursionlimit(before)


def test_hostile_json_brackets_inside_strings_do_not_count() -> None:
    text = "[" * 10_000 + '\\"' + "{" * 10_000
    assert loads(json.dumps({"a": text, "b": [text]})) == {"a": text, "b": [text]}


def test_hostile_json_depth_limit_is_exact() -> None:
    assert loads("[" * DEPTH_MAX + "]" * DEPTH_MAX)
    with pytest.raises(ValueError, match="nested deeper"):
        loads("[" * (DEPTH_MAX + 1) + "]" * (DEPTH_MAX + 1))


@pytest.mark.parametrize("raw", [b"", b"not json", b'{"a": ', b"\xff\xfe\x00", b'"unended', b"]" * 100])
def test_hostile_json_broken_document_is_a_value_error(raw: bytes) -> None:
    with pytest.raises(ValueError):
        loads(raw)

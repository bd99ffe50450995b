"""However a text is cut into pieces, what comes out is the text before its first stop string."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumarket.core.errors import ConfigError
from gpumarket.sdk.stopping import StopMatcher, before_stop, stop_strings

FEW = st.text("abñ", max_size=24)
STOPS = st.lists(st.text("abñ", min_size=1, max_size=5), max_size=4).map(tuple)


@given(FEW, STOPS, st.lists(st.integers(0, 24)))
def test_stopping_any_split_gives_the_text_before_the_first_stop_string(text: str, stops: tuple[str, ...], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    matcher, found = StopMatcher(stops), ""
    for start, end in pairwise(edges):
        found += matcher.push(text[start:end])
        assert text.startswith(found)
        assert not any(stop in found for stop in stops)
    found += matcher.finish()
    cut = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    assert (found, matcher.stopped) == (text[:cut], cut < len(text))
    assert (found, matcher.stopped) == before_stop(text, stops)


@given(FEW, st.text("abñ", min_size=1, max_size=5))
def test_stopping_holds_back_less_than_the_stop_string(text: str, stop: str) -> None:
    matcher, found = StopMatcher((stop,)), ""
    for end, character in enumerate(text, 1):
        found += matcher.push(character)
        if not matcher.stopped:
            assert end - len(found) < len(stop)


def test_stopping_of_two_that_overlap_the_one_that_begins_first_counts() -> None:
    matcher = StopMatcher(("bc", "abcd"))
    assert [matcher.push(piece) for piece in ("xa", "bc")] == ["x", ""]
    assert not matcher.stopped  # "abcd" may still come, and would begin before "bc"
    assert (matcher.push("e"), matcher.stopped) == ("a", True)
    other = StopMatcher(("bc", "abcd"))
    assert (other.push("xabcd"), other.stopped) == ("x", True)


def test_stopping_nothing_comes_out_after_a_stop_string() -> None:
    matcher = StopMatcher(("end",))
    assert (matcher.push("the end of"), matcher.push(" it all"), matcher.finish()) == ("the ", "", "")


def test_stop_strings_one_or_several_are_taken_and_others_refused() -> None:
    assert (stop_strings(None), stop_strings("x"), stop_strings(["x", "yz"])) == ((), ("x",), ("x", "yz"))
    with pytest.raises(ConfigError, match="5 stop strings; at most 4"):
        stop_strings(["a", "b", "c", "d", "e"])
    with pytest.raises(ConfigError, match="at least one character"):
        stop_strings(["a", ""])

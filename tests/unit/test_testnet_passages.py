"""The demo's document: paragraphs, batches, nearest passages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpumarket.core.errors import ConfigError
from gpumarket.testnet import passages


def test_shipped_text_has_passages_and_one_answers_the_default_question() -> None:
    found = passages.paragraphs(passages.read_document(None))
    assert len(found) >= 8
    assert any("caught cheating" in passage for passage in found)


def test_paragraphs_join_lines_and_leave_headings_out() -> None:
    assert passages.paragraphs("# A heading of many words\r\n\r\none two\r\nthree four\n\nscrap\n\nfive six seven eight\n") == [
        "one two three four",
        "five six seven eight",
    ]


def test_document_without_a_passage_is_refused() -> None:
    with pytest.raises(ConfigError):
        passages.paragraphs("# only\n\na heading")


def test_document_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        passages.read_document(tmp_path / "none.txt")
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        passages.read_document(tmp_path / "image")


@pytest.mark.parametrize("count", [1, 3, 4, 12, 100])
def test_batches_keep_order_and_never_pass_the_limit(count: int) -> None:
    items = [str(index) for index in range(count)]
    found = passages.batches(items, jobs_max=5, size_min=3)
    assert [item for batch in found for item in batch] == items
    assert len(found) <= 5 and all(len(batch) >= 3 for batch in found[:-1])


def test_nearest_is_by_cosine_best_first() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    assert [index for index, _ in passages.nearest(np.array([0, 1], dtype=np.float32), vectors, 2)] == [1, 2]

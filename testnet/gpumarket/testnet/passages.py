"""A document as passages, and the passages nearest to a question. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.errors import ConfigError

DEFAULT_QUESTION = "What happens to a provider that is caught cheating?"
DOCUMENT_BYTES_MAX = 4 << 20
_WORDS_MIN = 4


def read_document(file: Path | None) -> str:
    """The text of `file`, or the one shipped with the package. Raises ConfigError for what is no text."""
    if file is None:
        return (resources.files("gpumarket.testnet") / "texts" / "market.md").read_text("utf-8")
    try:
        if file.stat().st_size > DOCUMENT_BYTES_MAX:
            raise ConfigError(f"{file} is larger than {DOCUMENT_BYTES_MAX >> 20} MiB", hint="give a shorter text")
        return file.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", hint="give a text file with --file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text", hint="convert it first") from error


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text: blocks between empty lines, in one line each; headings and scraps are left out. Raises ConfigError."""
    blocks = (" ".join(block.split()) for block in text.replace("\r\n", "\n").split("\n\n"))
    found = [block for block in blocks if len(block.split()) >= _WORDS_MIN and not block.startswith("#")]
    if not found:
        raise ConfigError("the document has no paragraph of at least four words", hint="give a longer text with --file")
    return found


def batches(items: Sequence[str], *, jobs_max: int, size_min: int) -> list[list[str]]:
    """`items` in order, in at most `jobs_max` batches of at least `size_min` (but the last)."""
    size = max(size_min, -(-len(items) // jobs_max))
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def nearest(question: NDArray[np.float32], vectors: NDArray[np.float32], count: int) -> list[tuple[int, float]]:
    """(index, cosine) of the `count` rows nearest to the question, best first; all vectors have length one."""
    scores = vectors @ question
    order = np.argsort(-scores, kind="stable")[:count]
    return [(int(index), float(scores[index])) for index in order]

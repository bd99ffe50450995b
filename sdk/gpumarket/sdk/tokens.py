"""Text to token ids and back, with the tokenizer that the model's digest pins.

The wire carries token ids, so this is the only place where text and ids meet. Decoding is incremental: a character whose bytes are
spread over several tokens comes out once, whole, when its last token is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpumarket.core.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNFINISHED = "\ufffd"


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one input. `full_length` is how many there were before the cut to the model's limit."""

    ids: tuple[int, ...]
    full_length: int

    @property
    def truncated(self) -> bool:
        return self.full_length > len(self.ids)


class TextCodec:
    """A model's tokenizer. Raises ConfigError for a file that is none."""

    def __init__(self, tokenizer_json: bytes) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        except Exception as error:  # the Rust side raises bare Exception
            raise ConfigError(f"the model's tokenizer.json cannot be read: {error}", hint="gpumarket doctor") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, text: str, *, limit: int, special_tokens: bool = True) -> Encoded:
        """Ids of a text, cut to `limit` from the end with the post-processor's own marks ([CLS], [SEP]) kept."""
        full = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
        if len(full) <= limit:
            return Encoded(tuple(full), len(full))
        self._tokenizer.enable_truncation(limit)
        try:
            cut = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
        finally:
            self._tokenizer.no_truncation()
        return Encoded(tuple(cut), len(full))

    def token_id(self, text: str) -> int | None:
        """Id of a token by its text, None when the vocabulary has none."""
        found: int | None = self._tokenizer.token_to_id(text)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def decoder(self) -> IncrementalDecoder:
        """A decoder for one answer."""
        return IncrementalDecoder(self)


class IncrementalDecoder:
    """Pieces of text as tokens come. Invariant: the pieces joined are `decode` of all ids.

    Each step decodes a short tail twice, with and without the new tokens, and hands out the difference; a tail that ends within a
    character is kept until it is whole. (The method of text-generation-inference and vLLM.)
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._tail = 0
        """Where the context of the next step begins."""
        self._read = 0
        """Ids before this are handed out."""

    def push(self, ids: Sequence[int]) -> str:
        """Text that these ids finish; empty while a character is incomplete."""
        self._ids.extend(ids)
        before, after = self._difference()
        if len(after) <= len(before) or after.endswith(_UNFINISHED):
            return ""
        self._tail, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        """What is left when the answer has ended, an incomplete character as U+FFFD."""
        before, after = self._difference()
        self._tail = self._read = len(self._ids)
        return after[len(before) :]

    def _difference(self) -> tuple[str, str]:
        before = self._codec.decode(self._ids[self._tail : self._read])
        return before, self._codec.decode(self._ids[self._tail :])

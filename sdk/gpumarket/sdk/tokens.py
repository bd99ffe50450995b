"""Text to token ids and back, with the tokenizer that the model's digest pins.

The wire carries token ids, so this is the only place where text and ids meet. Decoding is incremental: a character whose bytes are
spread over several tokens comes out once, whole, when its last token is there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gpumarket.core import hostile_json
from gpumarket.core.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNFINISHED = "\ufffd"
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's `bytes_to_unicode`), inverted: bytes that print stand
    for themselves, the others for what comes after U+00FF, in their order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


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
        self._file = tokenizer_json
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

    @property
    def vocabulary(self) -> int:
        """Ids that this tokenizer knows; a model's own vocabulary may be padded beyond them."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    def spelled(self, token: int) -> tuple[int, str, bytes]:
        """The token, its text and its bytes. A token may be a part of a character: its text then has U+FFFD. A special token, or one that
        is not in this vocabulary, has its name, or nothing, for both."""
        raw = self._raw(token)
        return token, raw.decode("utf-8", "replace"), raw

    def _raw(self, token: int) -> bytes:
        name: str | None = self._tokenizer.id_to_token(token)
        if name is None:
            return b""
        if token in self._added:
            return name.encode()
        kinds = self._decoders
        if "ByteLevel" in kinds and all(c in _BYTE_OF for c in name):
            return bytes(_BYTE_OF[c] for c in name)
        if "ByteFallback" in kinds and (byte := _BYTE_TOKEN.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        return name.replace("\u2581", " ").encode() if "Metaspace" in kinds or "Replace" in kinds else self.decode([token]).encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def _decoders(self) -> frozenset[str]:
        """Kinds of decoder that the tokenizer's file names, those within a sequence included."""
        todo: list[Any] = [hostile_json.loads(self._file).get("decoder")]
        found: set[str] = set()
        while todo:
            entry = todo.pop()
            if isinstance(entry, dict):
                found.add(str(entry.get("type")))
                todo += entry.get("decoders") or []
        return frozenset(found)

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

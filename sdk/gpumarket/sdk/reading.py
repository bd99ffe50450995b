"""From output items to what a reader of a text gets: pieces of text with their tokens and logprobs, up to the first stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gpumarket.sdk.logprobs import Logprobs
from gpumarket.sdk.results import Alternative, Piece, TokenLogprob
from gpumarket.sdk.stopping import StopMatcher
from gpumarket.sdk.tokens import TextCodec


class TextReader:
    """One answer. `stopped` says that a stop string came: what is pushed after it gives nothing.

    Text that may still become a stop string comes later than its tokens. Without stop strings a batch is decoded in one go.
    """

    def __init__(self, codec: TextCodec, stop_tokens: frozenset[int], stops: Sequence[str] = (), *, logprobs: bool = False) -> None:
        self._codec, self._stop_tokens, self._logprobs = codec, stop_tokens, logprobs
        self._decoder = codec.decoder()
        self._matcher = StopMatcher(stops) if stops else None

    @property
    def stopped(self) -> bool:
        return self._matcher is not None and self._matcher.stopped

    def push(self, items: Sequence[bytes], logprobs: Sequence[Logprobs] = ()) -> Piece:
        """Tokens as they came, with those of `logprobs` that are theirs; empty after a stop string."""
        tokens = tuple(int.from_bytes(item, "little") for item in items)
        if self._matcher is None:
            return self._piece(self._decoder.push([t for t in tokens if t not in self._stop_tokens]), tokens, logprobs)
        text, taken = "", 0
        for token in tokens:
            if self._matcher.stopped:
                break
            taken += 1
            if token not in self._stop_tokens:
                text += self._matcher.push(self._decoder.push([token]))
        return self._piece(text, tokens[:taken], logprobs[:taken])

    def finish(self) -> Piece:
        """What is left of the text when the answer has ended."""
        rest = "" if self.stopped else self._decoder.finish()
        if self._matcher is not None:
            rest = self._matcher.push(rest) + self._matcher.finish()
        return self._piece(rest, (), ())

    def _piece(self, text: str, tokens: tuple[int, ...], logprobs: Sequence[Logprobs]) -> Piece:
        whole = self._logprobs and len(logprobs) == len(tokens)
        return Piece(text, tokens, readable(self._codec, logprobs) if whole else None)


def readable(codec: TextCodec, logprobs: Iterable[Logprobs]) -> tuple[TokenLogprob, ...]:
    """With the text of every token."""
    return tuple(
        TokenLogprob(
            *codec.spelled(told.token), told.logprob, tuple(Alternative(*codec.spelled(token), value) for token, value in told.top)
        )
        for told in logprobs
    )

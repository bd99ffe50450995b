"""A chat that is read while it is written."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from gpumarket.core.errors import JobFailed, ResultRejected
from gpumarket.sdk.buying import Bought, Purchase
from gpumarket.sdk.results import ChatResult
from gpumarket.sdk.tokens import TextCodec

Start = Callable[[], Awaitable[tuple[Purchase, TextCodec, frozenset[int]]]]
"""Makes the purchase when the stream is first read: its tokenizer and stop tokens come with the model."""


class ChatStream:
    """Pieces of text: `async for piece in stream`. After the end, `stream.result` is the whole.

    Leaving the loop early (or `aclose`) stops the provider; what came is paid. When the answer is drawn for a check and found wrong, the
    iteration ends with ResultRejected: the text that came is void, and `result` holds the answer of another provider where one could
    be had.
    """

    def __init__(self, start: Start, build: Callable[[Bought], ChatResult]) -> None:
        self._start, self._build = start, build
        self._result: ChatResult | None = None
        self._pieces = self._run()

    def __aiter__(self) -> AsyncIterator[str]:
        return self._pieces

    async def __aenter__(self) -> ChatStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def result(self) -> ChatResult:
        """The whole answer with receipt, verdict and cost. Raises JobFailed before the stream has ended."""
        if self._result is None:
            raise JobFailed("the stream has not ended: there is no result yet", hint="read it to its end first")
        return self._result

    async def aclose(self) -> None:
        """Stop the provider, unless the answer is whole."""
        await self._pieces.aclose()

    async def _run(self) -> AsyncGenerator[str, None]:
        purchase, codec, stop_tokens = await self._start()
        decoder = codec.decoder()
        async with aclosing(purchase.items()) as output:
            async for items in output:
                ids = [int.from_bytes(item, "little") for item in items]
                piece = decoder.push([i for i in ids if i not in stop_tokens])
                if piece:
                    yield piece
        if rest := decoder.finish():
            yield rest
        assert purchase.outcome is not None
        self._result = self._build(purchase.outcome)
        if purchase.rejected:
            told = purchase.rejected[-1]
            raise ResultRejected(
                f"the text streamed by 0x{told.provider.hex()} was rejected and is not paid: {told.reason}",
                hint="the stream's `result` holds the answer of another provider",
            )

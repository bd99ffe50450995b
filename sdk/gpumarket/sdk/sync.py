"""The same client for code without asyncio: `with Client.from_env() as market`. One event loop in a thread of its own.

vectors = market.embed("all-MiniLM-L6-v2", ["a red fox"])
for piece in market.chat("tiny-llama", "Say hello", stream=True): ...
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from gpumarket.core.errors import ConfigError
from gpumarket.core.tensors import Signature
from gpumarket.core.units import Hash, Money
from gpumarket.sdk import client as async_client
from gpumarket.sdk.lock import LockedModel
from gpumarket.sdk.results import (
    AccountView,
    ChatResult,
    EmbedResult,
    InferResult,
    JobResult,
    JobSummary,
    OfferView,
    Piece,
    Quote,
    StreamEnd,
)
from gpumarket.sdk.streaming import ChatStream
from gpumarket.v1 import market_pb2 as mpb

T = TypeVar("T")


class SyncStream:
    """Pieces of text: `for piece in stream`. After the end, `stream.result` is the whole (see ChatStream)."""

    def __init__(self, client: Client, stream: ChatStream) -> None:
        self._client, self._stream = client, stream

    def __iter__(self) -> Iterator[str]:
        return self._each(aiter(self._stream))

    def pieces(self) -> Iterator[Piece]:
        """As ChatStream.pieces."""
        return self._each(self._stream.pieces())

    @property
    def result(self) -> ChatResult:
        return self._stream.result

    @property
    def end(self) -> StreamEnd | None:
        """As ChatStream.end."""
        return self._stream.end

    def close(self) -> None:
        """Stop the provider, unless the answer is whole."""
        self._client.wait(self._stream.aclose())

    def _each(self, items: AsyncIterator[T]) -> Iterator[T]:
        try:
            while (item := self._client.wait(_next(items))) is not None:
                yield item
        finally:
            self.close()


class Client:
    """Blocking form of `gpumarket.sdk.Client`; arguments and errors are the same."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._client = async_client.Client(*args, **kwargs)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def from_env(cls, **options: Any) -> Self:
        """As the asyncio client's `from_env`."""
        made = cls()
        made._client = async_client.Client.from_env(**options)
        return made

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gpumarket", daemon=True)
        self._thread.start()
        try:
            self.wait(self._client.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait(self._client.__aexit__(None, None, None))
        finally:
            self._end()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the client's loop to its end; an interrupt cancels it."""
        if self._loop is None:
            work.close()
            raise ConfigError("this client is not open", hint="use it as: with Client.from_env() as market")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _end(self) -> None:
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    # --- the client's calls ------------------------------------------------------------------------------------------------

    def embed(self, *args: Any, **options: Any) -> EmbedResult:
        return self.wait(self._client.embed(*args, **options))

    def infer(self, *args: Any, **options: Any) -> InferResult:
        return self.wait(self._client.infer(*args, **options))

    def signature(self, model: str) -> Signature:
        return self.wait(self._client.signature(model))

    def chat(self, *args: Any, stream: bool = False, **options: Any) -> Any:
        """A ChatResult, or with `stream` a SyncStream."""
        return self._text(self._client.chat, stream, args, options)

    def complete(self, *args: Any, stream: bool = False, **options: Any) -> Any:
        """A ChatResult, or with `stream` a SyncStream."""
        return self._text(self._client.complete, stream, args, options)

    def quote(self, *args: Any, **options: Any) -> Quote:
        return self.wait(self._client.quote(*args, **options))

    def explain(self, *args: Any, **options: Any) -> mpb.Explanation:
        return self.wait(self._client.explain(*args, **options))

    def jobs(self, **options: Any) -> list[JobSummary]:
        return self._client.jobs(**options)

    def save_receipt(self, job: Hash | str, path: Path, *, content: bool = False) -> None:
        self._client.save_receipt(job, path, content=content)

    def resume(self, job: Hash | str) -> JobResult:
        return self.wait(self._client.resume(job))

    def resume_all(self) -> list[JobResult | Exception]:
        return self.wait(self._client.resume_all())

    def offers(self, model: str | Hash | None = None) -> list[OfferView]:
        return self.wait(self._client.offers(model))

    def models(self) -> list[LockedModel]:
        return self._client.models()

    def add_model(self, name: str, digest: Hash | str) -> LockedModel:
        return self.wait(self._client.add_model(name, digest))

    def account(self) -> AccountView:
        return self.wait(self._client.account())

    def deposit(self, amount: str | Money) -> AccountView:
        return self.wait(self._client.deposit(amount))

    def close_channel(self) -> Money:
        return self.wait(self._client.close_channel())

    def _text(self, call: Any, stream: bool, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if not stream:
            return self.wait(call(*args, **options))

        async def begin() -> ChatStream:
            made: ChatStream = call(*args, stream=True, **options)
            return made

        return SyncStream(self, self.wait(begin()))


async def _next(items: AsyncIterator[T]) -> T | None:
    return await anext(items, None)

"""A text as it is asked for: ordered on its first read, cut at its stop strings, found again under its job id; streamed or whole."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from gpumarket.core.units import Hash
from gpumarket.sdk import outcomes, resuming
from gpumarket.sdk.buying import Bought, Purchase
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.model_files import LoadedModel
from gpumarket.sdk.ordering import Ask
from gpumarket.sdk.reading import TextReader
from gpumarket.sdk.results import ChatResult, StreamEnd
from gpumarket.sdk.streaming import Begun, ChatStream, read_to_end
from gpumarket.sdk.tokens import TextCodec


@dataclass(slots=True)
class TextOrder:
    """One text of one model. Nothing happens before `stream()` is read or `whole()` awaited."""

    desk: Desk
    load: Callable[[], Awaitable[LoadedModel]]
    ask: Callable[[LoadedModel], Ask]
    stops: tuple[str, ...]
    job_id: Hash | None
    logprobs: bool
    _codec: list[TextCodec] = field(default_factory=list)

    def stream(self) -> ChatStream:
        return ChatStream(self._begin, self._build, self._end_of)

    async def whole(self) -> ChatResult:
        """The answer, of another provider where the first one was rejected."""
        async with self._begin() as begun:
            if begun.purchase is None:
                assert begun.bought is not None
                return self._build(begun.bought)
            if not self.stops:
                return self._build(await begun.purchase.finish())
            return self._build(await read_to_end(begun.purchase, begun.reader))

    @asynccontextmanager
    async def _begin(self) -> AsyncIterator[Begun]:
        async with self.desk.job_ids.one_at_a_time(self.job_id):
            loaded = await self.load()
            self._codec.append(loaded.codec)
            reader = TextReader(loaded.codec, frozenset(loaded.files.stop_tokens), self.stops, logprobs=self.logprobs)
            ask = self.ask(loaded)
            before = await resuming.ordered_before(self.desk, ask)
            yield Begun(Purchase(self.desk, ask) if before is None else None, reader, before)

    def _build(self, bought: Bought) -> ChatResult:
        result = outcomes.build(self.desk, bought, self._codec[0])
        assert isinstance(result, ChatResult)
        return result

    def _end_of(self, purchase: Purchase) -> StreamEnd:
        assert purchase.run is not None
        return outcomes.end_of(self.desk, purchase.run.job.job)

"""The reader's queue: bounded, newest kept, ended by close."""

from __future__ import annotations

import asyncio

import pytest

from gpumarket.p2p.stream import NewestSequence, OfferStream


async def test_stream_slow_reader_loses_the_oldest_and_it_is_counted() -> None:
    stream = OfferStream(2, lambda _: None)
    for offer in (b"1", b"2", b"3"):
        stream.put(offer)
    stream.end()
    assert [offer async for offer in stream] == [b"2", b"3"]
    assert stream.dropped == 1


async def test_stream_waiting_reader_is_woken_by_an_offer_and_by_the_end() -> None:
    ended: list[OfferStream] = []
    stream = OfferStream(2, ended.append)
    reader = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    stream.put(b"1")
    assert await reader == b"1"
    last = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    stream.end()
    with pytest.raises(StopAsyncIteration):
        await last
    assert ended == [stream]


def test_newest_sequence_only_rises() -> None:
    newest = NewestSequence(10)
    assert [newest.rises(b"a", sequence) for sequence in (0, 0, 2, 1, 3)] == [True, False, True, False, True]
    assert newest.rises(b"b", 1)


def test_newest_sequence_forgets_the_oldest_provider_when_full() -> None:
    newest = NewestSequence(2)
    for provider in (b"a", b"b", b"c"):
        newest.rises(provider, 5)
    assert newest.rises(b"a", 1)
    assert not newest.rises(b"c", 5)

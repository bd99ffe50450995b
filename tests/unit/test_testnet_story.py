"""What the demo's client tells while it works, against a scripted market."""

from __future__ import annotations

import asyncio
from pathlib import Path

import sdk_models
from sdk_market import CLIENT, FakeProvider, fake_market

from gpumarket.sdk import Client, ClientSettings
from gpumarket.testnet import story
from gpumarket.testnet.plan import TINY_LLAMA


async def test_text_of_the_demo_is_told_while_it_streams_and_whole_at_the_end(tmp_path: Path) -> None:
    held, begun, said = asyncio.Event(), asyncio.Event(), list[str]()
    provider = FakeProvider("a", hold=held, hold_after_items=30)

    def say(line: str) -> None:
        said.append(line.removeprefix("a text, as it comes: "))
        begun.set()

    settings = ClientSettings(state=tmp_path / "client", lock_file=tmp_path / "models.lock", check_probability=0.0)
    async with fake_market(tmp_path, provider) as market, Client(settings, key=CLIENT, chain=market.chain) as client:
        await client.add_model(TINY_LLAMA, sdk_models.CHAT.digest)
        told = story.Story()
        writing = asyncio.create_task(story._write(client, told, say))
        await asyncio.wait_for(begun.wait(), 20)
        assert not writing.done(), "told while its provider still holds the rest back"
        assert told.text.startswith(said[0]) and len(said[0]) >= story.LINE_CHARACTERS
        held.set()
        await writing
    *pieces, summary = said
    assert "".join(pieces) == told.text
    assert summary.startswith("a text: 0x")

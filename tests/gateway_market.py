"""A gateway in this process, over HTTP, on the scripted market of `sdk_market`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import sdk_models
from sdk_market import CLIENT, FakeMarket, FakeProvider, fake_market

from gpumarket.core.ports import SystemRandom
from gpumarket.core.units import parse_money
from gpumarket.gateway.app import App, serving
from gpumarket.gateway.call import Room
from gpumarket.gateway.daemon import opened
from gpumarket.gateway.keys import KeyFile, Limits
from gpumarket.gateway.settings import GatewaySettings
from gpumarket.sdk import Client, ClientSettings

CLIENT_SETTINGS: dict[str, Any] = {
    "check_probability": 0.0,
    "patience_seconds": 3.0,
    "failover_seconds": 0.5,
    "stall_seconds": 20.0,
    "busy_seconds": 0.5,
}


@dataclass
class Gateway:
    """What a test holds: the market behind, the room inside, the URL, and a key without limits."""

    market: FakeMarket
    room: Room
    keys: KeyFile
    url: str
    key: str
    state: Path

    def openai(self, key: str | None = None, **options: Any) -> openai.AsyncOpenAI:
        """The official client, which tries nothing twice unless told so."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, **({"max_retries": 0} | options))

    def another_key(self, name: str, *, day: str | None = None, total: str | None = None, **limits: Any) -> str:
        """A key with limits."""
        daily, forever = (None if text is None else parse_money(text) for text in (day, total))
        return self.keys.create(name, Limits(daily, forever, **limits))[1]


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what must come; 20 s at most."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


@asynccontextmanager
async def gateway(
    folder: Path, *providers: FakeProvider, window: int = 8, client: dict[str, Any] | None = None, **changes: Any
) -> AsyncIterator[Gateway]:
    """A gateway on a market of these providers (one honest by default); `client` and `changes` are settings."""
    sellers = providers or (FakeProvider("a"),)
    async with fake_market(folder, *sellers, window=window) as market, on_market(market, folder, client, **changes) as found:
        yield found


@asynccontextmanager
async def on_market(market: FakeMarket, folder: Path, client: dict[str, Any] | None = None, **changes: Any) -> AsyncIterator[Gateway]:
    """The same on a market that is there: a gateway that is started again."""
    places = {"state": folder / "client", "lock_file": folder / "models.lock"}
    buyer = Client(ClientSettings(**(CLIENT_SETTINGS | places | (client or {}))), key=CLIENT, chain=market.chain)
    own: dict[str, Any] = {"state": folder / "gateway", "listen": "127.0.0.1:0"}
    settings = GatewaySettings(**(own | changes))
    async with opened(settings, buyer) as (room, door, _):
        if not buyer.models():
            await buyer.add_model("mini", sdk_models.EMBED.digest)
            await buyer.add_model("chat", sdk_models.CHAT.digest)
        keys = KeyFile(settings.state)
        names = {key.name for key in keys.all()}
        _, secret = keys.create("owner" if "owner" not in names else f"owner-{len(names)}", Limits())
        try:
            async with serving(App(room, door, SystemRandom()), settings.listen) as url:
                yield Gateway(market, room, keys, url, secret, settings.state)
        finally:
            keys.close()

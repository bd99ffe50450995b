"""Signed offers and real links on loopback, for the p2p tests."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gpumarket.core import codec
from gpumarket.core.signing import LocalKey, market_domain
from gpumarket.core.units import Address
from gpumarket.p2p.link import Link, P2PSettings
from gpumarket.v1 import terms_pb2

CHAIN_ID = 31337
REGISTRY = Address(b"\x11" * 20)
DOMAIN = market_domain(CHAIN_ID, REGISTRY)
PATIENCE_SECONDS = 90.0
"""A test waits this long for what must come; it never asserts that something took less."""


def wallet(number: int) -> LocalKey:
    return LocalKey(number.to_bytes(32, "big"))


def make_offer(
    key: LocalKey, sequence: int, *, expires_at: int | None = None, endpoint: str = "127.0.0.1:1", chain_id: int = CHAIN_ID
) -> bytes:
    """A serialized SignedOffer; by default it expires in an hour."""
    body = terms_pb2.OfferBody(
        provider=key.address,
        p2p_id="peer",
        endpoint=endpoint,
        tls_key_hash=b"t" * 32,
        sequence=sequence,
        expires_at=int(time.time()) + 3600 if expires_at is None else expires_at,
    )
    return codec.signed_offer(key, market_domain(chain_id, REGISTRY), body).SerializeToString(deterministic=True)


def settings(folder: Path, name: str, **changes: Any) -> P2PSettings:
    defaults: dict[str, Any] = {
        "chain_id": CHAIN_ID,
        "registry": REGISTRY,
        "start_seconds_max": PATIENCE_SECONDS,
        "announce_seconds": 3.0,
        "resync_seconds": 3.0,
    }
    return P2PSettings(folder / f"{name}.key", **{**defaults, **changes})


@asynccontextmanager
async def running_link(folder: Path, name: str, **changes: Any) -> AsyncIterator[Link]:
    link = Link(settings(folder, name, **changes))
    try:
        await link.start()
        yield link
    finally:
        await link.close()


async def until(condition: Callable[[], bool] | Callable[[], Awaitable[bool]]) -> None:
    """Waits until it holds; the test fails after `PATIENCE_SECONDS`."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(0.05)


async def hears(stream: AsyncIterator[bytes], offer: bytes) -> None:
    """Waits until this very offer comes; others may come before it."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await anext(stream) != offer:
            pass


async def knows(link: Link, *offers: bytes) -> None:
    """Waits until the link's snapshot holds all of these."""

    async def holds() -> bool:
        return set(offers) <= set(await link.snapshot())

    await until(holds)


def is_gone(pid: int) -> bool:
    """Whether no such process runs; a zombie counts as gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"

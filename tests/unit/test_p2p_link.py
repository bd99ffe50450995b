"""Real p2p processes on loopback: offers reach everyone, and what must be refused is refused with a typed error."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from p2p_net import PATIENCE_SECONDS, hears, is_gone, knows, make_offer, running_link, settings, wallet

from gpumarket.core.errors import ConfigError, KeyFileExposed, MissingExtra, P2PUnavailable, PortInUse, ProtocolError, Unreachable
from gpumarket.p2p.link import Link

NOBODY = "12D3KooWE1FJ6PePh2vcaLRPPFdpmwSp53yWZ71qBqtnidV98NVv"


async def test_link_two_processes_exchange_offers_and_a_late_joiner_learns_all(tmp_path: Path) -> None:
    async with running_link(tmp_path, "a") as a, AsyncExitStack() as later:
        b = await later.enter_async_context(running_link(tmp_path, "b", bootstrap=tuple(a.addresses)))
        at_a, at_b = a.offers(), b.offers()
        first, second = make_offer(wallet(1), 1), make_offer(wallet(2), 1)
        await a.announce(first)
        await b.announce(second)
        await asyncio.gather(hears(at_a, second), hears(at_b, first))
        assert await b.peers() == [a.peer_id]
        newer = make_offer(wallet(1), 2)
        await a.announce(newer)
        await hears(at_b, newer)
        c = await later.enter_async_context(running_link(tmp_path, "c", bootstrap=tuple(b.addresses)))
        await knows(c, newer, second)
        assert first not in await c.snapshot()


async def test_link_five_processes_all_hear_all(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        hub = await stack.enter_async_context(running_link(tmp_path, "hub"))
        starts = [running_link(tmp_path, f"n{number}", bootstrap=tuple(hub.addresses)) for number in range(4)]
        links = [hub, *await asyncio.gather(*(stack.enter_async_context(start) for start in starts))]
        offers = [make_offer(wallet(number + 1), 1) for number in range(len(links))]
        await asyncio.gather(*(link.announce(offer) for link, offer in zip(links, offers, strict=True)))
        await asyncio.gather(*(knows(link, *offers) for link in links))


async def test_link_own_offer_that_is_invalid_stale_or_too_big_is_refused_and_the_last_one_stays(tmp_path: Path) -> None:
    async with running_link(tmp_path, "a") as a:
        good = make_offer(wallet(1), 5)
        await a.announce(good)
        for bad in (b"junk", make_offer(wallet(1), 4), make_offer(wallet(1), 6, chain_id=1), make_offer(wallet(1), 6, expires_at=1)):
            with pytest.raises(ProtocolError):
                await a.announce(bad)
        with pytest.raises(ProtocolError, match="limit is 65536"):
            await a.announce(make_offer(wallet(1), 6, endpoint="x" * 70_000))
        assert await a.snapshot() == [good]


async def test_link_dialling_nobody_or_nonsense_is_a_typed_error(tmp_path: Path) -> None:
    async with running_link(tmp_path, "a") as a:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        with pytest.raises(Unreachable, match=NOBODY):
            await a.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{NOBODY}")
        for nonsense in ("nonsense", f"/ip4/127.0.0.1/tcp/{port}"):
            with pytest.raises(ConfigError, match="not a peer's address"):
                await a.connect(nonsense)
        assert (await a.status())["up"] == 1


async def test_link_without_libp2p_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as caught:
        await Link(settings(tmp_path, "a")).start()
    assert "gpumarket[p2p]" in caught.value.hint


def test_link_import_brings_neither_libp2p_nor_trio() -> None:
    code = "import sys, gpumarket.p2p.link; sys.exit(bool({'libp2p', 'trio', 'multiaddr'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE_SECONDS, check=False).returncode == 0


async def test_link_exposed_identity_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "a.key").write_text("01" * 32)
    (tmp_path / "a.key").chmod(0o644)
    with pytest.raises(KeyFileExposed, match="0644"):
        await Link(settings(tmp_path, "a")).start()


async def test_link_port_in_use_is_refused_at_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=str(port)):
            await Link(settings(tmp_path, "a", listen=f"/ip4/127.0.0.1/tcp/{port}")).start()


async def test_link_address_that_is_none_is_refused_at_start(tmp_path: Path) -> None:
    wrong: list[dict[str, object]] = [
        {"listen": "127.0.0.1:4001"},
        {"listen": "/ip4/127.0.0.1/udp/4001"},
        {"listen": "/ip4/203.0.113.7/tcp/4001"},  # not ours
        {"bootstrap": ("nonsense",)},
    ]
    links = [Link(settings(tmp_path, f"n{number}", **changes)) for number, changes in enumerate(wrong)]
    outcomes = await asyncio.gather(*(link.start() for link in links), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ConfigError] * len(wrong)


async def test_link_process_that_cannot_run_is_refused_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(P2PUnavailable):
        await Link(settings(tmp_path, "a")).start()


async def test_link_close_ends_its_readers_and_its_process(tmp_path: Path) -> None:
    async with running_link(tmp_path, "a") as a:
        pid, stream = a.pid, a.offers()
        assert pid is not None
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert is_gone(pid)
    with pytest.raises(P2PUnavailable):
        await a.snapshot()

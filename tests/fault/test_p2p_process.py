"""The p2p process dies, hangs or loses its daemon: it comes back as itself, or goes; and it never knew a secret."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from p2p_net import PATIENCE_SECONDS, hears, is_gone, knows, make_offer, running_link, settings, until, wallet

from gpumarket.core.errors import P2PUnavailable
from gpumarket.p2p import link as link_module
from gpumarket.p2p.link import Link


async def test_link_killed_process_comes_back_with_its_identity_port_offer_and_peers(tmp_path: Path) -> None:
    restarted: list[bool] = []

    def note() -> None:
        restarted.append(True)
        raise ValueError("the daemon's callback failed")

    async with running_link(tmp_path, "hub") as hub:
        link = Link(settings(tmp_path, "a", bootstrap=tuple(hub.addresses)), on_restart=note)
        await link.start()
        try:
            mine, news = make_offer(wallet(1), 1), link.offers()
            await link.announce(mine)
            before = (link.peer_id, list(link.addresses), link.pid)
            assert link.pid is not None
            os.kill(link.pid, signal.SIGKILL)
            await until(lambda: link.restarts == 1)
            assert (link.peer_id, link.addresses) == before[:2] and link.pid != before[2]
            assert restarted == [True]
            assert "-9" in link.last_error
            assert mine in await link.snapshot()
            fresh = make_offer(wallet(2), 1)
            await hub.announce(fresh)
            await hears(news, fresh)
            newer = make_offer(wallet(1), 2)
            await link.announce(newer)
            await knows(hub, newer, fresh)
        finally:
            await link.close()


async def test_link_call_while_the_process_is_dead_is_refused_as_retryable(tmp_path: Path) -> None:
    async with running_link(tmp_path, "a") as a:
        assert a.pid is not None
        os.kill(a.pid, signal.SIGSTOP)
        waiting = [asyncio.create_task(call) for call in (a.snapshot(), a.peers(), a.announce(make_offer(wallet(1), 1)))]
        await asyncio.sleep(0)
        os.kill(a.pid, signal.SIGKILL)
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, P2PUnavailable) and error.retryable
        await until(lambda: a.restarts == 1)
        assert [offer for offer in await a.snapshot() if offer], "the offer announced while it was dead was forgotten"


async def test_link_process_that_hangs_is_killed_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "_WATCH_SECONDS", 0.2)
    async with running_link(tmp_path, "a") as a:
        assert a.pid is not None
        monkeypatch.setattr(link_module, "_HANG_SECONDS", 1.0)
        os.kill(a.pid, signal.SIGSTOP)
        await until(lambda: a.restarts >= 1)
        monkeypatch.setattr(link_module, "_HANG_SECONDS", PATIENCE_SECONDS)
        await until(lambda: a.pid is not None)
        assert await a.snapshot() == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_link_process_knows_no_secret_of_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUMARKET_WALLET_PASSWORD", "hunter2-secret")
    async with running_link(tmp_path, "a") as a:
        process = Path(f"/proc/{a.pid}")
        environment, arguments = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
        assert b"hunter2-secret" not in environment and b"GPUMARKET" not in environment
        assert arguments.split(b"\0")[1:5] == [b"-P", b"-m", b"gpumarket.p2p.host", b"--fd"]
        own = {os.readlink(entry) for entry in (process / "fd").iterdir()}
        assert str(tmp_path / "a.key") not in own


async def test_link_process_dies_with_its_daemon(tmp_path: Path) -> None:
    script = (
        "import asyncio, pathlib, sys\n"
        "from p2p_net import running_link\n"
        "async def main():\n"
        "    async with running_link(pathlib.Path(sys.argv[1]), 'a') as link:\n"
        "        print(link.pid, flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": tests}
    daemon = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, str(tmp_path)), stdout=asyncio.subprocess.PIPE, env=environment
    )
    try:
        assert daemon.stdout is not None
        async with asyncio.timeout(PATIENCE_SECONDS):
            pid = int(await daemon.stdout.readline())
    finally:
        daemon.kill()
        await daemon.wait()
    await until(lambda: is_gone(pid))

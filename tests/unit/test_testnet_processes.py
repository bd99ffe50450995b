"""Roles as processes: readiness, failure with its reason, and nothing left running."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from gpumarket.testnet.processes import Mark, Processes, RoleFailed, clean_environment, end, mark_of

READY = """
import json, os, signal, subprocess, sys, time
{before}
open(sys.argv[1], "w").write(json.dumps({{"pid": os.getpid(), "child": {child}}}))
time.sleep(600)
"""
GRANDCHILD = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid"


def role(file: Path, *, before: str = "", child: str = "0") -> list[str]:
    return [sys.executable, "-c", READY.format(before=before, child=child), str(file)]


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[Processes]:
    made = Processes(tmp_path / "logs")
    yield made
    await made.stop(seconds=0.1)


async def test_role_ready_file_of_its_own_pid_is_returned(processes: Processes, tmp_path: Path) -> None:
    file = tmp_path / "ready.json"
    file.write_text('{"pid": 1, "old": true}')
    spawned = processes.spawn("a", role(file))
    assert (await processes.ready("a", file, seconds=30))["pid"] == spawned.process.pid


async def test_role_that_ends_is_reported_with_its_last_words(processes: Processes, tmp_path: Path) -> None:
    processes.spawn("a", [sys.executable, "-c", "import sys; print('no such key'); sys.exit(4)"])
    with pytest.raises(RoleFailed, match=r"exit code 4.*(?s:.)*no such key") as caught:
        await processes.ready("a", tmp_path / "ready.json", seconds=30)
    assert "a.log" in caught.value.hint


async def test_role_that_is_late_is_reported(processes: Processes, tmp_path: Path) -> None:
    processes.spawn("a", [sys.executable, "-c", "import time; time.sleep(600)"])
    with pytest.raises(RoleFailed, match="not ready within"):
        await processes.ready("a", tmp_path / "ready.json", seconds=0.2)


async def test_stop_ends_roles_that_ignore_sigterm_and_their_children(processes: Processes, tmp_path: Path) -> None:
    file = tmp_path / "ready.json"
    spawned = processes.spawn("a", role(file, before="signal.signal(signal.SIGTERM, signal.SIG_IGN)", child=GRANDCHILD))
    child = (await processes.ready("a", file, seconds=30))["child"]
    await processes.stop(seconds=0.2)
    assert gone(spawned.process.pid)
    assert until(lambda: gone(child))


def test_roles_die_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    supervisor = f"""
import asyncio, pathlib, sys, time
from gpumarket.testnet.processes import Processes
p = Processes(pathlib.Path({str(tmp_path / "logs")!r}))
print(p.spawn("a", [sys.executable, "-c", "import time; time.sleep(600)"]).process.pid, flush=True)
time.sleep(600)
"""
    running = subprocess.Popen([sys.executable, "-c", supervisor], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    child = int(running.stdout.readline())
    assert not gone(child)
    running.kill()
    running.wait()
    running.stdout.close()
    assert until(lambda: gone(child))


def test_mark_of_a_number_given_to_another_process_is_not_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stranger:
        mark = mark_of("a", stranger.pid)
        assert end([Mark("a", stranger.pid, mark.started - 5)]) == []
        assert stranger.poll() is None
        assert end([mark]) == ["a"]
        assert stranger.wait() == -signal.SIGTERM


def test_mark_of_a_process_that_is_gone_is_refused() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as done:
        done.wait()
        with pytest.raises(ProcessLookupError):
            mark_of("a", done.pid)


def test_environment_of_a_role_holds_no_settings_and_no_credentials() -> None:
    shell = {"PATH": "/bin", "GPUMARKET_PROVIDER_STAKE": "1", "SOME_API_KEY": "x", "HOME": "/h"}
    kept = clean_environment(shell)
    assert kept["PATH"] == "/bin" and kept["OMP_NUM_THREADS"] == "1"
    assert not {"GPUMARKET_PROVIDER_STAKE", "SOME_API_KEY"} & set(kept)


async def test_kill_ends_one_role_only(processes: Processes, tmp_path: Path) -> None:
    for name in ("a", "b"):
        processes.spawn(name, role(tmp_path / name))
    await asyncio.gather(*(processes.ready(name, tmp_path / name, seconds=30) for name in ("a", "b")))
    pid, other = processes.roles["a"].process.pid, processes.roles["b"].process
    processes.kill("a")
    assert gone(pid) and other.poll() is None
    assert os.getpgid(other.pid) == other.pid


def test_roles_inherit_where_traces_go_and_no_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=secret")
    kept = clean_environment(os.environ)
    assert kept["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://127.0.0.1:1"
    assert "OTEL_EXPORTER_OTLP_HEADERS" not in kept

"""Roles as processes: each in its own process group, dying with its parent, logging to a file, ready when its file says so.

Invariant: nothing started here outlives the supervisor. `stop` ends every group (SIGTERM, then SIGKILL); when the supervisor itself is
killed with -9, the kernel kills the roles (PR_SET_PDEATHSIG, set by a launcher so that no code runs between fork and exec), and theirs end
with them. Processes are told from others by pid and start
time, so a number that was given to a stranger is never signalled.

Start processes from the main thread only: the kernel's death signal follows the thread that forked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpumarket.core.errors import GpumarketError

POLL_SECONDS = 0.05
STOP_SECONDS = 25.0
"""Longest wait for a drain; a provider's own limit is 20 s."""
_LAST_LINES = 12
_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)  # the parent died before the signal was set
os.execv(sys.argv[2], sys.argv[2:])
"""
_TRACE_VARIABLES = ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_BSP_SCHEDULE_DELAY")
"""Where a role's traces go; not OTEL_EXPORTER_OTLP_HEADERS, which may hold a credential."""
_KEPT_VARIABLES = frozenset(
    [
        *_TRACE_VARIABLES,
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "TMPDIR",
        "TZ",
        "LD_LIBRARY_PATH",
        "CUDA_VISIBLE_DEVICES",
        "XDG_CACHE_HOME",
        "VIRTUAL_ENV",
    ]
)


class RoleFailed(GpumarketError):
    """A role ended, or was not ready in time."""

    code = "role_failed"


@dataclass(frozen=True, slots=True)
class Mark:
    """A process as it is written down: number and start time in the kernel's clock."""

    name: str
    pid: int
    started: float

    def alive(self) -> bool:
        """Whether this very process still runs."""
        return _start_time(self.pid) == self.started


@dataclass(slots=True)
class Role:
    """A running role."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    started: float

    @property
    def mark(self) -> Mark:
        return Mark(self.name, self.process.pid, self.started)


class Processes:
    """The roles of one testnet."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.roles: dict[str, Role] = {}
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)

    def spawn(self, name: str, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Role:
        """Start `argv` as role `name`; its output is appended to `logs/<name>.log`."""
        log = self.logs / f"{name}.log"
        with log.open("ab") as sink:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *argv],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env={**clean_environment(), **(env or {})},
                start_new_session=True,
            )
        role = self.roles[name] = Role(name, process, log, _start_time(process.pid) or 0.0)
        return role

    async def ready(self, name: str, file: Path, *, seconds: float) -> dict[str, Any]:
        """The content of the role's ready file, once it was written by this very process. Raises RoleFailed with its last log lines."""
        role = self.roles[name]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (code := role.process.poll()) is not None:
                raise self._failure(role, f"{name} ended with exit code {code} before it was ready")
            document = _read_ready(file)
            if document.get("pid") == role.process.pid:
                return document
            await asyncio.sleep(POLL_SECONDS)
        raise self._failure(role, f"{name} was not ready within {seconds:.0f} s")

    def signal(self, name: str, number: int) -> None:
        """Send a signal to one role, not to its children."""
        self.roles[name].process.send_signal(number)

    def kill(self, name: str) -> None:
        """End one role and its children at once, as a crash would."""
        role = self.roles.pop(name)
        _kill_group(role.process.pid, signal.SIGKILL)
        role.process.wait()

    async def stop(self, *, seconds: float = STOP_SECONDS) -> None:
        """End every role: SIGTERM together, wait, SIGKILL for whoever is left, children included."""
        running = list(self.roles.values())
        for role in running:
            if role.process.poll() is None:
                role.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*(asyncio.to_thread(_wait, role.process, seconds) for role in running))
        for role in running:
            _kill_group(role.process.pid, signal.SIGKILL)
            role.process.wait()
        self.roles.clear()

    def _failure(self, role: Role, what: str) -> RoleFailed:
        tail = last_lines(role.log)
        return RoleFailed(f"{what}; its last lines:\n" + "\n".join(f"  | {line}" for line in tail), hint=f"the whole log is {role.log}")


def _read_ready(file: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    return document


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):  # who is late is killed next
        process.wait(seconds)


def clean_environment(source: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a role inherits: no GPUMARKET_* (they would override its file), no credentials of the shell."""
    kept = {name: source[name] for name in _KEPT_VARIABLES if name in source}
    return kept | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONUNBUFFERED": "1"}


def end(marks: Sequence[Mark], *, seconds: float = STOP_SECONDS) -> list[str]:
    """End processes that another run wrote down; those that are gone or replaced are left alone. Returns the names that were ended."""
    ours = [mark for mark in marks if mark.alive()]
    for mark in ours:
        os.kill(mark.pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while any(mark.alive() for mark in ours) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for mark in ours:
        if mark.alive():
            _kill_group(mark.pid, signal.SIGKILL)
    return [mark.name for mark in ours]


def mark_of(name: str, pid: int) -> Mark:
    """Write down a running process. Raises ProcessLookupError."""
    started = _start_time(pid)
    if started is None:
        raise ProcessLookupError(pid)
    return Mark(name, pid, started)


def last_lines(log: Path, count: int = _LAST_LINES) -> list[str]:
    """The end of a log file."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        return file.read().decode(errors="replace").splitlines()[-count:]


def _start_time(pid: int) -> float | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return None


def _kill_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is gone; macOS says so with EPERM
        os.killpg(pid, number)

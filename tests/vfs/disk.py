"""A victim process with `shim.c` between it and the disk, and the power failures that its trace allows.

The model of a disk that loses power: what was synced is there; of every write, truncation and directory entry since, any may be missing,
and a write may be torn at a 512-byte sector. Directory entries survive in order (file systems journal them), and only a sync of the
folder makes them sure.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
SECTOR = 512
_HEAD = struct.Struct("<cHQQ")


def build_shim(folder: Path) -> Path:
    """Compile shim.c; skips the test where that cannot be done."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs a C compiler and LD_PRELOAD (Linux)")
    shim = folder / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(shim), str(TESTS / "vfs" / "shim.c"), "-ldl", "-lpthread"], check=True)
    return shim


@dataclass
class Ran:
    """What a child did."""

    said: list[dict[str, Any]]
    changes: int
    killed: bool
    failed: str


class Victim:
    """One role's fork server (journal_kill.victim)."""

    def __init__(self, process: subprocess.Popen[str], role: str, folder: Path) -> None:
        self._process, self.role, self._folder, self._runs = process, role, folder, 0

    def run(self, mode: str = "-", n: int = 0, *, folder: Path | None = None, **more: Any) -> tuple[Path, Ran]:
        """Let a child work in a fresh folder (or in `folder`), with a fault at its n-th change."""
        if folder is None:
            self._runs += 1
            folder = self._folder / f"{self.role}-{self._runs}"
            folder.mkdir(mode=0o700)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"folder": str(folder), "mode": mode, "n": n} | more) + "\n")
        self._process.stdin.flush()
        return folder, Ran(**json.loads(self._process.stdout.readline()))


@contextmanager
def victim(role: str, folder: Path) -> Iterator[Victim]:
    """Start the fork server of a role; it dies with the block."""
    shim = build_shim(folder)
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))  # the same product as this process tests
    env = {"LD_PRELOAD": str(shim), "PYTHONPATH": path, "PATH": os.environ["PATH"], "HOME": str(folder)}
    argv = [sys.executable, "-m", "journal_kill.victim", role]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            yield Victim(process, role, folder)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(30)
            finally:
                process.kill()


# --- power loss ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One line of a trace: see `record` in shim.c."""

    kind: str
    name: str
    at: int
    data: bytes
    size: int


def read_trace(file: Path) -> list[Change]:
    """Every change and mark, in order."""
    data, found, at = file.read_bytes(), [], 0
    while at < len(data):
        kind, name_size, offset, size = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        name = data[at : at + name_size].decode()
        at += name_size
        body = data[at : at + size] if kind in b"WRM" else b""
        at += len(body)
        found.append(Change(kind.decode(), name, offset, body, size))
    return found


@dataclass
class _File:
    durable: bytearray = field(default_factory=bytearray)
    pending: list[Change] = field(default_factory=list)


class Disk:
    """Files as they are and as they might be found after a power failure now."""

    def __init__(self) -> None:
        self._now: dict[str, _File] = {}
        self._sure: dict[str, _File] = {}
        self._entries: list[tuple[str, _File | None]] = []
        self.said: list[dict[str, Any]] = []

    def take(self, change: Change) -> None:
        """One more change."""
        match change.kind:
            case "M":
                self.said.append(json.loads(change.data))
            case "C":
                self._enter(change.name, _File())
            case "W" | "T":
                self._now[change.name].pending.append(change)
            case "S":
                file = self._now[change.name]
                for write in file.pending:
                    _apply(file.durable, write)
                file.pending.clear()
            case "U":
                self._enter(change.name, None)
            case "R":
                self._enter(change.data.decode(), self._now[change.name])
                self._enter(change.name, None)
            case "D":
                for name, entry in self._entries:
                    _set(self._sure, name, entry)
                self._entries.clear()

    def _enter(self, name: str, file: _File | None) -> None:
        _set(self._now, name, file)
        self._entries.append((name, file))

    @property
    def unsure(self) -> int:
        """How many changes a power failure now could undo."""
        return len(self._entries) + sum(len(file.pending) for file in self._now.values())

    def after_power_loss(self, chance: random.Random, source: Path, target: Path) -> None:
        """Write one of the possible states of `source` into the folder `target`."""
        files = dict(self._sure)
        for name, entry in self._entries[: chance.randint(0, len(self._entries))]:
            _set(files, name, entry)
        keep = chance.choice((0.0, 0.5, 0.9, 1.0))
        for name, file in files.items():
            content = bytearray(file.durable)
            for write in file.pending:
                if chance.random() < keep:
                    _apply(content, _torn(write, chance) if chance.random() < 0.2 else write)
            path = target / Path(name).relative_to(source)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(0o600)


def _set(entries: dict[str, _File], name: str, file: _File | None) -> None:
    if file is None:
        entries.pop(name, None)
    else:
        entries[name] = file


def _apply(content: bytearray, write: Change) -> None:
    if write.kind == "T":
        del content[write.at :]
        content.extend(bytes(write.at - len(content)))
        return
    content.extend(bytes(max(0, write.at - len(content))))
    content[write.at : write.at + len(write.data)] = write.data


def _torn(write: Change, chance: random.Random) -> Change:
    sectors = len(write.data) // SECTOR
    if write.kind != "W" or not sectors:
        return write
    return Change("W", write.name, write.at, write.data[: SECTOR * chance.randint(0, sectors)], 0)

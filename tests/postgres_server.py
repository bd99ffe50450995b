"""A PostgreSQL server of the tests' own, from the binaries that a Debian package installs: a fresh cluster in a temporary folder, on a
socket in it and on loopback, every commit synced as in production. It dies with the process that started it.

PostgreSQL refuses to run as root: where the tests do, it runs as `postgres`, or as `nobody` where there is no such user.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from gpumarket.testnet.ports import free_port

PATIENCE_SECONDS = 120.0
ADMIN = "tester"
PASSWORD = "the ledger's password"
_LAUNCHER = """
import ctypes, os, sys
parent, uid, gid = map(int, sys.argv[1:4])
if uid != os.geteuid():
    os.setgroups([]); os.setgid(gid); os.setuid(uid)
ctypes.CDLL(None).prctl(1, 3)  # PR_SET_PDEATHSIG, SIGQUIT: when the tests are killed the server ends at once
if os.getppid() != parent:
    sys.exit(1)  # they died before the signal was set
os.execv(sys.argv[4], sys.argv[4:])
"""


def binaries() -> Path | None:
    """Where the newest installed server's programs are; None where there is none."""
    found = [
        Path(path).parent for name in ("initdb",) if (path := shutil.which(name)) and shutil.which("postgres", path=str(Path(path).parent))
    ]
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    found += [path.parent for path in sorted(versions, key=lambda path: float(path.parts[-3]), reverse=True)]
    return found[0].resolve() if found else None


def _account() -> tuple[int, int]:
    """Whom the server runs as: user and group."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = known.get("postgres") or known["nobody"]
    return entry.pw_uid, entry.pw_gid


class Server:
    """One cluster. `create()` makes a database of its own for a test."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs, self.folder, self.port = programs, folder, free_port()
        self.options: list[str] = []
        """More `-c name=value`, for the next start."""
        self._account, self._count, self._free = _account(), 0, list[str]()
        self._process: subprocess.Popen[bytes] | None = None
        secret = folder / "secret"
        secret.write_text(PASSWORD)
        for path in (folder, secret):
            os.chown(path, *self._account)
        command = ["initdb", "-D", self._data, "-U", ADMIN, "--auth-local=trust", "--auth-host=scram-sha-256", "--no-sync", "-E", "UTF8"]
        self._run([*command, f"--pwfile={secret}", "--no-locale"])

    @property
    def _data(self) -> str:
        return str(self.folder / "data")

    def start(self) -> None:
        """Start, and wait until it takes connections. From the main thread: the server dies with the thread that started it."""
        settings = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": self.folder, "max_connections": 60}
        options = [f"{name}={value}" for name, value in settings.items()] + self.options
        argv = [str(self.programs / "postgres"), "-D", self._data, *(word for option in options for word in ("-c", option))]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._as_account(argv), stdout=log, stderr=log, cwd="/")
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                self.sql("SELECT 1")
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > until:
                    raise AssertionError((self.folder / "log").read_text()[-2_000:]) from None
                time.sleep(0.05)

    def stop(self, how: str = "fast") -> None:
        """As `pg_ctl stop -m`: fast ends sessions and checkpoints, immediate ends everything where it stands, as a crash does."""
        if self._process is not None:
            self._process.send_signal({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[how])
            self._process.wait(PATIENCE_SECONDS)
            self._process = None

    def restart(self, how: str) -> None:
        self.stop(how)
        self.start()

    def sql(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """One statement as the server's owner, in no transaction."""
        place: dict[str, Any] = {"host": str(self.folder), "port": self.port, "user": ADMIN, "dbname": database}
        with psycopg.connect(**place, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return list(cursor.fetchall()) if cursor.description else []

    @contextmanager
    def database(self) -> Iterator[str]:
        """URL of an empty database. It is emptied afterwards and lent again: making one costs as much as a test."""
        if not self._free:
            self._count += 1
            self._free.append(f"ledger{self._count}")
            self.sql(f"CREATE DATABASE {self._free[0]}")
        name = self._free.pop()
        yield self.url(name)
        self.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        self.sql("DROP SCHEMA public CASCADE", name)
        self.sql("CREATE SCHEMA public", name)
        self._free.append(name)

    def url(self, database: str) -> str:
        """Through the socket, where the server trusts whoever reaches it."""
        return f"postgresql+psycopg://{ADMIN}@/{database}?host={self.folder}&port={self.port}"

    def loopback_url(self, database: str) -> str:
        """Over TCP, where the server wants a password."""
        return f"postgresql+psycopg://{ADMIN}@127.0.0.1:{self.port}/{database}"

    def _as_account(self, argv: list[str]) -> list[str]:
        return [sys.executable, "-c", _LAUNCHER, str(os.getpid()), *map(str, self._account), *argv]

    def _run(self, argv: list[str]) -> None:
        command = self._as_account([str(self.programs / argv[0]), *argv[1:]])
        done = subprocess.run(command, capture_output=True, cwd="/", timeout=120)
        assert done.returncode == 0, done.stderr.decode()


@contextmanager
def running(programs: Path) -> Iterator[Server]:
    """A server in a folder of its own, short enough for a socket's path; nothing is left of it."""
    folder = Path(tempfile.mkdtemp(prefix="gpumarket-pg-"))
    try:
        server = Server(programs, folder)
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")
    finally:
        shutil.rmtree(folder)

"""What every daemon does alike: logs without secrets, one process per state folder, a first SIGTERM drains and a second one ends."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import json as jsonlib
import logging
import os
import signal
import stat
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import IO, Any

import structlog

from gpumarket.core.errors import ConfigError, StateLocked

READY = "ready.json"
"""File in a daemon's state folder while it is up: {pid, role, address, endpoint, tls_key_hash, p2p, chain_id, ...}."""
_SECRET_KEYS = frozenset({"password", "secret", "private_key", "key", "prompt", "request", "tokens", "output", "salt", "authorization"})


def configure_logging(role: str, *, json: bool = True, level: int = logging.INFO) -> None:
    """Logs to stderr, one JSON object a line (or for people), each with the role; values under secret names are masked."""
    renderer: Any = structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _redact,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    structlog.contextvars.bind_contextvars(role=role)


def _redact(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        event[key] = "***" if key in _SECRET_KEYS else _masked(value)
    return event


def _masked(value: Any) -> Any:
    """`value` with what lies under secret names masked, however deep."""
    if isinstance(value, Mapping):
        return {key: "***" if key in _SECRET_KEYS else _masked(inner) for key, inner in value.items()}
    return [_masked(inner) for inner in value] if isinstance(value, (list, tuple)) else value


class StateFolder:
    """A daemon's folder, held by one process at a time (flock): two daemons on one key would sign against each other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def __enter__(self) -> Path:
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            if stat.S_IMODE(self.path.stat().st_mode) & 0o077:
                self.path.chmod(0o700)  # orders, prompts and vouchers lie here
            self._lock = (self.path / "lock").open("a+")
        except OSError as error:
            raise ConfigError(f"cannot use the state folder {self.path}: {error.strerror}", hint="give another with --state") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise StateLocked(f"another process works on {self.path}", hint="stop it first, or give another folder with --state") from error
        return self.path

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.close()


async def run_until_signalled(serve: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run `serve(stop)`; SIGTERM or SIGINT sets `stop`, on which `serve` drains and returns. A second signal ends the process with 130."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await serve(stop)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a file for other processes, whole or not at all."""
    temporary = path.with_suffix(path.suffix + ".new")
    temporary.write_text(jsonlib.dumps(document, indent=2) + "\n")
    temporary.replace(path)


def settle_memory() -> None:
    """Have the garbage collector look seldom at what lives long: all that there is now, and the values that a daemon keeps by the thousand.

    These hold no cycles; looking through them again and again was a tenth of the work of an order.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)

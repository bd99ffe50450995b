"""Whether a process can do its work now: a few named checks, asked side by side, each with a bounded wait.

What a check answers goes to whoever asks, without authentication: it says what is wrong in words of this program, never an error's own
text, which may name a file, a URL or a peer. That is in the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import structlog

from gpumarket.core.errors import GpumarketError
from gpumarket.telemetry.window import Recent

Check = Callable[[], Awaitable[str]]
"""Answers what is wrong; empty when nothing is."""
_log = structlog.get_logger()


class Readiness:
    """`checks`, each with the seconds that it may take. One that hangs is not asked again until it has answered."""

    def __init__(self, checks: Mapping[str, tuple[Check, float]]) -> None:
        self._checks = {name: (Recent(ask, 0.0), seconds) for name, (ask, seconds) in checks.items()}
        self._told: list[str] = []

    async def troubles(self) -> list[str]:
        """What is wrong now, as "name: what"."""
        found = await asyncio.gather(*(self._ask(name, *check) for name, check in self._checks.items()))
        told = [what for what in found if what]
        if told != self._told:
            _log.info("readiness_changed", ready=not told, reasons=told)
            self._told = told
        return told

    async def close(self) -> None:
        """Stop what is being asked."""
        await asyncio.gather(*(check.close() for check, _ in self._checks.values()))

    async def _ask(self, name: str, check: Recent[str], seconds: float) -> str:
        try:
            async with asyncio.timeout(seconds):
                what = await check.get()
        except TimeoutError:
            what = f"no answer within {seconds:g} s"
        except GpumarketError as error:
            _log.warning("readiness_check_failed", check=name, reason=error.message)
            what = f"failed ({error.code})"
        return f"{name}: {what}" if what else ""

"""The lines to schedulers: one that new orders go to, and one to each whose jobs and channels are still there.

An order belongs to its scheduler for good: only it opens the next attempt, and the voucher that pays is on the channel to it. So a job goes
back to the line of its own scheduler, however long ago another was chosen; only what is not ordered yet may go elsewhere.
Never: an order at two schedulers, another scheduler in the place of one that the settings name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

from gpumarket.core.errors import GpumarketError, Unreachable
from gpumarket.core.units import Address, hex0x
from gpumarket.sdk.hub import Hub
from gpumarket.sdk.logs import log

T = TypeVar("T")
LineTo = Callable[[Address], Hub]
Another = Callable[[Collection[Address]], Awaitable[Address]]
"""Chooses one that answers, of those not given. Raises Unreachable when there is none."""


class Schedulers:
    """`hub` is the line that new orders go to, at first to `chosen`. `another` is None where the settings name the scheduler."""

    def __init__(self, chosen: Address, line_to: LineTo, another: Another | None) -> None:
        self._line_to, self._another = line_to, another
        self._lines: dict[Address, Hub] = {}
        self._moving = asyncio.Lock()
        self.hub = self.line(chosen)

    def line(self, scheduler: Address) -> Hub:
        """The line to one scheduler; nothing is said on it yet."""
        if scheduler not in self._lines:
            self._lines[scheduler] = self._line_to(scheduler)
        return self._lines[scheduler]

    async def ask(self, question: Callable[[Hub], Awaitable[T]]) -> T:
        """The answer of the scheduler that new orders go to, or of another one that answers, which is then that one.

        For questions only: whatever is ordered or paid stays with its scheduler. Raises Unreachable when none answers.
        """
        silent: set[Address] = set()
        while True:
            hub = self.hub
            try:
                return await question(hub)
            except Unreachable as error:
                silent.add(hub.address)
                await self._leave(hub, silent, error)

    async def close(self) -> None:
        """Hang up everywhere."""
        for hub in self._lines.values():
            await hub.close()

    async def _leave(self, hub: Hub, silent: Collection[Address], error: Unreachable) -> None:
        """Choose another scheduler for new orders, unless somebody has done so meanwhile."""
        if self._another is None:
            raise Unreachable(
                error.message, hint="with GPUMARKET_CLIENT_SCHEDULER empty, another registered scheduler is chosen in its place"
            ) from error
        async with self._moving:
            if self.hub is not hub:
                return
            try:
                found = await self._another(silent)
            except GpumarketError as none:
                raise Unreachable(f"{error.message}; {none.message}", hint=error.hint or none.hint) from error
            log.warning("scheduler_replaced", silent=hex0x(hub.address), chosen=hex0x(found), reason=error.message)
            self.hub = self.line(found)

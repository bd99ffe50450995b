"""A caller that leaves in the middle of opening a channel or raising a voucher: the next one finds memory and journal in step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sdk_market import CLIENT, MemoryChain
from sdk_terms import address

from gpumarket.core.ports import SystemClock, SystemRandom
from gpumarket.core.units import Money
from gpumarket.sdk.account import Account
from gpumarket.sdk.settings import ClientSettings
from gpumarket.sdk.tables import METADATA
from gpumarket.settlement.journal import Journal

SCHEDULER = address("scheduler")


@asynccontextmanager
async def account(folder: Path) -> AsyncIterator[Account]:
    journal = Journal(f"sqlite:///{folder}/journal.db", METADATA)
    journal.open()
    try:
        yield Account(journal, MemoryChain(), CLIENT, ClientSettings(state=folder), SystemClock(), SystemRandom())
    finally:
        await journal.close()


@pytest.mark.parametrize("steps", range(1, 5))
async def test_account_caller_cancelled_while_the_channel_opens_leaves_it_to_the_next(tmp_path: Path, steps: int) -> None:
    async with account(tmp_path) as mine:
        first = asyncio.create_task(mine.channel(SCHEDULER, 0))
        for _ in range(steps):
            await asyncio.sleep(0)
        first.cancel()
        both = await asyncio.gather(*(mine.channel(SCHEDULER, 0) for _ in range(2)))
        assert both[0] is both[1]


async def test_account_caller_cancelled_while_its_voucher_is_written_does_not_stop_the_next(tmp_path: Path) -> None:
    async with account(tmp_path) as mine:
        channel = await mine.channel(SCHEDULER, 0)
        first = asyncio.create_task(mine.cover(channel, Money(100), lambda connection: None))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()
        await mine.cover(channel, Money(10), lambda connection: None)
        assert (channel.voucher, channel.open) == (110, 110)

"""Fixtures that need a whole market: one testnet for all tests that leave it as it was, and a new one for a test that breaks something.

Tests import nothing from here; they ask for `testnet` or `new_testnet` and get a `gpumarket.testnet.network.Network` that is up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from gpumarket.testnet import plan
from gpumarket.testnet.network import Network

NewTestnet = Callable[[plan.Plan], Awaitable[Network]]


@pytest.fixture(scope="session")
def testnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Chain, scheduler and three honest providers (two sell text), up once for the session. Tests may trade on it, not break it.

    Every result is checked. `testnet.client_config` is a client's settings file; one client works on it at a time.
    """
    network = Network(tmp_path_factory.mktemp("testnet"), plan.Plan(plan.honest(3, text=2), client={"check_probability": 1.0}), print)
    try:
        asyncio.run(network.up())
        yield network
    finally:
        asyncio.run(network.down())


@pytest.fixture
async def new_testnet(tmp_path: Path) -> AsyncIterator[NewTestnet]:
    """Brings up a network of a plan for one test alone, which may kill and restart what it likes."""
    async with AsyncExitStack() as stack:

        async def make(wanted: plan.Plan) -> Network:
            return await stack.enter_async_context(Network(tmp_path / "testnet", wanted, print))

        yield make

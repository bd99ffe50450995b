"""One testnet for the fault tests of the market: each test leaves it as it found it, and gets it whole even where another one failed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from fault_market import FaultMarket, plan

from gpumarket.testnet.network import Network


@pytest.fixture(scope="package")
def fault_market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultMarket]:
    """A chain, a scheduler and two providers, up. Started from the main thread, with which its processes die."""
    network = Network(tmp_path_factory.mktemp("market"), plan())
    try:
        asyncio.run(network.up())
        yield FaultMarket(network)
    finally:
        asyncio.run(network.down())


@pytest.fixture
async def market(fault_market: FaultMarket) -> AsyncIterator[FaultMarket]:
    """The market with everything running. Whatever the test did to it, at its end all is settled and the invariants hold."""
    await fault_market.heal()
    yield fault_market
    await fault_market.heal()
    await fault_market.check_invariants()

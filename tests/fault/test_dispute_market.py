"""A whole market of processes: a cheater sells, is checked, is taken before a panel of other providers' daemons, and is slashed.

Six panel daemons, one of them killed and started again while the dispute runs. Nothing is done by hand but `gpumarket dispute open`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import MetaData

from gpumarket.core.settings import ChainSettings, load
from gpumarket.core.units import hex0x
from gpumarket.sdk import Client
from gpumarket.sdk.settings import ClientSettings
from gpumarket.settlement.chain import Sender, connect, sender_tables
from gpumarket.settlement.chain.disputes import DisputeActions
from gpumarket.settlement.journal import Journal
from gpumarket.testnet.network import Network
from gpumarket.testnet.plan import MINILM, ModelPlan, Plan, ProviderPlan

VERIFIERS = 6
SECONDS_MAX = 480
JOBS_MAX = 60
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * SECONDS_MAX)]
STAKE = {"stake": "500"}


def plan() -> Plan:
    """Six honest providers with seats, and one that sells bf16 as float32 for half their price."""
    honest = [
        ProviderPlan(f"provider-{n + 1}", (ModelPlan(MINILM, f"0.02{n}"),), settings={**STAKE, "panel": True}) for n in range(VERIFIERS)
    ]
    cheater = ProviderPlan("cheater", (ModelPlan(MINILM, "0.01"),), "lower-precision", {**STAKE, "checks": False})
    return Plan((*honest, cheater), scheduler={"check_seconds": 300}, client={"check_probability": 1.0})


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    net = Network(tmp_path_factory.mktemp("disputes"), plan())
    try:
        asyncio.run(net.up())
        yield net
    finally:
        asyncio.run(net.down())


async def facts(network: Network, folder: Path) -> dict[str, Any]:
    """Seasoned verifiers now, and the cheater's stake."""
    settings = load(ChainSettings, file=network.client_config, env={})
    chain = await connect(settings)
    tables = MetaData()
    sender_tables(tables)
    journal = Journal(f"sqlite:///{folder}/looker.db", tables)
    journal.open()
    try:
        cheater = network.wallets["cheater"].address
        actions = DisputeActions(chain, Sender(chain, network.wallets["cheater"], journal))
        node = await chain.registry.functions.node(chain.w3.to_checksum_address(cheater)).call()
        names = [p["name"] for p in next(e for e in chain.registry.abi if e.get("name") == "node")["outputs"][0]["components"]]
        return {
            "seasoned": await actions.seasoned(network.models[MINILM].digest, int(time.time())),
            "stake": dict(zip(names, node, strict=True))["stake"],
        }
    finally:
        await journal.close()
        await chain.close()


async def rejected_job(network: Network) -> str:
    """A job that the cheater served and whose result two checkers rejected. Whom a job goes to is drawn: it may take a few."""
    config = network.client_config
    async with Client(load(ClientSettings, file=config, env={}), load(ChainSettings, file=config, env={})) as market:
        for number in range(JOBS_MAX):
            result = await market.embed(MINILM, ["a red fox", f"the baker opens at {number}", "a lighthouse of granite"], max_cost="0.01")
            for rejected in result.rejected:
                assert rejected.provider == network.wallets["cheater"].address
                return hex0x(rejected.job)
    raise AssertionError(f"none of {JOBS_MAX} jobs went to the cheater, which asks half of what the others do")


def test_dispute_market_of_processes_slashes_the_cheater(network: Network, tmp_path: Path) -> None:
    deadline = time.monotonic() + SECONDS_MAX
    before = asyncio.run(facts(network, tmp_path))
    while before["seasoned"] < VERIFIERS:
        assert time.monotonic() < deadline, before
        time.sleep(1)
        before = asyncio.run(facts(network, tmp_path))
    job = asyncio.run(rejected_job(network))
    command = [sys.executable, "-m", "gpumarket.cli.main", "dispute", "open", job, "-o", "json", "--config", str(network.client_config)]
    opening = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        kill_a_member_and_start_it_again(network)
        output, errors = opening.communicate(timeout=SECONDS_MAX)
    finally:
        opening.kill()
    assert opening.returncode == 0, output + errors
    found = json.loads(output)
    assert (found["state"], found["outcome"]) == ("finished", "slashed"), found
    assert found["provider"] == hex0x(network.wallets["cheater"].address)
    assert found["beyond"] >= 4
    assert len(found["panel"]) == 5
    status = [*command[:4], "status", job, "-o", "json", "--config", str(network.client_config)]
    assert json.loads(subprocess.run(status, capture_output=True, text=True, check=True, timeout=SECONDS_MAX).stdout) == found
    after = asyncio.run(facts(network, tmp_path))
    assert after["stake"] == before["stake"] - found["taken"]
    assert found["burned"] * 2 >= found["taken"] > 0


def kill_a_member_and_start_it_again(network: Network) -> None:
    """Whatever it was doing: its journal and the chain tell it how to go on."""
    name = network.plan.providers[0].name
    os.kill(network.ready[name]["pid"], signal.SIGKILL)
    network.start_role(name)
    asyncio.run(network.wait_ready(name))

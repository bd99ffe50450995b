"""What many tests stand on, and what every test leaves as it found it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import postgres_server
import pytest
import structlog
from postgres_server import Server
from settlement_chain import LocalChain, local_chain
from simulation.profiles import RUNS

from gpumarket.settlement.chain import Chain


@pytest.fixture(autouse=True)
def unconfigured_logging() -> Iterator[None]:
    """A verb that a test runs sets logging up for its process, and that is every later test's, too."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalChain]:
    """A chain with the contracts, for a file's tests."""
    with local_chain(tmp_path_factory.mktemp("chain")) as running:
        yield running


@pytest.fixture
async def chain(local: LocalChain) -> AsyncIterator[Chain]:
    """A connection to it."""
    connected = await local.connect()
    yield connected
    await connected.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server, started once. Skips where none is installed."""
    programs = postgres_server.binaries()
    if programs is None:
        pytest.skip("POSTGRESQL IS NOT INSTALLED: nothing was tested on it (Debian: apt install postgresql)")
    with postgres_server.running(programs) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def databases(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """URL of an empty database by its name: every test that asks for one runs on both kinds."""
    urls = dict[str, str]()
    with ExitStack() as lent:

        def url_of(name: str) -> str:
            if name not in urls and request.param == "sqlite":
                urls[name] = f"sqlite:///{tmp_path / name}.db"
            elif name not in urls:
                urls[name] = lent.enter_context(request.getfixturevalue("postgres").database())
            return urls[name]

        yield url_of


@pytest.fixture
def database(databases: Callable[[str], str]) -> str:
    """The only one."""
    return databases("ledger")


def pytest_configure() -> None:
    """pytest-xdist tells its workers the width of a terminal that they do not have; what is printed would be broken to it."""
    os.environ.pop("COLUMNS", None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands the seeds of its random histories to the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["runs"] = RUNS


def pytest_testnodedown(node: Any) -> None:
    RUNS.extend(getattr(node, "workeroutput", {}).get("runs", []))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Which seed each machine ran with, so that a run that passed can be run again, too."""
    if RUNS:
        terminalreporter.section("seeds of the random histories; a line runs the same ones again")
        for line in RUNS:
            terminalreporter.write_line(line)

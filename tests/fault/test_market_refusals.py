"""What the market refuses, as a user of the command line meets it: a typed error, its documented exit code, and what to do next."""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fault_market import SLOTS, CliAnswer, FaultMarket, run_cli, until

from gpumarket.testnet.plan import SCHEDULER, TINY_LLAMA
from gpumarket.testnet.ports import free_port

pytestmark = pytest.mark.timeout(600)
WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from gpumarket.cli.main import run
sys.exit(run(sys.argv[1:]))
"""
"""The command line on a machine where packages are not installed."""


def assert_refused(answer: CliAnswer, code: str, exit_code: int, *told: str) -> None:
    """A typed error in the documented shape, with its exit code, a next step, and these words in it."""
    assert answer.code == exit_code, answer
    error = answer.error
    assert error["code"] == code
    assert error["message"] and error["hint"], error
    assert isinstance(error["retryable"], bool)
    for words in told:
        assert words in json.dumps(error)


@contextmanager
def listening() -> Iterator[int]:
    """A port that is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


@contextmanager
def frozen(market: FaultMarket) -> Iterator[None]:
    """Providers that say nothing, as behind a cable that was pulled."""
    for name in market.providers:
        market.network.processes.signal(name, signal.SIGSTOP)
    try:
        yield
    finally:
        for name in market.providers:
            market.network.processes.signal(name, signal.SIGCONT)


async def test_out_of_funds_is_refused_before_anything_is_sent(market: FaultMarket) -> None:
    config = market.other_client("stranger")
    answer = await market.cli("run", TINY_LLAMA, "hello", config=config)
    assert_refused(answer, "out_of_funds", 5, "holds 0")
    jobs = await market.cli("job", "list", config=config)
    assert jobs.document == []


async def test_over_max_cost_is_refused_with_both_amounts(market: FaultMarket) -> None:
    answer = await market.cli("run", TINY_LLAMA, "hello", "--max-cost", "0.000000000000000001")
    assert_refused(answer, "over_max_cost", 5, "0.000000000000000001")


async def test_unknown_model_is_refused_with_the_command_that_adds_it(market: FaultMarket) -> None:
    assert_refused(await market.cli("run", "no-such-model", "hello"), "unknown_model", 7, "gpumarket model add")


async def test_no_provider_tells_which_filter_removed_how_many(market: FaultMarket) -> None:
    await market.matchable()
    async with market.client() as client:
        await client.explain(TINY_LLAMA, "hello")  # fetches the tokenizer while somebody has it
    with frozen(market):
        async with market.client() as client:
            await until(lambda: market.struck_out(client, "heartbeat"), "the scheduler still hears the providers")
        answer = await market.cli("run", TINY_LLAMA, "hello")
    assert_refused(answer, "no_provider", 7)
    assert answer.error["removed"] == {"heartbeat": len(market.providers)}
    assert answer.error["considered"] == len(market.providers)
    await market.matchable()


async def test_full_queues_are_refused_as_busy_and_the_running_jobs_end_well(market: FaultMarket) -> None:
    await market.matchable()
    async with market.client() as client:
        prompt = await market.long_prompt(client)
        streams = [market.chat(client, prompt) for _ in range(SLOTS * len(market.providers))]
        for stream in streams:
            await anext(aiter(stream))
        await until(lambda: market.struck_out(client, "capacity"), "there are places left")
        answer = await market.cli("run", TINY_LLAMA, "hello", config=market.other_client("second stranger"))
        for stream in streams:
            assert [piece async for piece in stream]
            assert len(stream.result.attempts) == 1
    assert_refused(answer, "busy", 7, "capacity removed 2")
    assert answer.error["retryable"]


async def test_other_chain_id_is_refused(market: FaultMarket) -> None:
    book = json.loads(market.network.folder.book.read_text())
    other = market.network.folder.root / "other-chain.json"
    other.write_text(json.dumps({**book, "chain_id": book["chain_id"] + 1}))
    config = market.other_client("stranger", chain={"address_book": other})
    assert_refused(await market.cli("wallet", "balance", config=config), "wrong_chain", 6, str(book["chain_id"] + 1))


async def test_wrong_password_is_refused(market: FaultMarket, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.touch(mode=0o600)
    password.write_text("not the password\n")
    config = market.other_client("stranger", client={"password_file": password})
    assert_refused(await market.cli("wallet", "balance", config=config), "wrong_password", 4)


async def test_chain_that_is_not_there_is_refused(market: FaultMarket) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    config = market.other_client("stranger", chain={"rpc_url": url})
    assert_refused(await market.cli("wallet", "balance", config=config), "unreachable", 6, url, "testnet up")


@pytest.mark.parametrize("role", ["provider", "scheduler"])
async def test_taken_port_is_refused_by_a_daemon_at_its_start(market: FaultMarket, role: str) -> None:
    with listening() as port:
        answer = await market.cli(role, "start", "--listen", f"127.0.0.1:{port}", config=market.other_daemon(role))
    assert_refused(answer, "port_in_use", 3, str(port), "--listen")


async def test_state_folder_in_use_is_refused(market: FaultMarket) -> None:
    config = market.network.folder.config(SCHEDULER)
    assert_refused(await market.cli("scheduler", "start", config=config), "state_locked", 3, "--state")


@pytest.mark.parametrize(
    ("role", "missing", "extra"),
    [("provider", "torch", "provider"), ("scheduler", "libp2p", "scheduler"), ("scheduler", "alembic", "scheduler")],
)
async def test_missing_extra_is_refused_with_what_to_install(market: FaultMarket, role: str, missing: str, extra: str) -> None:
    program = WITHOUT.format(missing={missing})
    command = [sys.executable, "-c", program, role, "start", "-o", "json", "--config", str(market.other_daemon(role))]
    assert_refused(await run_cli(command, {}), "missing_extra", 3, f"gpumarket[{extra}]")

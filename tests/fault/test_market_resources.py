"""F13: daemons that get no more file descriptors, an engine that the kernel ends for its memory. Refused with a type; nobody else ends.

The limits are set from outside (prlimit) on processes that run, and taken back: what a full machine does, without filling this one.
"""

from __future__ import annotations

import asyncio
import itertools
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from fault_market import FaultMarket, assert_delivered_once, assert_paid_once, attempts_of, until
from reliability import record

from gpumarket.core.errors import GpumarketError
from gpumarket.core.rpc import open_channel
from gpumarket.core.units import parse_hash
from gpumarket.sdk.constraints import Constraints
from gpumarket.testnet.plan import SCHEDULER, TINY_LLAMA
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1.market_pb2_grpc import MarketStub

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WORKER = "gpumarket.node.engine.worker"
CALLERS = 2


@contextmanager
def no_more_descriptors(pid: int) -> Iterator[None]:
    """The process keeps what it has open, and opens nothing more."""
    before, taken = resource.prlimit(pid, resource.RLIMIT_NOFILE), {int(fd.name) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    lowest_free = next(number for number in itertools.count() if number not in taken)  # the limit is on the number, not on how many
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


async def calls_in(market: FaultMarket, name: str) -> GpumarketError | None:
    """A stranger that connects to a daemon for the first time: why not, or None when it is let in."""
    ready = market.network.ready[name]
    try:
        channel = await open_channel(ready["endpoint"], parse_hash(ready["tls_key_hash"]))
    except GpumarketError as error:
        return error
    if name == SCHEDULER:
        await MarketStub(channel).Info(pb.InfoRequest(), timeout=10)
    await channel.close(None)
    return None


async def test_daemons_without_file_descriptors_refuse_newcomers_keep_their_jobs_and_recover(market: FaultMarket) -> None:
    await market.matchable()
    names = [SCHEDULER, *market.providers]
    before = {name: market.pid(name) for name in names}
    async with market.client() as client:
        stream, pieces, _ = await market.begin(client)
        with ExitStack() as limits:
            for pid in before.values():
                limits.enter_context(no_more_descriptors(pid))
            answers = await asyncio.gather(*(calls_in(market, name) for name in names for _ in range(CALLERS)))
            pieces += [piece async for piece in stream]  # on lines that were there before
            following = await client.chat(TINY_LLAMA, "On the same lines?", max_tokens=8)
        refused = [error for error in answers if error is not None]
        assert len(refused) > len(answers) // 2, "the limit did not bite"  # one that closes a file has room for one more
        assert all(error.code == "unreachable" and error.retryable and error.hint for error in refused), refused
        tokens = assert_delivered_once(market, stream.result.job)

        async def let_in() -> bool:
            return [await calls_in(market, name) for name in names] == [None] * len(names)

        await until(let_in, "a daemon lets nobody in although it has descriptors again")
    assert {name: market.pid(name) for name in names} == before, "nobody ended"
    await market.settle()
    assert_paid_once(market, stream.result.job, len(tokens))
    assert_paid_once(market, following.job, following.usage.output_tokens)
    figure = f"no file descriptor left: {len(refused)} newcomers refused with a type, {len(answers) - len(refused)} let in"
    record("F13", len(answers), f"{figure}, daemons ended 0, running jobs lost 0", "typed refusals; ended 0")


async def test_engine_ended_for_its_memory_costs_one_attempt_and_comes_back(market: FaultMarket) -> None:
    """What the kernel does when memory is short: SIGKILL for the largest, which is the engine with its model."""
    await market.matchable()
    async with market.client() as client:
        stream, pieces, victim = await market.begin(client)
        engine, daemon = market.child(victim, WORKER), market.pid(victim)
        engine.kill()
        pieces += [piece async for piece in stream]
        result = stream.result
        tokens = assert_delivered_once(market, result.job)
        assert "".join(pieces) == result.text

        there = Constraints(require_provider=market.address(victim))
        following = await client.chat(TINY_LLAMA, "Are you back?", max_tokens=8, constraints=there)
        assert market.name_of(following.attempts[-1].provider) == victim, "its next lease starts the engine again"
        assert market.child(victim, WORKER).pid != engine.pid
    assert market.pid(victim) == daemon
    await market.settle()
    first, second = attempts_of(market.books(), result.job)
    assert (market.name_of(first.provider), first.units + second.units) == (victim, len(tokens))
    assert_paid_once(market, result.job, len(tokens))
    record("F13", 1, "engine killed by the kernel for its memory: daemons ended 0, tokens lost or doubled 0", "typed refusals; ended 0")

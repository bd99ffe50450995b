"""A chain endpoint that lies, lags and breaks, through a proxy: nothing false enters the view, the error says what it is, and once the
endpoint tells the truth again everything goes on by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chain_proxy import ChainProxy, Cut, Raw, RpcError, always
from reliability import record
from settlement_chain import LocalChain, account, chain_journal, party, until

from gpumarket.core.errors import ChainError, InconsistentChain, NetworkError, Unreachable, WrongChain
from gpumarket.core.units import Hash
from gpumarket.settlement.chain import Actions, Chain, ChainView, Follower, NewWork, connect

PAYER, PAYEE = account(1), account(2)
FAR = 4_000_000_000


@pytest.fixture
def proxy(local: LocalChain) -> Iterator[ChainProxy]:
    with ChainProxy(local.anvil.url) as running:
        yield running


@pytest.fixture
async def payer(local: LocalChain, tmp_path: Path) -> AsyncIterator[Actions]:
    """Works on the chain directly: what happens there is not up to the endpoint."""
    chain, journal = await local.connect(), chain_journal(tmp_path / "payer.db")
    actions = await party(chain, PAYER, journal)
    yield actions
    await actions.sender.close()
    await journal.close()
    await chain.close()


@dataclass
class Listener:
    """Our side, behind the proxy."""

    chain: Chain
    view: ChainView
    follower: Follower


@asynccontextmanager
async def listening(local: LocalChain, proxy: ChainProxy, **more: Any) -> AsyncIterator[Listener]:
    chain = await connect(local.settings().model_copy(update={"rpc_url": proxy.url, **more}))
    view = ChainView()
    try:
        yield Listener(chain, view, Follower(chain, view, me=PAYEE.address))
    finally:
        await chain.close()


@pytest.fixture(scope="module")
def registered(local: LocalChain) -> None:
    """One node on the chain, so that there is state to compare."""

    async def register() -> None:
        chain = await local.connect()
        me = chain.w3.to_checksum_address(PAYEE.address)
        await chain.registry.functions.register(1, "12D3KooWb", b"\2" * 32, "127.0.0.1:2").transact({"from": me})
        await chain.close()

    asyncio.run(register())


@pytest.fixture
async def ours(local: LocalChain, proxy: ChainProxy) -> AsyncIterator[Listener]:
    async with listening(local, proxy) as made:
        await made.follower.sync()
        yield made


async def truth(local: LocalChain) -> ChainView:
    """A clean follower without anybody in between."""
    chain, view = await local.connect(), ChainView()
    await Follower(chain, view).sync()
    await chain.close()
    return view


def same(view: ChainView, other: ChainView) -> bool:
    return (view.channels, view.nodes, view.block) == (other.channels, other.nodes, other.block)


# --- broken transport ----------------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[Any, type[NetworkError]]] = {
    "malformed JSON": (Raw(body=b'{"jsonrpc": "2.0", "id": 1, "result": '), ChainError),
    "HTML instead of JSON": (Raw(body=b"<html>Bad gateway</html>", headers={"Content-Type": "text/html"}), ChainError),
    "HTML with 502": (Raw(502, b"<html>Bad gateway</html>", {"Content-Type": "text/html"}), Unreachable),
    "a truncated body": (Raw(body=b'{"jsonrpc"', promised=5_000), Unreachable),
    "an empty body": (Raw(), ChainError),
    "neither result nor error": (Raw(body=b'{"jsonrpc": "2.0", "id": 1}'), ChainError),
    "a list": (Raw(body=b"[]"), ChainError),
    "deep nesting": (Raw(body=b"[" * 200_000), ChainError),
    "no UTF-8": (Raw(body=b'{"jsonrpc": "2.0", "id": 1, "result": "\xff\xfe"}'), ChainError),
    "an internal error": (RpcError(-32603, "internal error"), ChainError),
    "null": (None, ChainError),
    "a number as text": ("many", ChainError),
    "an object": ({"no": "meaning"}, ChainError),
    "a list of nothing": ([None, 7, "x"], ChainError),
}
METHODS = ("eth_chainId", "eth_blockNumber", "eth_getBlockByNumber", "eth_getLogs", "eth_call")


@pytest.mark.parametrize("name", BROKEN)
async def test_lies_broken_answer_to_any_method_is_a_typed_error_and_passes(
    local: LocalChain, proxy: ChainProxy, registered: None, ours: Listener, name: str
) -> None:
    answer, kind = BROKEN[name]
    for method in METHODS:
        local.mine()
        before = (dict(ours.view.channels), dict(ours.view.nodes), ours.view.block)
        proxy.lie(method, always(answer))
        if (name, method) == ("null", "eth_getBlockByNumber"):  # what a node says of a block that it has not seen yet
            await ours.follower.sync()
        else:
            with pytest.raises(kind) as caught:
                await ours.follower.sync()
            assert caught.value.retryable and type(caught.value) in (Unreachable, ChainError), caught.value
            assert caught.value.hint or isinstance(answer, RpcError), caught.value
        assert (dict(ours.view.channels), dict(ours.view.nodes)) == before[:2], method
        assert ours.view.block == before[2] or method == "eth_call"  # the comparison in turn comes after the new blocks
        proxy.honest()
        await ours.follower.sync()
        assert ours.view.block == before[2] + 1
    record("F33", len(METHODS), f"{name}: wrong entries in the view 0", "no wrong money decision")


async def test_lies_huge_body_is_cut_off(local: LocalChain, proxy: ChainProxy, ours: Listener) -> None:
    ours.chain.w3.provider._response_bytes_max = 1 << 20
    proxy.lie("eth_blockNumber", always(Raw(body=b'{"jsonrpc":"2.0","id":1,"result":"' + b"0" * (8 << 20) + b'"}')))
    with pytest.raises(ChainError, match="more than 1048576 bytes"):
        await ours.follower.sync()


async def test_lies_too_many_requests_is_obeyed_for_as_long_as_it_says(proxy: ChainProxy, ours: Listener) -> None:
    proxy.lie("*", always(Raw(429, b"slow down", {"Retry-After": "1"})))
    with pytest.raises(Unreachable, match="429"):
        await ours.follower.sync()
    asked = sum(proxy.calls.values())
    for _ in range(20):
        with pytest.raises(Unreachable, match="pause"):
            await ours.follower.sync()
    assert sum(proxy.calls.values()) == asked  # not one request while it asked for silence
    proxy.honest()
    await asyncio.sleep(1.1)
    await ours.follower.sync()


async def test_lies_no_answer_in_time_is_unreachable(local: LocalChain, proxy: ChainProxy, ours: Listener) -> None:
    ours.chain.w3.provider.timeout = 0.2
    proxy.lie("eth_blockNumber", always(Raw(seconds=1.0)))
    with pytest.raises(Unreachable, match="does not answer"):
        await ours.follower.sync()
    proxy.lie("eth_blockNumber", hang_up)
    with pytest.raises(Unreachable, match="does not answer"):
        await ours.follower.sync()
    proxy.honest()
    await ours.follower.sync()


def hang_up(params: list[Any], answer: Any) -> Any:
    raise Cut


# --- another chain ---------------------------------------------------------------------------------------------------------------


async def test_lies_wrong_chain_at_start_is_refused(local: LocalChain, proxy: ChainProxy) -> None:
    proxy.lie("eth_chainId", always("0x1"))
    with pytest.raises(WrongChain, match="chain 1"):
        await connect(local.settings().model_copy(update={"rpc_url": proxy.url}))


async def test_lies_other_code_at_start_is_refused(local: LocalChain, proxy: ChainProxy) -> None:
    proxy.lie("eth_getCode", lambda params, code: code[:-2] + ("00" if code[-2:] != "00" else "01"))
    with pytest.raises(WrongChain):
        await connect(local.settings().model_copy(update={"rpc_url": proxy.url}))


async def test_lies_chain_id_that_changes_later_takes_nothing_from_the_view(
    local: LocalChain, proxy: ChainProxy, payer: Actions, ours: Listener
) -> None:
    channel = await payer.open_channel(PAYEE.address, 10, FAR)
    await ours.follower.sync()
    before = dict(ours.view.channels)
    proxy.lie("eth_chainId", always("0x1"))
    stop = asyncio.Event()
    running = asyncio.create_task(ours.follower.run(stop))
    await until(lambda: bool(ours.view.trouble), running)
    assert "chain 1" in ours.view.trouble and ours.view.channels == before
    proxy.honest()
    await payer.top_up(channel, 5, FAR)
    await until(lambda: ours.view.channels[channel].deposit == 15 and not ours.view.trouble, running)
    assert not ours.view.trouble
    stop.set()
    await running


# --- a head that is not the head -------------------------------------------------------------------------------------------------


async def test_lies_head_that_stands_still_only_stops_the_view(local: LocalChain, proxy: ChainProxy, payer: Actions) -> None:
    async with listening(local, proxy, stale_seconds=0.2) as ours:
        await ours.follower.sync()
        stuck = hex(ours.view.block)
        proxy.lie("eth_blockNumber", always(stuck))
        channel = await payer.open_channel(PAYEE.address, 10, FAR)
        stop = asyncio.Event()
        running = asyncio.create_task(ours.follower.run(stop))
        await until(lambda: bool(ours.view.trouble), running)
        assert "no new block" in ours.view.trouble
        assert channel not in ours.view.channels
        proxy.honest()
        while channel not in ours.view.channels or ours.view.trouble:
            await asyncio.sleep(0.01)
            local.mine()  # blocks come again
        stop.set()
        await running


async def test_lies_head_that_goes_backwards_takes_nothing_back(
    local: LocalChain, proxy: ChainProxy, payer: Actions, ours: Listener
) -> None:
    channel = await payer.open_channel(PAYEE.address, 10, FAR)
    await payer.request_close(channel)
    await ours.follower.sync()
    closes_at = ours.view.channels[channel].closes_at
    behind = ours.view.block - 2

    def unknown_above(params: list[Any], answer: Any) -> Any:
        return None if params[0] == "latest" or int(params[0], 16) > behind else answer

    proxy.lie("eth_blockNumber", always(hex(behind)))  # another machine behind the same address, which has not seen the close
    proxy.lie("eth_getBlockByNumber", unknown_above)
    for _ in range(3):
        await ours.follower.sync()
    assert ours.view.channels[channel].closes_at == closes_at > 0
    assert ours.follower.rewinds == 0
    proxy.honest()
    await ours.follower.sync()
    assert same(ours.view, await truth(local))


# --- logs ------------------------------------------------------------------------------------------------------------------------


async def open_and_change(payer: Actions) -> Hash:
    channel = await payer.open_channel(PAYEE.address, 10, FAR)
    await payer.top_up(channel, 5, FAR)
    return channel


async def test_lies_new_logs_left_out_keep_the_view_where_it_was(
    local: LocalChain, proxy: ChainProxy, payer: Actions, ours: Listener
) -> None:
    channel = await payer.open_channel(PAYEE.address, 10, FAR)
    await ours.follower.sync()
    before = ours.view.block
    await payer.top_up(channel, 5, FAR)
    await payer.request_close(channel)
    proxy.lie("eth_getLogs", lambda params, logs: logs[:1])  # the top-up without the close
    with pytest.raises(InconsistentChain, match="closes_at") as caught:
        await ours.follower.sync()
    assert "CHECK_URL" in caught.value.hint
    assert (ours.view.channels[channel].deposit, ours.view.block) == (10, before)
    proxy.honest()
    await ours.follower.sync()
    assert ours.view.channels[channel].closes_at and same(ours.view, await truth(local))


async def test_lies_first_event_left_out_is_found_by_the_next(local: LocalChain, proxy: ChainProxy, payer: Actions, ours: Listener) -> None:
    channel = await open_and_change(payer)
    proxy.lie("eth_getLogs", lambda params, logs: logs[1:])
    with pytest.raises(InconsistentChain, match="never opened"):
        await ours.follower.sync()
    proxy.honest()
    await ours.follower.sync()
    assert ours.view.channels[channel].deposit == 15


async def test_lies_close_left_out_entirely_is_found_in_turn_and_read_again(
    local: LocalChain, proxy: ChainProxy, payer: Actions, ours: Listener
) -> None:
    channel = await payer.open_channel(PAYEE.address, 10, FAR)
    await ours.follower.sync()
    await payer.request_close(channel)
    proxy.lie("eth_getLogs", always([]))  # a lagging index: blocks are there, events are not
    with pytest.raises(InconsistentChain, match="the events are gone"):
        await ours.follower.sync()  # seen, and reading all again does not mend it
    assert channel in ours.view.channels
    proxy.honest()
    local.mine()
    await ours.follower.sync()
    assert ours.view.channels[channel].closes_at and ours.follower.rereads == 2
    assert same(ours.view, await truth(local))
    record("F33", 1, "close request left out of the logs: found, false views 0", "no wrong money decision")


async def test_lies_every_log_left_out_or_doubled_never_makes_a_false_entry(
    local: LocalChain, proxy: ChainProxy, payer: Actions, ours: Listener
) -> None:
    """Each single event of a history left out in turn, then each given twice: refused or right, and right after the lie."""
    channel = await open_and_change(payer)
    await payer.sender.send("register", payer.chain.registry.functions.register(1, "12D3KooWa", b"\1" * 32, "127.0.0.1:1"))
    await payer.stake(7)
    await payer.sender.send("unbond", payer.chain.registry.functions.beginUnbond(payer._me(), 3))
    await payer.request_close(channel)
    right, injected = await truth(local), 0
    spoil: list[Callable[[list[Any], int], list[Any]]] = [
        lambda logs, k: logs[:k] + logs[k + 1 :],
        lambda logs, k: [*logs, logs[k]] if logs else logs,
    ]
    for change in spoil:
        for k in range(-6, 0):
            async with listening(local, proxy) as fresh:
                proxy.lie("eth_getLogs", lambda params, logs, k=k, change=change: change(logs, k + len(logs)))  # type: ignore[misc]
                try:
                    await fresh.follower.sync()
                except InconsistentChain:
                    assert change is spoil[0]
                injected += 1
                for key, found in fresh.view.channels.items():
                    assert found == right.channels[key]
                for operator, node in fresh.view.nodes.items():
                    assert node == right.nodes[operator]
                proxy.honest()
                await fresh.follower.sync()
                assert (fresh.view.channels, fresh.view.nodes) == (right.channels, right.nodes)
    assert injected == 12
    record("F33", injected, "each log left out, each given twice: false entries 0", "no wrong money decision")


@pytest.mark.parametrize("spoil", [{"address": "0x" + "77" * 20}, {"blockNumber": "0x0"}, {"removed": True}])
async def test_lies_log_that_was_not_asked_for_is_refused(
    local: LocalChain, proxy: ChainProxy, payer: Actions, ours: Listener, spoil: dict[str, Any]
) -> None:
    await payer.open_channel(PAYEE.address, 10, FAR)
    before = dict(ours.view.channels)
    left = 3

    def lie(params: list[Any], logs: list[Any]) -> Any:
        nonlocal left
        left -= 1
        return [{**log, **spoil} for log in logs] if left >= 0 else logs

    proxy.lie("eth_getLogs", lie)
    if "removed" not in spoil:
        with pytest.raises(InconsistentChain):
            await ours.follower.sync()
        assert ours.view.channels == before
        proxy.honest()
    await ours.follower.sync()
    assert same(ours.view, await truth(local))


async def test_lies_false_deposit_in_the_logs_is_refused(local: LocalChain, proxy: ChainProxy, payer: Actions, ours: Listener) -> None:
    await payer.open_channel(PAYEE.address, 10, FAR)
    proxy.lie("eth_getLogs", lambda params, logs: [{**log, "data": log["data"].replace("0" * 63 + "a", "0" * 60 + "ffff")} for log in logs])
    with pytest.raises(InconsistentChain, match="deposit"):
        await ours.follower.sync()


# --- two endpoints ---------------------------------------------------------------------------------------------------------------


async def test_lies_consistent_lie_of_one_endpoint_is_found_by_the_second(local: LocalChain, proxy: ChainProxy, payer: Actions) -> None:
    async with listening(local, proxy, check_url=local.anvil.url) as ours:
        await ours.follower.sync()
        channel = await payer.open_channel(PAYEE.address, 10, FAR)
        await ours.follower.sync()
        await payer.request_close(channel)
        proxy.lie("eth_getLogs", always([]))
        proxy.lie("eth_call", lambda params, answer: answer[:-64] + "0" * 64)  # and no closesAt in the state either
        with pytest.raises(InconsistentChain, match=r"the events are gone|closes_at"):
            await ours.follower.sync()
        assert channel in ours.view.channels


async def test_lies_second_endpoint_on_another_fork_stops_both(local: LocalChain, proxy: ChainProxy, payer: Actions) -> None:
    async with listening(local, proxy, rpc_url=local.anvil.url, check_url=proxy.url) as ours:
        await ours.follower.sync()
        before = ours.view.block
        local.mine()
        proxy.lie("eth_getBlockByNumber", lambda params, block: {**block, "hash": "0x" + "12" * 32})
        with pytest.raises(InconsistentChain, match="0x1212") as caught:
            await ours.follower.sync()
        assert "fork" in caught.value.hint
        assert ours.view.block == before
        proxy.honest()
        await ours.follower.sync()
        assert ours.view.block == before + 1


# --- what a troubled view means --------------------------------------------------------------------------------------------------


def test_lies_view_in_trouble_begins_no_new_work_and_says_why() -> None:
    view = ChainView()
    channel = Hash(b"\1" * 32)
    found = NewWork(view)
    assert found.get(channel) is None
    view.trouble = "no new block for 300 s"
    with pytest.raises(Unreachable, match="no new block for 300 s") as caught:
        found.get(channel)
    assert caught.value.retryable and "goes on" in caught.value.hint
    view.trouble = ""
    assert found.get(channel) is None

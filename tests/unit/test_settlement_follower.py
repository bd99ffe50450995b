"""The follower against anvil: the view equals the contracts' own state, also after the chain takes blocks back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from settlement_chain import LocalChain, account, chain_journal, party

from gpumarket.core.errors import ChainError, ConfigError, Unreachable, WrongChain
from gpumarket.core.settings import ChainSettings
from gpumarket.core.terms import keccak256
from gpumarket.core.units import Address, Hash, parse_address
from gpumarket.settlement.chain import (
    PROVIDER,
    SCHEDULER,
    VERIFIER,
    Actions,
    Chain,
    ChainEvent,
    ChainView,
    ChannelChanged,
    ChannelOnChain,
    Follower,
    NodeChanged,
    NodeOnChain,
    connect,
)
from gpumarket.settlement.chain.view import channel_after, node_after
from gpumarket.settlement.vouchers import sign_close, sign_voucher
from gpumarket.testnet.anvil import Anvil

PAYER, PAYEE = account(1), account(2)
FAR = 4_000_000_000
ETHER = 10**18


@pytest.fixture
async def payer(chain: Chain, tmp_path: Path) -> AsyncIterator[Actions]:
    journal = chain_journal(tmp_path / "payer.db")
    actions = await party(chain, PAYER, journal)
    yield actions
    await actions.sender.close()
    await journal.close()


async def followed(chain: Chain) -> tuple[ChainView, Follower]:
    view = ChainView()
    follower = Follower(chain, view)
    await follower.sync()
    return view, follower


async def channel_on_chain(chain: Chain, channel: Hash) -> ChannelOnChain:
    signer, deposit, payee, claimed, payer, expires_at, closes_at = await chain.channels.functions.channel(channel).call()
    return ChannelOnChain(
        channel, parse_address(payer), parse_address(payee), parse_address(signer), deposit, claimed, expires_at, closes_at
    )


async def node_on_chain(chain: Chain, operator: Address) -> NodeOnChain:
    found = await chain.registry.functions.node(chain.w3.to_checksum_address(operator)).call()
    owner, roles, since, at, stake, unbonding, locked, tls, p2p_id, endpoint = found
    return NodeOnChain(operator, parse_address(owner), roles, stake, unbonding, at, locked, since, p2p_id, Hash(tls), endpoint)


async def test_follower_channel_after_each_step_equals_the_contract(local: LocalChain, chain: Chain, payer: Actions) -> None:
    view, follower = await followed(chain)
    channel = await payer.open_channel(PAYEE.address, 100, FAR)
    await follower.sync()
    assert view.channels[channel] == await channel_on_chain(chain, channel)
    assert (view.channels[channel].payer, view.channels[channel].deposit) == (PAYER.address, 100)
    await payer.top_up(channel, 50, FAR + 1)
    await payer.redeem(channel, 30, sign_voucher(PAYER, chain.channels_domain, channel, 30))
    await follower.sync()
    assert view.channels[channel] == await channel_on_chain(chain, channel)
    await payer.push([(channel, 45)])
    await payer.request_close(channel)
    await follower.sync()
    assert view.channels[channel] == await channel_on_chain(chain, channel)
    assert view.channels[channel].closes_at > local.now()
    await payer.cooperative_close(channel, 60, sign_close(PAYEE, chain.channels_domain, channel, 60))
    await follower.sync()
    closed = view.channels[channel]
    assert closed.closed and (closed.claimed, closed.deposit) == (60, 150)


async def test_follower_node_after_each_step_equals_the_contract(local: LocalChain, chain: Chain, payer: Actions) -> None:
    view, follower = await followed(chain)
    me = PAYER.address
    await payer.register(PROVIDER | VERIFIER, "12D3KooWa", keccak256(b"tls"), "127.0.0.1:7000")
    await payer.stake(3 * ETHER)
    await follower.sync()
    assert view.nodes[me] == await node_on_chain(chain, me)
    assert (view.nodes[me].roles, view.nodes[me].stake) == (PROVIDER | VERIFIER, 3 * ETHER)
    local.anvil.rpc("evm_increaseTime", 100)
    local.mine()
    await payer.stake(1 * ETHER)
    await payer.register(SCHEDULER, "12D3KooWb", keccak256(b"tls2"), "127.0.0.1:7001")
    await follower.sync()
    assert view.nodes[me] == await node_on_chain(chain, me)
    registry, checksummed = chain.registry.functions, chain.w3.to_checksum_address(me)
    await payer.sender.send("unbond", registry.beginUnbond(checksummed, 4 * ETHER))
    await follower.sync()
    assert view.nodes[me] == await node_on_chain(chain, me)
    assert (view.nodes[me].stake, view.nodes[me].unbonding, view.nodes[me].staked_since) == (0, 4 * ETHER, 0)
    local.anvil.rpc("evm_increaseTime", 100)
    local.mine()
    await payer.sender.send("withdraw stake", registry.withdraw(checksummed))
    await payer.deregister()
    await follower.sync()
    assert view.nodes[me] == await node_on_chain(chain, me)
    assert view.nodes[me].roles == 0


async def test_follower_started_late_rebuilds_the_same_view(chain: Chain, payer: Actions) -> None:
    view, follower = await followed(chain)
    await payer.open_channel(PAYEE.address, 7, FAR)
    await follower.sync()
    late, _ = await followed(chain)
    assert (late.channels, late.nodes, late.block) == (view.channels, view.nodes, view.block)


async def test_follower_stays_behind_by_the_confirmations(local: LocalChain, payer: Actions) -> None:
    deep = await local.connect(confirmations=3)
    view, follower = await followed(deep)
    receipt = await payer.sender.send("open", payer.chain.channels.functions.open(*opening(payer), 9, FAR))
    for missing in (3, 2, 1):
        await follower.sync()
        assert view.block == receipt.block - missing
        local.mine()
    await follower.sync()
    assert view.block == receipt.block
    assert any(c.deposit == 9 for c in view.channels.values())
    await deep.close()


def opening(payer: Actions) -> tuple[str, str]:
    w3 = payer.chain.w3
    return w3.to_checksum_address(PAYEE.address), w3.to_checksum_address(PAYER.address)


async def test_follower_reorganisation_takes_back_what_is_gone(local: LocalChain, chain: Chain, payer: Actions) -> None:
    view, follower = await followed(chain)
    events: list[ChainEvent] = []
    view.subscribe(events.append)
    kept = await payer.open_channel(PAYEE.address, 11, FAR)
    await follower.sync()
    before = view.channels[kept]
    await payer.top_up(kept, 4, FAR)
    await follower.sync()
    gone = await payer.open_channel(PAYEE.address, 12, FAR)
    await payer.register(PROVIDER, "12D3KooWc", keccak256(b"t"), "127.0.0.1:1")
    await follower.sync()
    assert view.channels[kept].deposit == 15 and gone in view.channels
    events.clear()
    local.anvil.rpc("anvil_reorg", 3, [])  # the last three blocks become empty ones
    await follower.sync()
    assert follower.rewinds == 1
    assert gone not in view.channels
    assert view.channels[kept] == before == await channel_on_chain(chain, kept)
    assert {ChannelChanged(gone), ChannelChanged(kept), NodeChanged(PAYER.address)} <= set(events)
    assert view.nodes.get(PAYER.address, NodeOnChain(PAYER.address, Address(bytes(20)))).p2p_id != "12D3KooWc"
    fresh, _ = await followed(chain)
    assert (view.channels, view.nodes, view.block) == (fresh.channels, fresh.nodes, fresh.block)


async def test_follower_reorganisation_deeper_than_it_remembers_starts_again(local: LocalChain, chain: Chain, payer: Actions) -> None:
    channel = await payer.open_channel(PAYEE.address, 13, FAR)
    view, follower = await followed(chain)  # its only checkpoint is the head
    assert channel in view.channels
    local.anvil.rpc("anvil_reorg", 1, [])
    await follower.sync()
    assert channel not in view.channels
    fresh, _ = await followed(chain)
    assert (view.channels, view.nodes, view.block) == (fresh.channels, fresh.nodes, fresh.block)


async def test_follower_shorter_chain_takes_back_nothing_until_it_is_another(local: LocalChain, chain: Chain, payer: Actions) -> None:
    view, follower = await followed(chain)
    snapshot = local.anvil.rpc("evm_snapshot")
    channel = await payer.open_channel(PAYEE.address, 14, FAR)
    local.mine(3)
    await follower.sync()
    assert channel in view.channels
    before = view.block
    local.anvil.rpc("evm_revert", snapshot)
    await follower.sync()
    assert (channel in view.channels, view.block, follower.rewinds) == (True, before, 0)  # it knows less, it says nothing else
    local.mine(before - await chain.block_number() + 1)
    await follower.sync()
    assert (channel in view.channels, view.block, follower.rewinds) == (False, before + 1, 1)


async def test_follower_run_publishes_and_ends_when_told(chain: Chain, payer: Actions) -> None:
    view = ChainView()
    seen = asyncio.Event()
    stop = asyncio.Event()
    task = asyncio.create_task(Follower(chain, view).run(stop))
    view.subscribe(lambda event: seen.set() if isinstance(event, ChannelChanged) else None)
    await payer.open_channel(PAYEE.address, 15, FAR)
    await asyncio.wait_for(seen.wait(), 30)
    stop.set()
    await asyncio.wait_for(task, 30)


async def test_follower_error_of_a_subscriber_ends_it(chain: Chain, payer: Actions) -> None:
    view = ChainView()

    def broken(event: ChainEvent) -> None:
        raise RuntimeError("ledger")

    view.subscribe(broken)
    await payer.open_channel(PAYEE.address, 16, FAR)
    with pytest.raises(RuntimeError, match="ledger"):
        await Follower(chain, view).run(asyncio.Event())


# --- connecting ----------------------------------------------------------------------------------------------------------------


async def test_connect_nobody_there_is_unreachable_with_the_way_out(local: LocalChain) -> None:
    settings = ChainSettings(rpc_url="http://127.0.0.1:1", address_book=local.book_file)
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1") as caught:
        await connect(settings)
    assert "testnet up" in caught.value.hint


async def test_connect_without_address_book_is_a_config_error(local: LocalChain, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="address book"):
        await connect(ChainSettings(rpc_url=local.anvil.url, address_book=tmp_path / "none.json"))


@pytest.mark.parametrize("change", [{"chain_id": 1}, {"registry": "0x" + "11" * 20}])
async def test_connect_other_chain_or_contract_is_refused(local: LocalChain, tmp_path: Path, change: dict[str, object]) -> None:
    wrong = json.loads(local.book_file.read_text()) | change
    (tmp_path / "book.json").write_text(json.dumps(wrong))
    with pytest.raises(WrongChain):
        await connect(ChainSettings(rpc_url=local.anvil.url, address_book=tmp_path / "book.json"))


async def test_connect_new_chain_with_an_old_book_is_refused(local: LocalChain) -> None:
    with Anvil.start(block_time=None) as empty, pytest.raises(WrongChain, match="no contract"):
        await connect(ChainSettings(rpc_url=empty.url, address_book=local.book_file))


# --- pure --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ToppedUp", "Redeemed", "CloseRequested", "Closed"])
def test_view_event_of_an_unknown_channel_says_that_history_is_missing(name: str) -> None:
    with pytest.raises(ChainError, match="never opened"):
        channel_after(None, name, {})


def test_view_slash_and_locks_follow_the_contract() -> None:
    node = NodeOnChain(PAYER.address, PAYER.address, PROVIDER, stake=10, unbonding=5, unbonding_at=9, staked_since=3)
    locked = node_after(node, "Locked", {"amount": 12, "locked": 12})
    assert locked is not None and locked.locked == 12
    slashed = node_after(locked, "Slashed", {"amount": 12, "stake": 0, "unbonding": 3, "locked": 0})
    assert slashed is not None
    assert (slashed.stake, slashed.unbonding, slashed.locked, slashed.staked_since, slashed.unbonding_at) == (0, 3, 0, 0, 9)
    with pytest.raises(ChainError, match="never registered"):
        node_after(None, "Locked", {"locked": 1})
    assert node_after(None, "OperatorApproved", {}) is None

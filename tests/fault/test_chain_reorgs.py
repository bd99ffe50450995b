"""Reorganisations of seeded depths, rollbacks, restarts from the view's file: what was derived equals a clean resync from the deployment.

The fast form takes a few seeds, `-m slow` 200. A failing seed is in the test's name: run that test alone to replay it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from reliability import record
from settlement_chain import LocalChain, account, local_chain

from gpumarket.settlement.chain import Chain, ChainView, Follower, connect
from gpumarket.settlement.chain.view_file import ViewFile
from gpumarket.testnet.anvil import Anvil

FAST, ALL = range(8), range(200)
PAYER, PAYEE = account(1), account(2)
FAR = 4_000_000_000
DEPTH_MAX = 40
SEEDS_PER_CHAIN = 20
GAS = hex(1_000_000)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalChain]:
    with local_chain(tmp_path_factory.mktemp("chain")) as running:
        fund(running)
        yield running


def fund(local: LocalChain) -> None:
    """Tokens of the payer, which the contracts may pull."""
    for contract in ("channels", "registry"):
        call(local, "token", "approve", getattr(_chain_of(local), contract).address, 2**256 - 1)
    call(local, "token", "faucet", payer())


_chains: dict[str, Chain] = {}


def _chain_of(local: LocalChain) -> Chain:
    """Contract objects to encode calls with; the connection itself is not used."""
    from web3 import AsyncHTTPProvider, AsyncWeb3

    from gpumarket.contracts.deploy import AddressBook

    if local.anvil.url not in _chains:
        _chains[local.anvil.url] = Chain(AsyncWeb3(AsyncHTTPProvider(local.anvil.url)), AddressBook.load(local.book_file), local.settings())
    return _chains[local.anvil.url]


def payer() -> str:
    from eth_utils.address import to_checksum_address

    return str(to_checksum_address(PAYER.address))


def payee() -> str:
    from eth_utils.address import to_checksum_address

    return str(to_checksum_address(PAYEE.address))


def call(local: LocalChain, contract: str, function: str, *args: Any) -> None:
    """One transaction of the payer, mined at once; one that reverts is mined too."""
    target = getattr(_chain_of(local), contract)
    data = target.encode_abi(function, args=list(args))
    local.anvil.rpc("eth_sendTransaction", {"from": payer(), "to": target.address, "data": data, "gas": GAS})


@dataclass
class History:
    """A random history of one seed."""

    local: LocalChain
    rng: random.Random
    base: int
    nonces: int
    opened: list[bytes] = field(default_factory=list)
    reorgs: int = 0
    deepest: int = 0
    shortened: bool = False

    def act(self) -> None:
        """One call that changes a channel or the node."""
        choice = self.rng.random()
        channel = self.rng.choice(self.opened) if self.opened else None
        if channel is None or choice < 0.3:
            self.open()
        elif choice < 0.55:
            call(self.local, "channels", "topUp", channel, self.rng.randrange(1, 50), FAR)
        elif choice < 0.65:
            call(self.local, "channels", "push", [channel], [self.rng.randrange(1, 40)])
        elif choice < 0.75:
            call(self.local, "channels", "requestClose", channel)
        elif choice < 0.85:
            call(self.local, "registry", "register", self.rng.randrange(1, 8), f"12D3KooW{self.rng.random()}", b"\1" * 32, "127.0.0.1:1")
        elif choice < 0.95:
            call(self.local, "registry", "stake", payer(), self.rng.randrange(1, 1000))
        else:
            call(self.local, "registry", "beginUnbond", payer(), 1)

    def open(self) -> None:
        channels = _chain_of(self.local).channels
        from eth_abi.abi import encode

        from gpumarket.core.terms import keccak256

        self.opened.append(
            keccak256(
                encode(["uint256", "address", "address", "address", "uint256"], [31337, channels.address, payer(), payee(), self.nonces])
            )
        )
        self.nonces += 1
        call(self.local, "channels", "open", payee(), payer(), 100, FAR)

    def head(self) -> int:
        return int(self.local.anvil.rpc("eth_blockNumber"), 16)

    def reorganise(self) -> None:
        """The last blocks become empty ones, or vanish and others take their place."""
        depth = self.rng.randint(1, max(1, min(DEPTH_MAX, self.head() - self.base)))
        if self.head() - self.base < depth:
            return
        self.reorgs += 1
        self.deepest = max(self.deepest, depth)
        if self.rng.random() < 0.7:
            self.local.anvil.rpc("anvil_reorg", depth, [])
        else:
            self.local.anvil.rpc("anvil_rollback", depth)
            self.local.anvil.rpc("evm_increaseTime", 1)  # what follows has other hashes
            self.shortened = True
        self.nonces = self.on_chain_nonces()

    def on_chain_nonces(self) -> int:
        data = _chain_of(self.local).channels.encode_abi("openNonce", args=[payer()])
        return int(self.local.anvil.rpc("eth_call", {"to": _chain_of(self.local).channels.address, "data": data}, "latest"), 16)


async def replay(local: LocalChain, seed: int, folder: Path) -> History:
    rng = random.Random(seed)
    confirmations = rng.randrange(4)
    history = History(local, rng, 0, 0)
    history.base, history.nonces = history.head(), history.on_chain_nonces()
    chain = await local.connect(confirmations=confirmations)
    file = ViewFile(folder / f"view-{seed}.json", chain.book)
    view = ChainView()
    follower = Follower(chain, view, me=PAYEE.address, file=file)
    try:
        for _ in range(rng.randrange(4, 9)):
            for _ in range(rng.randrange(6)):
                history.act()
            local.mine(rng.randrange(1, 4))
            if rng.random() < 0.8:
                await follower.sync()
                assert history.shortened or view.block <= history.head() - confirmations, "k confirmations"
            if rng.random() < 0.7:
                history.reorganise()
            if rng.random() < 0.3:  # a restart
                if rng.random() < 0.5:
                    follower.save()
                view = ChainView()
                follower = Follower(chain, view, me=PAYEE.address, file=file)
        local.mine(max(1, view.block + confirmations + 1 - history.head()))  # past everything that was ever seen
        await follower.sync()
        clean = ChainView()
        await Follower(chain, clean).sync()
        assert view.block == clean.block == history.head() - confirmations
        assert view.channels == clean.channels
        assert view.nodes == clean.nodes
        return history
    finally:
        await chain.close()


@pytest.mark.parametrize("seed", FAST)
async def test_reorgs_derived_state_equals_a_clean_resync(local: LocalChain, tmp_path: Path, seed: int) -> None:
    await replay(local, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1_200)
def test_reorgs_two_hundred_seeds_equal_a_clean_resync(tmp_path: Path) -> None:
    reorgs = deepest = 0
    for start in range(0, len(ALL), SEEDS_PER_CHAIN):
        folder = tmp_path / str(start)
        folder.mkdir()
        with local_chain(folder) as fresh:  # short chains: the clean resync reads all of it each time
            fund(fresh)
            for seed in ALL[start : start + SEEDS_PER_CHAIN]:
                print(f"seed {seed}")
                history = asyncio.run(replay(fresh, seed, tmp_path))
                reorgs, deepest = reorgs + history.reorgs, max(deepest, history.deepest)
    assert reorgs >= len(ALL)
    figure = f"{len(ALL)} seeds, {reorgs} reorganisations, deepest {deepest} blocks: differences from a clean resync 0"
    record("F32", reorgs, figure, "state after == state from a clean resync")


async def test_reorgs_are_undone_from_the_file_after_a_restart(local: LocalChain, tmp_path: Path) -> None:
    chain = await local.connect()
    file = ViewFile(tmp_path / "view.json", chain.book)
    history = History(local, random.Random(1), 0, 0)
    history.nonces = history.on_chain_nonces()
    history.open()
    first = ChainView()
    follower = Follower(chain, first, file=file)
    await follower.sync()
    local.mine()
    history.open()
    await follower.sync()
    follower.save()
    local.anvil.rpc("anvil_reorg", 1, [])  # while nobody was there
    again = ChainView()
    resumed = Follower(chain, again, file=file)
    assert (again.channels, again.block) == (first.channels, first.block)
    await resumed.sync()
    assert (resumed.rewinds, resumed.rereads) == (1, 0)
    assert len(again.channels) == len(first.channels) - 1
    await chain.close()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other contracts"])
async def test_view_file_that_is_not_whole_is_not_used(local: LocalChain, tmp_path: Path, damage: str) -> None:
    chain = await local.connect()
    file = ViewFile(tmp_path / "view.json", chain.book)
    follower = Follower(chain, ChainView(), file=file)
    await follower.sync()
    follower.save()
    path = tmp_path / "view.json"
    whole = path.read_bytes()
    assert file.load() is not None and path.stat().st_mode & 0o777 == 0o600
    if damage == "flip":
        path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    elif damage == "cut":
        path.write_bytes(whole[:-5])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        from dataclasses import replace

        other = replace(chain.book, channels="0x" + "11" * 20)
        assert ViewFile(path, other).load() is None
        await chain.close()
        return
    assert file.load() is None
    view = ChainView()
    await Follower(chain, view, file=file).sync()  # as if there were none
    assert view.block > 0
    await chain.close()


async def test_view_file_of_a_chain_that_was_begun_anew_is_replaced(local: LocalChain, tmp_path: Path) -> None:
    """The same contracts at the same addresses, on a fresh and shorter chain: nothing of the old one stays."""
    chain = await local.connect()
    history = History(local, random.Random(2), 0, 0)
    history.nonces = history.on_chain_nonces()
    history.open()
    local.mine(30)
    view, path = ChainView(), tmp_path / "view.json"
    old = Follower(chain, view, file=ViewFile(path, chain.book))
    await old.sync()
    old.save()
    await chain.close()
    assert view.channels
    folder = tmp_path / "anew"
    folder.mkdir()
    with await asyncio.to_thread(_begun_anew, folder) as anvil:
        settings = local.settings().model_copy(update={"rpc_url": anvil.url})
        again = await connect(settings)  # the same book: chain id, addresses and code are the same
        fresh = ChainView()
        follower = Follower(again, fresh, file=ViewFile(path, again.book))
        assert fresh.channels == view.channels
        await follower.sync()
        assert (fresh.channels, fresh.nodes, follower.rereads) == ({}, {}, 1)
        assert fresh.block == await again.block_number() < view.block
        await again.close()


def _begun_anew(folder: Path) -> Anvil:
    from settlement_chain import _deploy

    anvil = Anvil.start(block_time=None)
    asyncio.run(_deploy(anvil.url)).save(folder / "contracts.json")
    return anvil

"""A local chain with the market's contracts, for the settlement tests: blocks are mined when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eth_account import Account
from sqlalchemy import MetaData
from web3 import AsyncHTTPProvider, AsyncWeb3

from gpumarket.contracts.deploy import AddressBook, deploy
from gpumarket.core.settings import ChainSettings
from gpumarket.core.signing import LocalKey
from gpumarket.settlement.chain import Actions, Chain, Sender, connect, sender_tables
from gpumarket.settlement.guard import guard_table
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.redeemer import redemption_table
from gpumarket.testnet.anvil import DEV_MNEMONIC, Anvil

Account.enable_unaudited_hdwallet_features()
CLOSE_WINDOW_SECONDS = 60
UNBONDING_SECONDS = 60


def account(index: int) -> LocalKey:
    """The mnemonic's account; the first one deploys."""
    return LocalKey(bytes(Account.from_mnemonic(DEV_MNEMONIC, account_path=f"m/44'/60'/0'/0/{index}").key))


@dataclass(frozen=True)
class LocalChain:
    """An anvil that mines each transaction at once, with the contracts on it."""

    anvil: Anvil
    book_file: Path

    def settings(self, *, confirmations: int = 0, poll_seconds: float = 0.02) -> ChainSettings:
        return ChainSettings(
            rpc_url=self.anvil.url, address_book=self.book_file, confirmations=confirmations, poll_seconds=poll_seconds, audit_seconds=0
        )

    async def connect(self, *, confirmations: int = 0) -> Chain:
        return await connect(self.settings(confirmations=confirmations))

    def mine(self, blocks: int = 1) -> None:
        self.anvil.rpc("anvil_mine", hex(blocks))

    def waiting(self) -> int:
        """Transactions in the pool that could be mined."""
        return int(self.anvil.rpc("txpool_status")["pending"], 16)

    def now(self) -> int:
        return int(self.anvil.rpc("eth_getBlockByNumber", "latest", False)["timestamp"], 16)

    @contextmanager
    def mining_stopped(self) -> Iterator[None]:
        """Transactions wait until `mine`."""
        self.anvil.rpc("evm_setAutomine", False)
        try:
            yield
        finally:
            self.anvil.rpc("evm_setAutomine", True)
            self.mine()


class ChainClock:
    """The chain's time, which also runs the monotonic clock."""

    def __init__(self, local: LocalChain) -> None:
        self._local = local

    def now(self) -> int:
        return self._local.now()

    def monotonic(self) -> float:
        return float(self._local.now())


@contextmanager
def local_chain(folder: Path) -> Iterator[LocalChain]:
    with Anvil.start(block_time=None) as anvil:
        book_file = folder / "contracts.json"
        asyncio.run(_deploy(anvil.url)).save(book_file)
        yield LocalChain(anvil, book_file)


async def _deploy(url: str) -> AddressBook:
    w3 = AsyncWeb3(AsyncHTTPProvider(url))
    try:
        deployer = Account.from_key(account(0).secret)
        return await deploy(w3, deployer, unbonding_delay_s=UNBONDING_SECONDS, close_window_s=CLOSE_WINDOW_SECONDS)
    finally:
        await w3.provider.disconnect()


async def until(condition: Callable[[], bool], *tasks: asyncio.Task[Any]) -> None:
    """Wait for something that the test has no event for; a task that fails meanwhile is raised at once."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)
            for task in tasks:
                if task.done():
                    task.result()


def chain_journal(file: Path) -> Journal:
    """An open journal with every table that the chain code uses."""
    metadata = MetaData()
    for add in (sender_tables, guard_table, redemption_table):
        add(metadata)
    journal = Journal(f"sqlite:///{file}", metadata)
    journal.open()
    return journal


async def party(chain: Chain, key: LocalKey, journal: Journal) -> Actions:
    """Actions of a funded account that has approved the contracts."""
    actions = Actions(chain, Sender(chain, key, journal))
    if not await actions.balance():
        await actions.faucet()
    await actions.approve()
    return actions

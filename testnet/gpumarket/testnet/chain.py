"""The chain of a testnet at its beginning: contracts deployed, every role with coin for gas and test tokens.

Set-up transactions go out with their nonces given and are awaited once: one by one they would cost a block each (measured: 1 a second).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpumarket.contracts.artifacts import artifact
from gpumarket.contracts.deploy import AddressBook, deploy
from gpumarket.core.errors import ChainError, TransactionFailed
from gpumarket.core.units import Address, hex0x
from gpumarket.settlement.chain.connection import reachable
from gpumarket.testnet.keys import DEPLOYER_SECRET

GAS_COIN_WEI = 1_000 * 10**18
UNBONDING_SECONDS = 900
"""Short enough to be tried out; a real network takes weeks. Disputes take their durations from it: a third of it to challenge a result."""
CLOSE_WINDOW_SECONDS = 60
_FAUCET_GAS = 100_000
_WAIT_SECONDS = 30.0


async def prepare(rpc_url: str, book_file: Path, funded: Sequence[Address]) -> AddressBook:
    """The contracts' address book: from its file when the chain was up before, else freshly deployed. Whoever has nothing yet is funded.

    Raises Unreachable or ChainError for the node's doing, TransactionFailed for a faucet's.
    """
    from eth_account import Account
    from web3 import AsyncHTTPProvider, AsyncWeb3

    w3: Any = AsyncWeb3(AsyncHTTPProvider(rpc_url))
    try:
        account = Account.from_key(DEPLOYER_SECRET)
        with reachable(rpc_url):
            await asyncio.gather(*(_give_coin(w3, address) for address in funded))
            if book := _known_book(book_file):
                await book.verify(w3)
            else:
                book = await deploy(w3, account, unbonding_delay_s=UNBONDING_SECONDS, close_window_s=CLOSE_WINDOW_SECONDS)
                book.save(book_file)
            await _give_tokens(w3, book, account, funded)
        return book
    finally:
        await w3.provider.disconnect()


def _known_book(file: Path) -> AddressBook | None:
    return AddressBook.load(file) if file.exists() else None


async def _give_coin(w3: Any, address: Address) -> None:
    """Raises ChainError where the node is not anvil."""
    if await w3.eth.get_balance(w3.to_checksum_address(hex0x(address))):
        return
    answer = await w3.provider.make_request("anvil_setBalance", [hex0x(address), hex(GAS_COIN_WEI)])
    if "error" in answer:
        raise ChainError(f"no coin for {hex0x(address)}: {answer['error']}", hint="a testnet's chain is anvil: start one")


async def _give_tokens(w3: Any, book: AddressBook, account: Any, addresses: Sequence[Address]) -> None:
    """One faucet call for each address that has no token. Raises TransactionFailed."""
    token = w3.eth.contract(address=w3.to_checksum_address(book.token), abi=artifact("MarketToken").abi)
    checksummed = [w3.to_checksum_address(hex0x(address)) for address in addresses]
    balances = await asyncio.gather(*(token.functions.balanceOf(address).call() for address in checksummed))
    nonce = await w3.eth.get_transaction_count(account.address)
    price = 2 * await w3.eth.gas_price
    hashes = []
    for offset, address in enumerate(a for a, balance in zip(checksummed, balances, strict=True) if not balance):
        call = token.functions.faucet(address)
        fields = {"nonce": nonce + offset, "gas": _FAUCET_GAS, "gasPrice": price, "chainId": book.chain_id}
        raw = account.sign_transaction({**await call.build_transaction(fields), "from": account.address}).raw_transaction
        hashes.append(await w3.eth.send_raw_transaction(raw))
    for tx in hashes:
        receipt = await w3.eth.wait_for_transaction_receipt(tx, timeout=_WAIT_SECONDS, poll_latency=0.1)
        if receipt["status"] != 1:
            raise TransactionFailed(f"the faucet refused: transaction {tx.to_0x_hex()}", hint="start over in a fresh --dir")

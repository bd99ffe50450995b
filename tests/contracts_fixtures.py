"""A deployed market on a local chain that mines at once, and the few calls that tests of the contracts make of it.

Use it by importing `contracts_chain` (a module-scoped fixture) in the test file. Everything is synchronous: the contracts are what is
tested here, not our way of talking to them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data
from eth_account.signers.local import LocalAccount
from web3 import AsyncHTTPProvider, AsyncWeb3, HTTPProvider, Web3
from web3.exceptions import ContractCustomError, Web3RPCError

from gpumarket.contracts.artifacts import CONTRACT_NAMES, artifact
from gpumarket.contracts.deploy import AddressBook, deploy
from gpumarket.testnet.anvil import DEV_MNEMONIC, Anvil

UNBONDING_SECONDS = 3600
CLOSE_WINDOW_SECONDS = 600
FAR = 2**39
"""An expiry that no test reaches."""
ONE = 10**18
_GAS = 20_000_000
_GAS_PRICE = 10**10

Account.enable_unaudited_hdwallet_features()


@dataclass(frozen=True)
class StandIn:
    """A contract's address for which the chain lets tests send: what the contract may do can be tried without leading it there."""

    address: str


@dataclass
class Chain:
    """Everything a test needs: connection, contracts, accounts by name."""

    anvil: Anvil
    w3: Web3
    book: AddressBook
    token: Any
    registry: Any
    channels: Any
    accounts: list[LocalAccount]
    disputes: StandIn
    _errors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def send(self, call: Any, sender: LocalAccount | StandIn) -> Any:
        """Send a contract call and return its receipt; fails the test when it reverts."""
        options = {"from": sender.address, "gas": _GAS, "gasPrice": _GAS_PRICE}  # given, so that nothing is estimated first
        receipt = self.w3.eth.wait_for_transaction_receipt(call.transact(options), poll_latency=0.002)
        assert receipt["status"] == 1, "the call reverted"
        return receipt

    def refused(self, call: Any, sender: LocalAccount | StandIn) -> tuple[str, tuple[Any, ...]]:
        """(error name, arguments) with which the call reverts; fails the test when it does not revert with a custom error."""
        with pytest.raises((ContractCustomError, Web3RPCError)) as caught:
            call.call({"from": sender.address})
        return self.decode_error(caught.value)

    def decode_error(self, error: Exception) -> tuple[str, tuple[Any, ...]]:
        """Name and arguments of a custom error."""
        data = str(getattr(error, "data", "") or error)
        found = re.search(r"0x[0-9a-fA-F]{8,}", data)
        assert found, f"no custom error in {error!r}"
        entry = self.error_entries()[found[0][:10]]
        types = [item["type"] for item in entry["inputs"]]
        return entry["name"], tuple(self.w3.codec.decode(types, bytes.fromhex(found[0][10:])))

    def error_entries(self) -> dict[str, dict[str, Any]]:
        """Every custom error of our contracts by its selector."""
        if not self._errors:
            for name in CONTRACT_NAMES:
                for entry in artifact(name).abi:
                    if entry["type"] == "error":
                        self._errors[selector(entry)] = entry
        return self._errors

    def events(self, contract: Any, name: str, receipt: Any) -> list[dict[str, Any]]:
        """Arguments of each event of that name in a receipt."""
        with_address = [log for log in receipt["logs"] if log["address"] == contract.address]
        topic = Web3.keccak(text=signature(next(e for e in contract.abi if e["type"] == "event" and e["name"] == name)))
        return [dict(contract.events[name]().process_log(log)["args"]) for log in with_address if log["topics"][0] == topic]

    def pass_time(self, seconds: int) -> None:
        """Move the chain's clock and mine."""
        self.anvil.rpc("evm_increaseTime", seconds)
        self.anvil.rpc("evm_mine")

    def now(self) -> int:
        """Timestamp of the latest block."""
        return int(self.w3.eth.get_block("latest")["timestamp"])

    def rich(self, account: LocalAccount) -> LocalAccount:
        """Give an account test tokens, and both contracts its allowance."""
        self.send(self.token.functions.faucet(account.address), self.accounts[0])
        for spender in (self.registry, self.channels):
            self.send(self.token.functions.approve(spender.address, 2**256 - 1), account)
        return account

    def stranger(self) -> LocalAccount:
        """A fresh account that can send transactions."""
        return self.adopt(Account.create())

    def adopt(self, account: LocalAccount) -> LocalAccount:
        """Give an account coin for gas, and have the chain sign for it."""
        self.let_send(account.address)
        return account

    def let_send(self, address: str) -> None:
        """Have the chain take transactions from any address, a contract's too."""
        self.anvil.rpc("anvil_setBalance", address, hex(10**20))
        self.anvil.rpc("anvil_impersonateAccount", address)

    def balance(self, who: str) -> int:
        """Tokens of an address."""
        return int(self.token.functions.balanceOf(who).call())

    def voucher(self, signer: LocalAccount, channel: bytes, cumulative: int, *, kind: str = "Voucher", **domain: Any) -> bytes:
        """65-byte signature by eth-account, which knows nothing of our own signing."""
        return bytes(signer.sign_message(self.typed(kind, channel, cumulative, **domain)).signature)

    def typed(self, kind: str, channel: bytes, cumulative: int, **domain: Any) -> Any:
        """The EIP-712 message; `domain` overrides its domain."""
        base = {
            "name": "gpumarket PaymentChannels",
            "version": "1",
            "chainId": self.book.chain_id,
            "verifyingContract": self.channels.address,
        }
        types = {kind: [{"name": "channel", "type": "bytes32"}, {"name": "cumulative", "type": "uint96"}]}
        return encode_typed_data({**base, **domain}, types, {"channel": channel, "cumulative": cumulative})

    def open(self, payer: LocalAccount, payee: str, amount: int, *, signer: LocalAccount | None = None, expires: int = FAR) -> bytes:
        """Open a channel and return its id."""
        call = self.channels.functions.open(payee, (signer or payer).address, amount, expires)
        receipt = self.send(call, payer)
        return bytes(self.events(self.channels, "Opened", receipt)[0]["id"])


def compact(signature_: bytes) -> tuple[bytes, bytes]:
    """EIP-2098: (r, vs)."""
    r, s, v = signature_[:32], int.from_bytes(signature_[32:64], "big"), signature_[64]
    return r, (s | (v - 27) << 255).to_bytes(32, "big")


def signature(entry: dict[str, Any]) -> str:
    """name(type,…) of an ABI entry without tuples."""
    return f"{entry['name']}({','.join(item['type'] for item in entry['inputs'])})"


def selector(entry: dict[str, Any]) -> str:
    """First four bytes of an error's hash, 0x text."""
    return "0x" + Web3.keccak(text=signature(entry))[:4].hex()


async def _deploy(url: str, account: LocalAccount) -> AddressBook:
    w3 = AsyncWeb3(AsyncHTTPProvider(url))
    try:
        return await deploy(w3, account, unbonding_delay_s=UNBONDING_SECONDS, close_window_s=CLOSE_WINDOW_SECONDS)
    finally:
        await w3.provider.disconnect()


@pytest.fixture(scope="module")
def contracts_chain() -> Iterator[Chain]:
    """See `market_chain`."""
    with market_chain() as chain:
        yield chain


@contextmanager
def market_chain() -> Iterator[Chain]:
    """A chain that mines each transaction at once, with the contracts deployed; accounts[1..4] hold tokens."""
    accounts = [Account.from_mnemonic(DEV_MNEMONIC, account_path=f"m/44'/60'/0'/0/{i}") for i in range(10)]
    with Anvil.start(block_time=None) as anvil:
        book = asyncio.run(_deploy(anvil.url, accounts[0]))
        w3 = Web3(HTTPProvider(anvil.url))
        at = {name: w3.eth.contract(address=w3.to_checksum_address(address), abi=artifact(name).abi) for name, address in _addresses(book)}
        chain = Chain(anvil, w3, book, at["MarketToken"], at["StakeRegistry"], at["PaymentChannels"], accounts, StandIn(book.disputes))
        chain.let_send(book.disputes)
        for account in accounts[1:5]:
            chain.rich(account)
        yield chain


def _addresses(book: AddressBook) -> list[tuple[str, str]]:
    return [("MarketToken", book.token), ("StakeRegistry", book.registry), ("PaymentChannels", book.channels)]

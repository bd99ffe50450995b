"""Deployment of the market's contracts, and the address book by which everyone else finds and checks them.

Invariant: a book that passes `verify` names, on the chain at hand, this version's contracts, with the very code, constructor arguments
included, that was there when the book was written. A book is trusted like a setting: take it from who deployed, not from a peer.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from gpumarket.contracts.artifacts import Artifact, artifact
from gpumarket.contracts.dispute_terms import DisputeTerms
from gpumarket.core.errors import ConfigError, TransactionFailed, WrongChain
from gpumarket.core.terms import keccak256

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount
    from eth_typing import ChecksumAddress
    from web3 import AsyncWeb3

ZERO_ADDRESS: Final = "0x" + "00" * 20
TEST_CHAIN_ID: Final = 31337
"""The only chain on which MarketToken exists; elsewhere an existing ERC-20 is named."""
RECEIPT_SECONDS: Final = 60.0
_POLL_SECONDS = 0.1
_CONTRACT_OF: Final = {"token": "MarketToken", "registry": "StakeRegistry", "channels": "PaymentChannels", "disputes": "Disputes"}
_GAS_BASE = 300_000
_GAS_PER_BYTE = 240
"""Creation costs 200 gas a byte of code, and its calldata at most 16 (EIP-2028) plus init code words (EIP-3860)."""


@dataclass(frozen=True)
class AddressBook:
    """Where the market's contracts are on one chain."""

    chain_id: int
    token: str
    """ERC-20 of stake and channels; checksummed 0x text, like the next three."""
    registry: str
    channels: str
    disputes: str
    """Who alone can slash in the registry; the zero address where nobody can."""
    deployed_block: int
    """First block that can hold an event of these contracts: where a follower begins."""
    code_hashes: Mapping[str, str]
    """keccak256 of the runtime code by field name (token, registry, channels, disputes), 0x text."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a book. Raises ConfigError when it is missing or not a book."""
        try:
            document = json.loads(path.read_text("utf-8"))
        except FileNotFoundError as error:
            hint = "gpumarket testnet up writes one; or give the deployer's with GPUMARKET_CHAIN_ADDRESS_BOOK"
            raise ConfigError(f"there is no address book at {path}", hint=hint) from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the address book {path}: {error}", hint="fetch it again from who deployed") from error
        if problem := _problem(document):
            raise ConfigError(f"{path} is not an address book: {problem}", hint="fetch it again from who deployed")
        return cls(**document)

    def save(self, path: Path) -> None:
        """Write it atomically: readers see the old book or the new one, never half of one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({**asdict(self), "code_hashes": dict(self.code_hashes)}, file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    async def verify(self, w3: AsyncWeb3[Any]) -> None:
        """Check chain id and code. Raises WrongChain naming the first difference; transport errors are the provider's own."""
        chain_id = await w3.eth.chain_id
        if chain_id != self.chain_id:
            why = f"the node is on chain {chain_id}, the address book is of chain {self.chain_id}"
            raise WrongChain(why, hint="point GPUMARKET_CHAIN_RPC_URL and GPUMARKET_CHAIN_ADDRESS_BOOK at the same network")
        for field, name in _CONTRACT_OF.items():
            address: str = getattr(self, field)
            if field == "disputes" and address == ZERO_ADDRESS:
                continue  # a registry in which nobody can slash; its own code hash says so
            code = bytes(await w3.eth.get_code(w3.to_checksum_address(address)))
            ours = field != "token" or self.chain_id == TEST_CHAIN_ID
            _check_code(f"{field} {address}", code, self.code_hashes[field], artifact(name) if ours else None)


@dataclass(frozen=True)
class EntryLimits:
    """What the contracts refuse to take in, fixed at deployment; 0 and the zero address mean none. Nothing here touches a way out."""

    guardian: str = ZERO_ADDRESS
    """Who may pause entry: opening, topping up, staking. It can do nothing else, and nobody can replace it."""
    channel_max: int = 0
    """Most base units that one channel may hold unclaimed."""
    channels_total_max: int = 0
    """Most base units that PaymentChannels may hold."""
    stake_max: int = 0
    """Most base units that one node may hold, bonded and unbonding."""
    stakes_total_max: int = 0
    """Most base units that StakeRegistry may hold."""


NO_LIMITS: Final = EntryLimits()
"""Whoever comes in may bring anything. For test networks; elsewhere it has to be asked for by name."""


async def deploy(
    w3: AsyncWeb3[Any],
    account: LocalAccount,
    *,
    unbonding_delay_s: int,
    close_window_s: int,
    disputes: DisputeTerms | None = None,
    without_disputes: bool = False,
    token: str | None = None,
    limits: EntryLimits | None = None,
) -> AddressBook:
    """Deploy registry, channels and disputes, and a MarketToken unless `token` names an ERC-20 that exists.

    `disputes` are the terms of Disputes, by default those that fit the unbonding delay; `without_disputes` deploys a registry in which
    nobody can slash. `limits` must be given where the tokens are worth something: they cannot be set later. Registry and Disputes name each
    other: the latter's address follows from account and nonce before it exists.

    All transactions are sent with their nonces given and awaited once: one block in all. Raises ConfigError when a MarketToken, or no
    limits, are asked for on a chain that is not a test network, TransactionFailed when a constructor refuses.
    """
    chain_id = await w3.eth.chain_id
    if token is None and chain_id != TEST_CHAIN_ID:
        raise ConfigError(f"MarketToken is play money and never goes to chain {chain_id}", hint="name an existing ERC-20 as token")
    if limits is None and chain_id != TEST_CHAIN_ID:
        raise ConfigError(
            f"on chain {chain_id} say how much may come in at launch: the contracts' limits are fixed when they are deployed",
            hint="give limits=EntryLimits(guardian=..., channel_max=..., ...), or NO_LIMITS",
        )
    limits = limits or NO_LIMITS
    guardian = w3.to_checksum_address(limits.guardian)
    stakes = (guardian, limits.stake_max, limits.stakes_total_max)
    channels_limits = (guardian, limits.channel_max, limits.channels_total_max)
    deployer = await _Deployer.begin(w3, account, chain_id)
    money = w3.to_checksum_address(token) if token else await deployer.create("MarketToken")
    judge = w3.to_checksum_address(ZERO_ADDRESS) if without_disputes else deployer.address_after(2)
    registry = await deployer.create("StakeRegistry", money, judge, unbonding_delay_s, *stakes)
    channels = await deployer.create("PaymentChannels", money, close_window_s, *channels_limits)
    if not without_disputes:
        fitting = DisputeTerms.for_test_network if chain_id == TEST_CHAIN_ID else DisputeTerms.scaled
        await deployer.create("Disputes", registry, (disputes or fitting(unbonding_delay_s)).words())
    block = await deployer.finish()
    hashes = {
        field: "0x" + keccak256(bytes(await w3.eth.get_code(address))).hex()
        for field, address in (("token", money), ("registry", registry), ("channels", channels), ("disputes", judge))
    }
    book = AddressBook(chain_id, money, registry, channels, judge, block, hashes)
    await book.verify(w3)
    return book


class _Deployer:
    """Creations in flight: addresses follow from account and nonce, so nothing waits for a receipt in between."""

    def __init__(self, w3: AsyncWeb3[Any], account: LocalAccount, chain_id: int, nonce: int, fee: int) -> None:
        self._w3, self._account, self._chain_id, self._nonce, self._fee = w3, account, chain_id, nonce, fee
        self._sent: list[tuple[str, Any]] = []

    @classmethod
    async def begin(cls, w3: AsyncWeb3[Any], account: LocalAccount, chain_id: int) -> Self:
        nonce = await w3.eth.get_transaction_count(account.address, "pending")
        return cls(w3, account, chain_id, nonce, 2 * await w3.eth.gas_price)

    async def create(self, name: str, *arguments: object) -> ChecksumAddress:
        compiled = artifact(name)
        constructor = self._w3.eth.contract(abi=compiled.abi, bytecode=compiled.bytecode).constructor(*arguments)
        data = bytes.fromhex(constructor.data_in_transaction.removeprefix("0x"))
        transaction: dict[str, Any] = {
            "chainId": self._chain_id,
            "nonce": self._nonce,
            "gas": _GAS_BASE + _GAS_PER_BYTE * len(data),
            "gasPrice": self._fee,
            "value": 0,
            "data": data,
        }
        signed = self._account.sign_transaction(transaction)
        self._sent.append((name, await self._w3.eth.send_raw_transaction(signed.raw_transaction)))
        address = self.address_after(0)
        self._nonce += 1
        return address

    def address_after(self, creations: int) -> ChecksumAddress:
        """Where the contract will be that is created after that many others from here."""
        from eth_utils.address import to_checksum_address

        return to_checksum_address(_create_address(bytes.fromhex(self._account.address[2:]), self._nonce + creations))

    async def finish(self) -> int:
        """Wait for all; the number of the first block."""
        blocks = []
        for name, sent in self._sent:
            receipt = await self._w3.eth.wait_for_transaction_receipt(sent, timeout=RECEIPT_SECONDS, poll_latency=_POLL_SECONDS)
            if receipt["status"] != 1:
                raise TransactionFailed(
                    f"the constructor of {name} reverted in transaction 0x{bytes(sent).hex()}", hint="check its arguments"
                )
            blocks.append(int(receipt["blockNumber"]))
        return min(blocks)


def _create_address(sender: bytes, nonce: int) -> bytes:
    """Address of the contract that `sender` creates: the last 20 bytes of keccak256(rlp([sender, nonce])) (yellow paper, section 7)."""
    number = nonce.to_bytes((nonce.bit_length() + 7) // 8, "big")
    item = number if len(number) == 1 and number[0] < 0x80 else bytes([0x80 + len(number)]) + number
    payload = bytes([0x80 + 20]) + sender + item
    return keccak256(bytes([0xC0 + len(payload)]) + payload)[12:]


def _check_code(what: str, code: bytes, expected: str, compiled: Artifact | None) -> None:
    hint = "another network runs at this address, or the chain began anew: use the address book of this network"
    if not code:
        raise WrongChain(f"there is no contract at {what}", hint=hint)
    if "0x" + keccak256(code).hex() != expected:
        raise WrongChain(f"the code at {what} is not the code that was deployed there", hint=hint)
    if compiled is not None and not compiled.matches(code):
        why = f"the code at {what} is not this version's {compiled.name}"
        raise WrongChain(why, hint="install the gpumarket version that this network was deployed with")


def _problem(document: object) -> str:
    """What keeps a JSON document from being a book; empty when nothing does."""
    if not isinstance(document, dict):
        return "it holds no object"
    expected = {field.name for field in fields(AddressBook)}
    if document.keys() != expected:
        return f"fields {_names(document.keys() ^ expected)} are missing or unknown"
    integers, texts = ("chain_id", "deployed_block"), ("token", "registry", "channels", "disputes")
    if any(not isinstance(document[name], int) or isinstance(document[name], bool) or document[name] < 0 for name in integers):
        return f"{_names(integers)} must be integers"
    if any(not _is_hex(document[name], 20) for name in texts):
        return f"{_names(texts)} must be addresses"
    hashes = document["code_hashes"]
    if not isinstance(hashes, dict) or hashes.keys() != set(texts) or any(not _is_hex(value, 32) for value in hashes.values()):
        return f"code_hashes must hold a hash for each of {_names(texts)}"
    return ""


def _names(names: Sequence[str] | set[str]) -> str:
    return ", ".join(sorted(names))


def _is_hex(value: object, size: int) -> bool:
    if not isinstance(value, str) or not value.startswith("0x") or len(value) != 2 + 2 * size:
        return False
    return all(character in "0123456789abcdefABCDEF" for character in value[2:])

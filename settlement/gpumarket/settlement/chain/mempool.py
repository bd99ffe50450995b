"""What the sender asks of a node: counts, receipts, estimates, and to take signed bytes. No state of its own.

A refusal counts only when the node names a reason that lies in the transaction itself and does not hold the bytes: everything else (an
overloaded pool, an internal error, no answer) leaves open whether they are out there, and then they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import structlog

from gpumarket.core.errors import InconsistentChain, TransactionFailed
from gpumarket.core.units import Address, Hash
from gpumarket.settlement.chain.connection import Chain
from gpumarket.settlement.chain.outbox import Outgoing
from gpumarket.settlement.chain.reverts import revert_text

GAS_MAX = 10_000_000
"""No call of this market comes near it."""
_IN_POOL = ("already known", "already imported", "known transaction", "nonce too low")
_REFUSED = (
    "insufficient funds",
    "intrinsic gas",
    "gas limit",
    "gas too high",
    "underpriced",
    "less than block base fee",
    "fee cap",
    "invalid sender",
    "invalid signature",
    "chain id",
    "oversized",
    "not supported",
)
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class TransactionReceipt:
    """A mined transaction that did not revert. `logs` are web3 log receipts; `block_hash` is what a confirmation compares."""

    tx_hash: Hash
    gas_used: int
    block: int
    block_hash: bytes
    logs: tuple[Any, ...]


class Mempool:
    """A node as one account sees it. Transport errors are the provider's own: call it inside `reachable`."""

    def __init__(self, chain: Chain, address: Address) -> None:
        self._chain, self._address = chain, chain.w3.to_checksum_address(address)

    async def count(self, block: str | int) -> int:
        """Transactions of the account as of "latest", "pending" or a block's number."""
        return int(await self._chain.w3.eth.get_transaction_count(self._address, block))  # type: ignore[arg-type]

    async def receipt(self, tx_hash: Hash) -> Any | None:
        """The receipt, or None while there is none. Raises InconsistentChain when it is another transaction's."""
        from web3.exceptions import TransactionNotFound

        try:
            found = await self._chain.w3.eth.get_transaction_receipt(tx_hash)  # type: ignore[arg-type]
        except TransactionNotFound:
            return None
        if bytes(found["transactionHash"]) != tx_hash:
            raise InconsistentChain(f"asked for the receipt of 0x{tx_hash.hex()}, the node gives that of another transaction")
        return found

    async def check_receipt(self, transaction: Outgoing, found: Any) -> None:
        """Raises InconsistentChain unless the receipt can be this transaction's: from whom, to whom, within its gas, in a block that is on
        the chain."""
        block = await self._chain.w3.eth.get_block(found["blockNumber"])
        to = self._chain.w3.to_checksum_address(transaction.recipient)
        told = (found["from"], found["to"], bytes(found["blockHash"]))
        if told != (self._address, to, bytes(block["hash"])) or not 0 < int(found["gasUsed"]) <= transaction.gas:
            raise InconsistentChain(f"the node's receipt of {transaction.label} does not fit the transaction or the chain")

    async def offer(self, transaction: Outgoing) -> None:
        """Give the node signed bytes for the first time. Raises TransactionFailed when it refuses them and does not hold them; in every
        other case they may be out there, and this returns."""
        reason = await self._give(transaction)
        if not reason or not any(part in reason.lower() for part in _REFUSED) or await self._may_hold(transaction.tx_hash):
            return
        raise TransactionFailed(f"{transaction.label}: the node refuses it: {reason}", hint="check the account's gas money")

    async def broadcast(self, transaction: Outgoing) -> None:
        """Give the node bytes that it, or another one, may have seen before. What it answers changes nothing."""
        await self._give(transaction)

    async def estimate(self, label: str, to: str, data: Any) -> int:
        """Gas of a call. Raises TransactionFailed with the contract's named error when it would revert, InconsistentChain when absurd."""
        from web3.exceptions import ContractLogicError

        try:
            gas = int(await self._chain.w3.eth.estimate_gas({"from": self._address, "to": to, "data": data}))
        except ContractLogicError as error:
            raise TransactionFailed(f"{label} would revert: {_why(error)}") from error
        if not 0 < gas <= GAS_MAX:
            raise InconsistentChain(f"the node estimates {gas} gas for {label}, at most {GAS_MAX} are plausible")
        return gas

    async def why_reverted(self, transaction: Outgoing, block: int) -> str:
        """The reason, from the same call on the state before the block (the nearest that a node without traces gives)."""
        from web3.exceptions import ContractLogicError

        call: Any = {
            "from": self._address,
            "to": self._chain.w3.to_checksum_address(transaction.recipient),
            "data": transaction.data,
            "gas": transaction.gas,
        }
        try:
            await self._chain.w3.eth.call(call, block - 1)
        except ContractLogicError as error:
            return _why(error)
        return "another transaction of the same block came first, or the gas was short"

    async def _give(self, transaction: Outgoing) -> str:
        """Why the node did not take it; empty when it did, or has it already."""
        from aiohttp import ClientError
        from web3.exceptions import BadResponseFormat, Web3RPCError

        try:
            await self._chain.w3.eth.send_raw_transaction(transaction.raw)
        except Web3RPCError as error:
            return "" if any(part in error.message.lower() for part in _IN_POOL) else error.message
        except (ClientError, OSError, TimeoutError, BadResponseFormat) as error:
            _log.warning("broadcast_failed", label=transaction.label, reason=str(error) or type(error).__name__)
        return ""

    async def _may_hold(self, tx_hash: Hash) -> bool:
        from aiohttp import ClientError
        from web3.exceptions import TransactionNotFound, Web3Exception

        try:
            await self._chain.w3.eth.get_transaction(tx_hash)  # type: ignore[arg-type]
        except TransactionNotFound:
            return False
        except (ClientError, OSError, TimeoutError, Web3Exception) as error:
            _log.warning("lookup_failed", reason=str(error) or type(error).__name__)
        return True


def mined_receipt(found: Any) -> TransactionReceipt:
    """A node's receipt, as it answers it."""
    return TransactionReceipt(
        Hash(bytes(found["transactionHash"])),
        int(found["gasUsed"]),
        int(found["blockNumber"]),
        bytes(found["blockHash"]),
        tuple(found["logs"]),
    )


def _why(error: Any) -> str:
    """A web3 revert as text: our named error where the data tells it, else the node's words."""
    data = getattr(error, "data", None)
    return revert_text(data) if data not in (None, "", "0x") else str(getattr(error, "message", error))

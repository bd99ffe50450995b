"""Sends transactions of one key and owns their nonces.

Nonce and signed bytes are committed to the journal before the first broadcast (I2), so a restart sends the same transaction again and
never a second one in its place. A transaction that is not mined in time is replaced at the same nonce with a fee 12.5 % higher; one that
the chain has forgotten (a restarted node, a reorganisation) is sent again. What the node refuses outright gives its nonce back.
Never: two different calls at one nonce, a nonce that is not in the journal.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog

from gpumarket.core.errors import ChainError, TransactionFailed
from gpumarket.core.signing import LocalKey
from gpumarket.core.units import Hash, hex0x
from gpumarket.settlement.chain import outbox
from gpumarket.settlement.chain.connection import Chain, reachable
from gpumarket.settlement.chain.outbox import DROPPED, FAILED, MINED, PENDING, Outgoing, sender_tables
from gpumarket.settlement.chain.reverts import revert_text
from gpumarket.settlement.journal import Journal

__all__ = ["Sender", "TransactionReceipt", "sender_tables"]
GAS_MARGIN = 5, 4
"""A gas limit is the estimate times this."""
_KNOWN_ALREADY = ("already known", "already imported", "known transaction")
_SPENT = ("nonce too low",)
SPENT_LOOKS = 4
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class TransactionReceipt:
    """A mined transaction that did not revert. `logs` are web3 log receipts; `block_hash` is what a confirmation compares."""

    tx_hash: Hash
    gas_used: int
    block: int
    block_hash: bytes
    logs: tuple[Any, ...]


class Sender:
    """One per key and process. `stuck_seconds`: when to raise the fee; `patience_seconds`: when to give up waiting (the transaction stays
    in the journal and is taken up again at the next start)."""

    def __init__(
        self, chain: Chain, key: LocalKey, journal: Journal, *, stuck_seconds: float = 30.0, patience_seconds: float = 300.0
    ) -> None:
        self.address = key.address
        self._chain, self._key, self._journal = chain, key, journal
        self._stuck_seconds, self._patience_seconds = stuck_seconds, patience_seconds
        self._lock = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._resumed = False

    async def send(self, label: str, call: Any, *, gas: int | None = None, once: bool = False) -> TransactionReceipt:
        """Send one contract call and wait until it is mined.

        `label` says what it is, in the journal and in errors. With `once`, a call whose label was sent before (also by an earlier process)
        is not sent a second time: its own receipt is waited for. Raises TransactionFailed with the contract's named error, Unreachable, or
        ChainError when it is still not mined after `patience_seconds`.
        """
        if once:
            known = self._journal.read(partial(outbox.labelled, label=label))
            if known is not None:
                await self.resume()
                return await self._wait(known)
        (receipt,) = await self.send_all([(label, call, gas)])
        return receipt

    async def send_all(self, items: Sequence[tuple[str, Any, int | None]]) -> list[TransactionReceipt]:
        """Send several calls (label, call, gas limit or None) with consecutive nonces, then wait for all. A call that depends on an
        earlier one of the list needs its gas limit given: it cannot be estimated before that one is mined."""
        async with self._lock:
            with reachable(self._chain.settings.rpc_url):
                await self._resume()
                drafts = [await self._draft(*item) for item in items]
                nonce = await self._next_nonce()
                signed = [self._sign(replace(draft, nonce=nonce + i)) for i, draft in enumerate(drafts)]
            stored = await self._journal.transact(lambda c: [outbox.add(c, transaction) for transaction in signed])
            for position, transaction in enumerate(stored):
                try:
                    await self._broadcast(transaction)
                except TransactionFailed:
                    unsent = stored[position:]
                    await self._journal.transact(partial(outbox.drop, transactions=unsent))
                    raise
        return [await self._wait(transaction) for transaction in stored]

    async def resume(self) -> None:
        """Broadcast again what an earlier process left pending, and see it through in the background. The first send does it too."""
        async with self._lock:
            with reachable(self._chain.settings.rpc_url):
                await self._resume()

    async def confirmed(self, receipt: TransactionReceipt) -> TransactionReceipt:
        """Wait until the transaction has the chain settings' confirmations; sent again when a reorganisation dropped it. Returns its
        receipt as it is then."""
        while True:
            if await self._chain.block_number() >= receipt.block + self._chain.settings.confirmations:
                found = await self._receipt(receipt.tx_hash)
                if found is not None and bytes(found["blockHash"]) == receipt.block_hash:
                    return receipt
                if found is None:
                    await self._send_again(receipt.tx_hash)
                else:
                    receipt = _mined(found)
            await asyncio.sleep(self._chain.settings.poll_seconds)

    async def close(self) -> None:
        """Stop waiting in the background; what is pending stays in the journal."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    # --- making ------------------------------------------------------------------------------------------------------------

    async def _draft(self, label: str, call: Any, gas: int | None) -> Outgoing:
        """An unsigned transaction, its gas estimated (which is where most reverts show) and its fee at twice the base fee."""
        head = await self._chain.w3.eth.get_block("latest")
        priority = int(await self._chain.w3.eth.max_priority_fee)
        max_fee = 2 * int(head.get("baseFeePerGas", 0)) + priority
        fields = {"from": self._hex_address(), "gas": 1, "maxFeePerGas": max_fee, "maxPriorityFeePerGas": priority, "nonce": 0, "value": 0}
        built = await call.build_transaction({**fields, "chainId": self._chain.book.chain_id})
        recipient, data = bytes.fromhex(built["to"][2:]), _bytes(built["data"])
        if gas is None:
            estimate = await self._estimate(label, built["to"], built["data"])
            gas = estimate * GAS_MARGIN[0] // GAS_MARGIN[1]
        return Outgoing(0, 0, label, Hash(b""), b"", recipient, data, gas, max_fee, priority)

    async def _estimate(self, label: str, to: str, data: Any) -> int:
        from web3.exceptions import ContractLogicError

        try:
            return int(await self._chain.w3.eth.estimate_gas({"from": self._hex_address(), "to": to, "data": data}))
        except ContractLogicError as error:
            raise TransactionFailed(f"{label} would revert: {_why(error)}") from error

    def _sign(self, draft: Outgoing) -> Outgoing:
        from eth_account import Account

        fields = {
            "type": 2,
            "chainId": self._chain.book.chain_id,
            "nonce": draft.nonce,
            "to": self._chain.w3.to_checksum_address(draft.recipient),
            "value": 0,
            "data": draft.data,
            "gas": draft.gas,
            "maxFeePerGas": draft.max_fee,
            "maxPriorityFeePerGas": draft.priority_fee,
        }
        signed = Account.sign_transaction(fields, self._key.secret)
        return replace(draft, tx_hash=Hash(bytes(signed.hash)), raw=bytes(signed.raw_transaction))

    async def _next_nonce(self) -> int:
        known = self._journal.read(outbox.next_nonce)
        return max(known, int(await self._chain.w3.eth.get_transaction_count(self._hex_address(), "pending")))  # type: ignore[arg-type]

    # --- sending -----------------------------------------------------------------------------------------------------------

    async def _broadcast(self, transaction: Outgoing) -> None:
        """Give the signed bytes to the node. Raises TransactionFailed when it refuses them for good; an unreachable node is waited for."""
        from aiohttp import ClientError
        from web3.exceptions import Web3RPCError

        try:
            await self._chain.w3.eth.send_raw_transaction(transaction.raw)
        except Web3RPCError as error:
            text = error.message.lower()
            if any(part in text for part in (*_KNOWN_ALREADY, *_SPENT)):
                return
            raise TransactionFailed(
                f"{transaction.label}: the node refuses it: {error.message}", hint="check the account's gas money"
            ) from error
        except (ClientError, OSError, TimeoutError) as error:
            _log.warning("broadcast_failed", label=transaction.label, reason=str(error) or type(error).__name__)

    async def _resume(self) -> None:
        """Once per process: everything pending, and everything mined that a reorganisation took back, goes out again."""
        if self._resumed:
            return
        count = int(await self._chain.w3.eth.get_transaction_count(self._hex_address(), "latest"))  # type: ignore[arg-type]
        again = self._journal.read(lambda c: outbox.in_state(c, PENDING, MINED, FAILED))
        again = [t for t in again if t.state == PENDING or t.nonce >= count]
        for transaction in again:
            await self._broadcast(transaction)
        newest = {transaction.nonce: transaction for transaction in again}
        for transaction in newest.values():
            task = asyncio.get_running_loop().create_task(self._see_through(transaction))
            self._background.add(task)
            task.add_done_callback(self._background.discard)
        self._resumed = True

    async def _see_through(self, transaction: Outgoing) -> None:
        try:
            await self._wait(transaction)
        except ChainError as error:
            _log.warning("earlier_transaction_failed", label=transaction.label, reason=error.message)

    async def _send_again(self, tx_hash: Hash) -> None:
        for transaction in self._journal.read(lambda c: outbox.in_state(c, PENDING, MINED)):
            if transaction.tx_hash == tx_hash:
                await self._broadcast(transaction)

    # --- waiting -----------------------------------------------------------------------------------------------------------

    async def _wait(self, transaction: Outgoing) -> TransactionReceipt:
        started = raised = time.monotonic()
        while time.monotonic() - started < self._patience_seconds:
            with reachable(self._chain.settings.rpc_url):
                receipt = await self._outcome(transaction.nonce, transaction.label)
            if receipt is not None:
                return receipt
            if time.monotonic() - raised >= self._stuck_seconds:
                raised = time.monotonic()
                with reachable(self._chain.settings.rpc_url):
                    await self._raise_fee(transaction.nonce)
            await asyncio.sleep(self._chain.settings.poll_seconds)
        raise ChainError(
            f"{transaction.label} was not mined within {self._patience_seconds:.0f} s ({hex0x(transaction.tx_hash)})",
            hint="it stays in the journal and is taken up again at the next start",
        )

    async def _outcome(self, nonce: int, label: str) -> TransactionReceipt | None:
        """The receipt of whichever transaction at this nonce was mined."""
        spent = int(await self._chain.w3.eth.get_transaction_count(self._hex_address(), "latest")) > nonce  # type: ignore[arg-type]
        for _ in range(SPENT_LOOKS if spent else 1):  # a node may tell the count before the receipt
            for transaction in reversed(self._journal.read(partial(outbox.at_nonce, nonce=nonce))):
                found = await self._receipt(transaction.tx_hash)
                if found is not None:
                    return await self._settle(transaction, found)
            await asyncio.sleep(self._chain.settings.poll_seconds if spent else 0)
        if spent:
            raise TransactionFailed(
                f"{label}: its nonce {nonce} was spent by a transaction that is not in this journal",
                hint="one key is for one process: stop the other, then try again",
            )
        return None

    async def _settle(self, transaction: Outgoing, found: Any) -> TransactionReceipt:
        state = MINED if found["status"] == 1 else FAILED
        block, gas_used = int(found["blockNumber"]), int(found["gasUsed"])
        if (transaction.state, transaction.block) != (state, block):
            await self._journal.transact(partial(outbox.settle, transaction=transaction, state=state, block=block, gas_used=gas_used))
        if state == FAILED:
            raise TransactionFailed(f"{transaction.label} reverted: {await self._why_reverted(transaction, block)}")
        return _mined(found)

    async def _why_reverted(self, transaction: Outgoing, block: int) -> str:
        """The reason, from the same call on the state before the block (the nearest that a node without traces gives)."""
        from web3.exceptions import ContractLogicError

        call: Any = {
            "from": self._hex_address(),
            "to": self._chain.w3.to_checksum_address(transaction.recipient),
            "data": transaction.data,
            "gas": transaction.gas,
        }
        try:
            await self._chain.w3.eth.call(call, block - 1)
        except ContractLogicError as error:
            return _why(error)
        return "another transaction of the same block came first, or the gas was short"

    async def _raise_fee(self, nonce: int) -> None:
        """Replace what waits at the lowest nonce, up to ours: the later ones wait for it."""
        async with self._lock:
            pending = self._journal.read(lambda c: outbox.in_state(c, PENDING))
            first = min((t.nonce for t in pending), default=nonce)
            if first > nonce or not pending:
                return
            newest = [t for t in pending if t.nonce == first][-1]
            await self._broadcast(newest)  # a node that has forgotten it needs no higher fee
            higher = replace(newest, id=0, max_fee=_raised(newest.max_fee), priority_fee=_raised(newest.priority_fee))
            stored = await self._journal.transact(partial(outbox.add, transaction=self._sign(higher)))
            try:
                await self._broadcast(stored)
            except TransactionFailed as error:
                await self._journal.transact(partial(outbox.settle, transaction=stored, state=DROPPED))
                _log.warning("replacement_refused", label=stored.label, reason=error.message)

    async def _receipt(self, tx_hash: Hash) -> Any | None:
        from web3.exceptions import TransactionNotFound

        try:
            return await self._chain.w3.eth.get_transaction_receipt(tx_hash)  # type: ignore[arg-type]
        except TransactionNotFound:
            return None

    def _hex_address(self) -> str:
        return str(self._chain.w3.to_checksum_address(self.address))


def _raised(fee: int) -> int:
    """12.5 % more, rounded up, and at least one wei: what nodes ask of a replacement."""
    return fee + max(1, -(-fee // 8))


def _mined(found: Any) -> TransactionReceipt:
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


def _bytes(value: Any) -> bytes:
    return bytes.fromhex(value[2:]) if isinstance(value, str) else bytes(value)

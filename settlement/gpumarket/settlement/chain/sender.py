"""Sends transactions of one key and owns their nonces.

Nonce and signed bytes are committed to the journal before the first broadcast (I2), so a restart sends the same transaction again and
never a second one in its place. Each one is watched, whoever still waits for it, until it has its confirmations: an endpoint that is gone
is waited for, what the chain has forgotten is sent again, what is stuck is replaced at the same nonce with a higher fee.
Never: two different calls at one nonce, a nonce that is not in the journal, a nonce given back that the node may still hold.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog

from gpumarket.core.errors import ChainError, NetworkError, TransactionFailed
from gpumarket.core.signing import LocalKey
from gpumarket.core.units import Hash, hex0x
from gpumarket.settlement.chain import outbox
from gpumarket.settlement.chain.connection import Chain, reachable
from gpumarket.settlement.chain.gas import check_fee, quote, replacement
from gpumarket.settlement.chain.gas_tally import GasTally
from gpumarket.settlement.chain.mempool import Mempool, TransactionReceipt, mined_receipt
from gpumarket.settlement.chain.outbox import DROPPED, FAILED, MINED, PENDING, Outgoing, sender_tables
from gpumarket.settlement.journal import Journal

__all__ = ["Sender", "TransactionReceipt", "sender_tables"]
GAS_MARGIN = 5, 4
"""A gas limit is the estimate times this."""
SPENT_LOOKS = 4
GAP_MAX = 8
"""Most nonces that a node may claim beyond what the journal knows; more is a lie or another process."""
FILL_GAS = 21_000
_log = structlog.get_logger()


class Sender:
    """One per key and process. `stuck_seconds`: when to raise the fee; `patience_seconds`: how long a caller waits (the transaction stays
    in the journal, and is seen through in the background as long as the process lives, then by the next)."""

    def __init__(
        self, chain: Chain, key: LocalKey, journal: Journal, *, stuck_seconds: float = 30.0, patience_seconds: float = 300.0
    ) -> None:
        self.address = key.address
        self._chain, self._key, self._journal = chain, key, journal
        self._mempool = Mempool(chain, key.address)
        self._stuck_seconds, self._patience_seconds = stuck_seconds, patience_seconds
        self._lock = asyncio.Lock()
        self._begun: set[asyncio.Task[list[Outgoing]]] = set()
        self._watched: dict[int, _Watch] = {}
        self._worth: dict[int, int] = {}
        """What some nonces may cost in wei, beyond the usual bounds."""
        self._resumed = self._closed = False
        self.tally = GasTally()

    @property
    def watched(self) -> int:
        """Transactions that are seen through now."""
        return len(self._watched)

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
        begun = asyncio.get_running_loop().create_task(self._begin(items))
        self._begun.add(begun)
        begun.add_done_callback(self._begun.discard)
        await asyncio.wait({begun})  # it goes on when the caller is cancelled: what is in the journal is offered and watched
        if begun.cancelled():
            self._refuse_closed()
        return [await self._wait(transaction) for transaction in begun.result()]

    async def resume(self) -> None:
        """Broadcast again what an earlier process left pending, and see it through in the background. The first send does it too."""
        async with self._lock:
            with reachable(self._chain.settings.rpc_url):
                await self._resume()

    def pending_calls(self) -> list[bytes]:
        """Call data of everything that is signed and not mined, as far as is known."""
        return [transaction.data for transaction in self._journal.read(lambda c: outbox.in_state(c, PENDING))]

    async def hasten(self, data: bytes, worth: int) -> None:
        """Let the pending call with this data cost up to `worth` wei (FEE_MAX at most), and raise it at once where it is below the market:
        it has a deadline, and missing that costs as much. Nothing when no such call is pending, or it may cost as much already."""
        for nonce in {t.nonce for t in self._journal.read(lambda c: outbox.in_state(c, PENDING)) if t.data == data}:
            if worth > self._worth.get(nonce, 0):
                self._worth[nonce] = worth
                await self._unstick(nonce)

    async def confirmed(self, receipt: TransactionReceipt) -> TransactionReceipt:
        """Wait until the transaction has the chain settings' confirmations; sent again when a reorganisation dropped it. Returns its
        receipt as it is then. Raises TransactionFailed when it reverted in its new block, ChainError when it takes too long."""
        started, reason = time.monotonic(), ""
        while time.monotonic() - started < self._patience_seconds:
            try:
                head = await self._chain.block_number()
                found = await self._mempool.receipt(receipt.tx_hash)
                if found is None:
                    await self._send_again(receipt.tx_hash)
                elif found["status"] != 1:
                    raise TransactionFailed(f"transaction {hex0x(receipt.tx_hash)} reverted after a reorganisation")
                elif bytes(found["blockHash"]) != receipt.block_hash:
                    receipt = mined_receipt(found)
                elif head >= receipt.block + self._chain.settings.confirmations:
                    return receipt
            except TransactionFailed:
                raise
            except NetworkError as error:
                reason = error.message
            await asyncio.sleep(self._chain.settings.poll_seconds)
        raise ChainError(
            f"transaction {hex0x(receipt.tx_hash)} has no {self._chain.settings.confirmations} confirmations after "
            f"{self._patience_seconds:.0f} s; {reason or 'the chain makes no blocks'}",
            hint="it stays in the journal and is seen through; try again later",
        )

    async def close(self) -> None:
        """Stop waiting, in the background and for callers; what is pending stays in the journal. Nothing is sent after it."""
        self._closed = True
        tasks = [*self._begun, *(watch.task for watch in self._watched.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- making ------------------------------------------------------------------------------------------------------------

    async def _begin(self, items: Sequence[tuple[str, Any, int | None]]) -> list[Outgoing]:
        """Sign the calls, commit them, give them to the node and watch them."""
        async with self._lock:
            self._refuse_closed()
            await self._chain.verify_id()
            with reachable(self._chain.settings.rpc_url):
                await self._resume()
                drafts = [await self._draft(*item) for item in items]
                nonce = await self._next_nonce()
                signed = [self._sign(replace(draft, nonce=nonce + i)) for i, draft in enumerate(drafts)]
            stored = await self._journal.transact(lambda c: [outbox.add(c, transaction) for transaction in signed])
            for position, transaction in enumerate(stored):
                try:
                    await self._mempool.offer(transaction)
                except TransactionFailed:
                    unsent = stored[position:]
                    await self._journal.transact(partial(outbox.drop, transactions=unsent))
                    raise
                self._watch(transaction)
        return stored

    async def _draft(self, label: str, call: Any, gas: int | None) -> Outgoing:
        """An unsigned transaction, its gas estimated (which is where most reverts show) and its fee at twice the base fee."""
        price = await quote(self._chain)
        fields = {
            "from": self._chain.w3.to_checksum_address(self.address),
            "gas": 1,
            "maxFeePerGas": price.max_fee,
            "maxPriorityFeePerGas": price.priority,
        }
        built = await call.build_transaction({**fields, "nonce": 0, "value": 0, "chainId": self._chain.book.chain_id})
        recipient, data = bytes.fromhex(built["to"][2:]), _bytes(built["data"])
        if gas is None:
            estimate = await self._mempool.estimate(label, built["to"], built["data"])
            gas = estimate * GAS_MARGIN[0] // GAS_MARGIN[1]
        check_fee(label, gas, price.max_fee)
        return Outgoing(0, 0, label, Hash(b""), b"", recipient, data, gas, price.max_fee, price.priority)

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
        latest, pending = await self._mempool.count("latest"), await self._mempool.count("pending")
        if pending > max(known, latest) + GAP_MAX:
            raise ChainError(
                f"the node says that {pending - max(known, latest)} transactions of this key are pending that its journal does not know",
                hint="one key is for one process: stop the other; or name another endpoint",
            )
        return max(known, latest, pending)

    # --- seeing through ----------------------------------------------------------------------------------------------------

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ChainError("this process stops sending", hint="what is in the journal is taken up at the next start")

    async def _resume(self) -> None:
        """Once per process: everything pending, and everything mined that a reorganisation took back, goes out again."""
        if self._resumed:
            return
        count = await self._mempool.count("latest")
        again = self._journal.read(lambda c: outbox.in_state(c, PENDING, MINED, FAILED))
        again = [t for t in again if t.state == PENDING or t.nonce >= count]
        for transaction in again:
            await self._mempool.broadcast(transaction)
        for transaction in {transaction.nonce: transaction for transaction in again}.values():
            self._watch(transaction)
        self._resumed = True

    def _watch(self, transaction: Outgoing) -> _Watch:
        self._refuse_closed()
        watch = self._watched.get(transaction.nonce)
        if watch is None:
            mined: asyncio.Future[TransactionReceipt] = asyncio.get_running_loop().create_future()
            task = asyncio.get_running_loop().create_task(self._see_through(transaction, mined), name=f"transaction {transaction.nonce}")
            watch = self._watched[transaction.nonce] = _Watch(task, mined)
            task.add_done_callback(lambda _: (self._watched.pop(transaction.nonce, None), self._worth.pop(transaction.nonce, None)))
            mined.add_done_callback(_log_if_nobody_asks(transaction))
        return watch

    async def _wait(self, transaction: Outgoing) -> TransactionReceipt:
        watch = self._watch(transaction)
        either: set[asyncio.Future[Any]] = {watch.mined, watch.task}
        done, _ = await asyncio.wait(either, timeout=self._patience_seconds, return_when=asyncio.FIRST_COMPLETED)
        if watch.mined.done() and not watch.mined.cancelled():
            return watch.mined.result()
        if watch.task in done and not watch.task.cancelled():
            watch.task.result()  # what broke, where it is no failure of the transaction
        raise ChainError(
            f"{transaction.label} was not mined within {self._patience_seconds:.0f} s ({hex0x(transaction.tx_hash)})",
            hint="it stays in the journal, and is seen through in the background and by the next start",
        )

    async def _see_through(self, transaction: Outgoing, mined: asyncio.Future[TransactionReceipt]) -> None:
        """Until it is mined, and then until it has its confirmations. Whoever waits hears of the first."""
        raised_at = time.monotonic()
        while True:
            try:
                receipt = await self._look(transaction)
                if receipt is not None:
                    if not mined.done():
                        mined.set_result(receipt)
                    if await self._chain.block_number() >= receipt.block + self._chain.settings.confirmations:
                        return
                if receipt is None and time.monotonic() - raised_at >= self._stuck_seconds:
                    raised_at = time.monotonic()
                    await self._unstick(transaction.nonce)
            except TransactionFailed as error:
                if not mined.done():
                    mined.set_exception(error)
                return
            except NetworkError as error:
                _log.debug("chain_unusable", label=transaction.label, reason=error.message)
            await asyncio.sleep(self._chain.settings.poll_seconds)

    async def _look(self, transaction: Outgoing) -> TransactionReceipt | None:
        """The receipt of whichever transaction at this nonce was mined. Raises TransactionFailed: reverted, or the nonce is gone."""
        with reachable(self._chain.settings.rpc_url):
            for _ in range(SPENT_LOOKS):  # a node may tell the count before the receipt, and a reorganisation may come between
                spent = await self._mempool.count("latest") > transaction.nonce
                ours = self._journal.read(partial(outbox.ever_at_nonce, nonce=transaction.nonce))
                for candidate in ours if spent else [t for t in ours if t.state != DROPPED]:
                    found = await self._mempool.receipt(candidate.tx_hash)
                    if found is not None:
                        return await self._settle(candidate, found, transaction)
                if not spent:
                    return None
                await asyncio.sleep(self._chain.settings.poll_seconds)
            final = await self._chain.block_number() - self._chain.settings.confirmations
            if await self._mempool.count(max(final, 0)) <= transaction.nonce:
                return None  # what spent it may still be taken back
        raise TransactionFailed(
            f"{transaction.label}: its nonce {transaction.nonce} was spent by a transaction that is not in this journal",
            hint="one key is for one process: stop the other, then try again",
        )

    async def _settle(self, candidate: Outgoing, found: Any, wanted: Outgoing) -> TransactionReceipt:
        await self._mempool.check_receipt(candidate, found)
        state = MINED if found["status"] == 1 else FAILED
        block, gas_used = int(found["blockNumber"]), int(found["gasUsed"])
        if (candidate.state, candidate.block) != (state, block):
            await self._journal.transact(partial(outbox.settle, transaction=candidate, state=state, block=block, gas_used=gas_used))
            if candidate.state not in (MINED, FAILED):  # mined again after a reorganisation, it is still paid once
                self.tally.count(found, candidate.max_fee)
        if (candidate.recipient, candidate.data) != (wanted.recipient, wanted.data):
            raise TransactionFailed(
                f"{wanted.label}: its nonce {wanted.nonce} went to {candidate.label}, which the node had refused and then mined after all",
                hint="nothing was paid for this one: try it again",
            )
        if state == FAILED:
            raise TransactionFailed(f"{candidate.label} reverted: {await self._mempool.why_reverted(candidate, block)}")
        return mined_receipt(found)

    async def _send_again(self, tx_hash: Hash) -> None:
        for transaction in self._journal.read(lambda c: outbox.in_state(c, PENDING, MINED)):
            if transaction.tx_hash == tx_hash:
                await self._mempool.broadcast(transaction)

    # --- stuck -------------------------------------------------------------------------------------------------------------

    async def _unstick(self, nonce: int) -> None:
        """Help the lowest waiting nonce along; the later ones wait for it, and so do their watchers."""
        async with self._lock:
            pending = self._journal.read(lambda c: outbox.in_state(c, PENDING))
            if any(t.nonce < nonce for t in pending):
                return
            waiting = [t for t in pending if t.nonce == nonce]
            with reachable(self._chain.settings.rpc_url):
                count = await self._mempool.count("latest")
                if count < nonce:
                    await self._mend_gap(count, nonce)
                elif waiting:
                    await self._raise_fee(waiting, pending)
                else:  # it was mined, and taken back
                    for transaction in self._journal.read(partial(outbox.at_nonce, nonce=nonce)):
                        await self._mempool.broadcast(transaction)

    async def _raise_fee(self, waiting: list[Outgoing], pending: list[Outgoing]) -> None:
        newest = waiting[-1]
        await self._mempool.broadcast(newest)  # a node that has forgotten it needs no higher fee
        fees = replacement(waiting, await quote(self._chain), pending, self._worth.get(newest.nonce, 0))
        if fees is None:
            return  # the bytes that are out there stay good
        check_fee(newest.label, newest.gas, fees[0])
        again = self._sign(replace(newest, id=0, max_fee=fees[0], priority_fee=fees[1]))
        stored = await self._journal.transact(partial(outbox.add, transaction=again))
        try:
            await self._mempool.offer(stored)
        except TransactionFailed as error:
            await self._journal.transact(partial(outbox.settle, transaction=stored, state=DROPPED))
            _log.warning("replacement_refused", label=stored.label, reason=error.message)

    async def _mend_gap(self, count: int, nonce: int) -> None:
        """Something before the lowest pending nonce is missing on chain: ours that was taken back goes out again; where nothing of ours
        ever was (a node told a count too high), empty transfers to ourselves take the places."""
        for missing in range(count, min(nonce, count + GAP_MAX)):
            ours = self._journal.read(partial(outbox.at_nonce, nonce=missing))
            if not ours:
                price = await quote(self._chain)
                fill = Outgoing(0, missing, "fill a gap", Hash(b""), b"", self.address, b"", FILL_GAS, price.max_fee, price.priority)
                stored = await self._journal.transact(partial(outbox.add, transaction=self._sign(fill)))
                _log.warning("nonce_gap_filled", nonce=missing)
                self._watch(stored)
                ours = [stored]
            await self._mempool.broadcast(ours[-1])


@dataclass(frozen=True, slots=True)
class _Watch:
    task: asyncio.Task[None]
    mined: asyncio.Future[TransactionReceipt]


def _log_if_nobody_asks(transaction: Outgoing) -> Any:
    def done(mined: asyncio.Future[TransactionReceipt]) -> None:
        if not mined.cancelled() and (error := mined.exception()) is not None:
            _log.warning("transaction_failed", label=transaction.label, reason=str(error))

    return done


def _bytes(value: Any) -> bytes:
    return bytes.fromhex(value[2:]) if isinstance(value, str) else bytes(value)

"""A chain for `dispute_contract`, and each account's calls on it.

Blocks come by the clock and most are empty, so they are counted, not kept. A transaction waits in the pool for the next block, or longer
when blocks are full; a reorganisation takes the newest blocks off, gives those numbers other hashes, and their transactions wait again.
Time never runs backwards. Followers are the product's own `DisputeWatch` over `Blocks.reader`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

from simulation.chain_model import Tx
from simulation.contract_model import Revert
from simulation.dispute_contract import Block, Disputes
from simulation.virtual import START, Timeline

from gpumarket.core.codec import from_proto
from gpumarket.core.errors import ChainError, TransactionFailed, Unreachable
from gpumarket.core.terms import Lease, Receipt, VerificationProfile, keccak256
from gpumarket.core.units import Address, Hash, Money
from gpumarket.settlement.chain.dispute_watch import DisputeWatch
from gpumarket.settlement.chain.disputes import Head, SeatOnChain, Terms
from gpumarket.settlement.chain.reading import Checkpoint
from gpumarket.settlement.chain.reading import Event as Read
from gpumarket.settlement.disputes import Rules, lock_and_bond
from gpumarket.v1 import market_pb2 as mpb

BLOCK_SECONDS, CONFIRMATIONS = 5.0, 2
JUST_AFTER_SECONDS = 1e-6
"""After a block's edge: at the edge itself rounding may leave the clock just before it, and the wait for the block at nothing, for ever."""
PATIENCE_SECONDS = 300.0


class Blocks:
    """The chain as it is now."""

    def __init__(self, timeline: Timeline, rng: random.Random, contract: Disputes) -> None:
        self._timeline, self._rng = timeline, rng
        self.contract = contract
        self.pool: list[Tx] = []
        self.labels: dict[tuple[Address, str], Tx] = {}
        """What each account's outbox remembers: it outlives a crash."""
        self.sent: list[tuple[Tx, Head]] = []
        """Every call that ever left an account, if only to be estimated, and the head at that moment."""
        self.cut: set[Address] = set()
        """Accounts whose node does not answer."""
        self.full = 0.0
        """Chance that a block leaves a transaction out."""
        self.reorgs = self.returned = self.stalls = 0
        self._mined: list[tuple[int, int, list[Tx], Disputes]] = []
        self._forks: list[int] = []
        self.resumes = 0.0
        """When blocks come again, in virtual seconds."""
        self._number, self._since = 100, 0.0

    def head(self) -> Head:
        """The newest block. While nobody mines it stays the same."""
        passed = max(0.0, self._timeline.now - self._since) // BLOCK_SECONDS
        if self._timeline.now < self.resumes:
            return Head(self._number - 1, int(START + self._stopped))
        return Head(self._number + int(passed), int(START + self._since + passed * BLOCK_SECONDS))

    def hash_of(self, number: int) -> bytes:
        """Of a block that this chain has; a fork gives every block from its base on another one."""
        fork = max((index for index, base in enumerate(self._forks, 1) if base <= number), default=0)
        return keccak256(number.to_bytes(8, "big") + fork.to_bytes(8, "big"))

    def send(self, sender: Address, name: str, args: tuple[Any, ...], label: str = "") -> Tx:
        """Into the pool, unless it would revert now. Raises TransactionFailed."""
        head, tx = self.head(), Tx(sender, name, args)
        self.sent.append((tx, head))
        try:
            self.contract.copy().run(sender, name, args, Block(head.block + 1, head.time, self.hash_of))
        except Revert as error:
            raise TransactionFailed(f"{name} would revert: {error}") from error
        if label:
            self.labels[sender, label] = tx
        self.pool.append(tx)
        self._await_block()
        return tx

    def reorganise(self, depth: int) -> None:
        """The newest `depth` blocks are others, and empty."""
        head = self.head().block
        base = head - depth + 1
        self._forks.append(base)
        self.reorgs += 1
        gone = [entry for entry in self._mined if entry[0] >= base]
        if not gone:
            return
        self.contract = gone[0][3]
        self._mined = self._mined[: -len(gone)]
        back = [tx for _, _, txs, _ in gone for tx in txs]
        self.returned += len(back)
        for tx in back:
            tx.block, tx.failed, tx.events = -1, "", []
        order = {sender: self._rng.random() for sender in {tx.sender for tx in back}}  # an account's own order is its nonces': it stays
        self.pool = sorted(back, key=lambda tx: order[tx.sender]) + self.pool
        self._await_block()

    def stall(self, seconds: float) -> None:
        """No block for so long."""
        head = self.head()
        self.stalls += 1
        self._stopped = float(head.time - START)
        self._number, self._since = head.block + 1, max(self.resumes, self._timeline.now + seconds)
        self.resumes = self._since

    def events(self, start: int, end: int) -> list[Read]:
        """Of the blocks start..end, in order."""
        found = [(number, event) for number, _, txs, _ in self._mined if start <= number <= end for tx in txs for event in tx.events]
        return [Read("Disputes", number, name, args) for number, (name, args) in found]

    def watch(self, me: Address) -> DisputeWatch:
        """The product's follower, through this account's node."""
        return DisputeWatch(cast(Any, _Node(self, me)), cast(Any, _Reader(self, me)))

    def require_reached(self, me: Address) -> None:
        """Raises Unreachable."""
        if me in self.cut:
            raise Unreachable("the chain's node does not answer")

    def _await_block(self) -> None:
        if self._timeline.now < self.resumes:
            wait = self.resumes - self._timeline.now + JUST_AFTER_SECONDS
        else:
            wait = BLOCK_SECONDS - (self._timeline.now - self._since) % BLOCK_SECONDS + JUST_AFTER_SECONDS
        self._timeline.after(wait, self._mine)

    def _mine(self) -> None:
        head = self.head()
        if not self.pool:
            return
        if self._timeline.now < self.resumes or (self._mined and self._mined[-1][0] >= head.block):
            self._await_block()
            return
        left_out = {tx.sender for tx in self.pool if self._rng.random() < self.full}  # with all that follows it at later nonces
        taken, self.pool = [t for t in self.pool if t.sender not in left_out], [t for t in self.pool if t.sender in left_out]
        before = self.contract.copy()
        for tx in taken:
            tx.block = head.block
            try:
                tx.events = self.contract.run(tx.sender, tx.name, tx.args, Block(head.block, head.time, self.hash_of))
            except Revert as error:
                tx.failed = str(error)
        if taken:
            self._mined.append((head.block, head.time, taken, before))
        if self.pool:
            self._await_block()


class Account:
    """`settlement.chain.disputes.DisputeActions` of one key. Labels are kept by the chain, as an outbox keeps them."""

    def __init__(self, blocks: Blocks, me: Address) -> None:
        self._blocks, self._me = blocks, me

    async def terms(self) -> Terms:
        t = self._contract.terms
        rules = Rules(t.report_seconds, t.reveal_seconds, t.challenge_seconds)
        return Terms(rules, self._contract.shares, t.seat_stake, t.slash_verifiers_min)

    async def head(self) -> Head:
        self._blocks.require_reached(self._me)
        return self._blocks.head()

    async def quote(self, provider: Address, amount: int) -> tuple[int, int]:
        return lock_and_bond(self._contract.shares, amount, self._contract.lockable(provider))

    async def seat(self, operator: Address) -> SeatOnChain:
        self._blocks.require_reached(self._me)
        c = self._contract
        return SeatOnChain(c.seats[operator], 1, c.panels[operator], c.keys.get(operator, bytes(32)))

    async def funds(self) -> Money:
        return Money(self._contract.tokens[self._me])

    async def credited(self) -> Money:
        self._blocks.require_reached(self._me)
        return Money(self._contract.credited[self._me])

    async def report_missing(self, dispute: Hash, evidence_key: bytes) -> Tx:
        await self._do("", "set_evidence_key", evidence_key)
        return await self._do("", "report_missing", dispute)

    async def commit(self, dispute: Hash, commitment: Hash) -> Tx:
        return await self._do(f"commit {dispute.hex()}", "commit", dispute, commitment)

    async def reveal(self, dispute: Hash, number: int, salt: Hash) -> Tx:
        return await self._do(f"reveal {dispute.hex()}", "reveal", dispute, number, salt)

    async def challenge(self, opening: mpb.Opening, profile: VerificationProfile, nonce_commitment: Hash, evidence_hash: Hash) -> Tx:
        lease, receipt = from_proto(Lease, opening.lease.lease), from_proto(Receipt, opening.receipt.receipt)
        label = f"challenge {lease.struct_hash.hex()}"
        return await self._do(label, "challenge", lease, receipt, profile, nonce_commitment, evidence_hash)

    async def draw(self, dispute: Hash, nonce: Hash) -> Tx:
        return await self._do(f"draw {dispute.hex()}", "draw", dispute, nonce)

    async def post_evidence(self, dispute: Hash, sealed: bytes) -> Tx:
        return await self._do("", "post_evidence", dispute, sealed)

    async def finish(self, dispute: Hash) -> Tx:
        return await self._do(f"finish {dispute.hex()}", "finish", dispute)

    async def withdraw(self) -> Tx:
        return await self._do("", "withdraw")

    @property
    def _contract(self) -> Disputes:
        return self._blocks.contract

    async def _do(self, label: str, name: str, *args: Any) -> Tx:
        """Send and wait until it is mined; a labelled call that was sent before, and did not revert, is waited for."""
        self._blocks.require_reached(self._me)
        known = self._blocks.labels.get((self._me, label))
        tx = known if label and known is not None and not known.failed else self._blocks.send(self._me, name, args, label)
        for _ in range(int(PATIENCE_SECONDS / BLOCK_SECONDS)):
            if tx.block >= 0 and self._me not in self._blocks.cut:
                break
            await asyncio.sleep(BLOCK_SECONDS)
        else:
            raise ChainError(f"{name} is still not mined")
        if tx.failed:
            raise TransactionFailed(f"{name} reverted: {tx.failed}")
        return tx


class _Reader:
    """`settlement.chain.reading.Reader` of one account's node."""

    def __init__(self, blocks: Blocks, me: Address) -> None:
        self._blocks, self._me = blocks, me

    async def hash(self, number: int) -> bytes | None:
        self._blocks.require_reached(self._me)
        return self._blocks.hash_of(number) if number <= self._blocks.head().block else None

    async def read(self, start: int, end: int, cursor: Checkpoint | None) -> tuple[Sequence[Read], Checkpoint]:
        self._blocks.require_reached(self._me)
        return self._blocks.events(start, end), Checkpoint(end, self._blocks.hash_of(end))


class _Node:
    """`settlement.chain.Chain`, as far as the watch asks."""

    def __init__(self, blocks: Blocks, me: Address) -> None:
        self._blocks, self._me = blocks, me
        self.settings = SimpleNamespace(rpc_url="http://127.0.0.1:1", confirmations=CONFIRMATIONS)
        self.book = SimpleNamespace(deployed_block=0)
        self.w3 = SimpleNamespace(eth=self)

    @property
    def block_number(self) -> Any:
        return self._newest()

    async def _newest(self) -> int:
        self._blocks.require_reached(self._me)
        return self._blocks.head().block

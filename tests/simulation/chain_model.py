"""The chain: blocks, confirmations and reorganisations around `contract_model`, and the actions that each role has on it.

A transaction is a call of the contract by one account. The state is what executing the chain's blocks gives; a reorganisation takes blocks
off and puts their transactions back into the pool, in another order. Views show what has its confirmations, a little late, through the
product's own `channel_after`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from simulation.contract_model import FUNDS, Contract, Event, Revert
from simulation.virtual import START, Process, Timeline

from gpumarket.core.errors import TransactionFailed, Unreachable
from gpumarket.core.signing import Domain
from gpumarket.core.terms import keccak256
from gpumarket.core.units import Address, Hash, Money
from gpumarket.settlement.chain.view import ChainView, ChannelChanged, ChannelOnChain, NodeOnChain, channel_after

BLOCK_SECONDS, CONFIRMATIONS = 2.0, 2


@dataclass
class Tx:
    """A transaction and what became of it where it was last mined."""

    sender: Address
    name: str
    args: tuple[Any, ...]
    block: int = -1
    events: list[Event] = field(default_factory=list)
    failed: str = ""

    @property
    def logs(self) -> list[Event]:
        return self.events


class SimChain:
    """Blocks, the pool, and everybody's views."""

    def __init__(self, timeline: Timeline, rng: random.Random, domain: Domain) -> None:
        self._timeline, self._rng, self._domain = timeline, rng, domain
        self.nodes: dict[Address, NodeOnChain] = {}
        self.head = Contract(domain)
        self.pool: list[Tx] = []
        self.labels: dict[tuple[Address, str], Tx] = {}
        """What each account's outbox remembers of its labelled transactions: it outlives a crash."""
        self.reorgs = self.outages = 0
        self.stalled_until = 0.0
        self.down = False
        """Nobody's node answers: views stand still, calls fail, and what waits for a block goes on waiting."""
        self._blocks: list[tuple[int, list[Tx]]] = []
        self._before: list[Contract] = []
        self._followers: list[tuple[Process, ChainView]] = []
        self._mining = False

    @property
    def height(self) -> int:
        return len(self._blocks)

    def send(self, sender: Address, name: str, *args: Any, label: str | None = None) -> Tx:
        """Into the pool; a labelled transaction only once."""
        if label is not None and (sender, label) in self.labels:
            return self.labels[sender, label]
        tx = Tx(sender, name, args)
        if label is not None:
            self.labels[sender, label] = tx
        self.pool.append(tx)
        self._keep_mining()
        return tx

    def mine(self) -> None:
        """One block with all of the pool; views follow."""
        now, mined = int(START + self._timeline.now), self.pool
        self.pool = []
        self._before.append(self.head.copy())
        for tx in mined:
            tx.block, tx.failed = self.height, ""
            try:
                tx.events = self.head.run(tx.sender, tx.name, tx.args, now)
            except Revert as error:
                tx.events, tx.failed = [], str(error)
        self._blocks.append((now, mined))
        self._tell()

    def reorganise(self, depth: int) -> None:
        """Take `depth` blocks off; their transactions wait for others to hold them, in another order."""
        depth = min(depth, self.height)
        if not depth:
            return
        self.reorgs += 1
        back = [tx for _, block in self._blocks[-depth:] for tx in block]
        self.head = self._before[-depth]
        del self._blocks[-depth:], self._before[-depth:]
        for tx in back:
            tx.block, tx.events = -1, []
        by_sender = sorted(back, key=lambda tx: tx.sender)  # an account's own order is its nonces': it stays
        self.pool = by_sender + self.pool
        self._tell()
        self._keep_mining()

    @property
    def closed(self) -> int:
        """Channels that ended on this chain."""
        return sum(name == "Closed" for _, block in self._blocks for tx in block for name, _ in tx.events)

    def stall(self, seconds: float) -> None:
        """No block for so long."""
        self.outages += 1
        self.stalled_until = self._timeline.now + seconds

    def go_down(self) -> None:
        self.outages += 1
        self.down = True

    def come_back(self) -> None:
        self.down, self.stalled_until = False, 0.0
        self._tell()

    def require_up(self) -> None:
        """Raises Unreachable."""
        if self.down:
            raise Unreachable("the chain's node does not answer")

    def follow(self, process: Process, view: ChainView) -> None:
        """Keep a role's view; it starts with what is confirmed now."""
        self._followers = [(p, v) for p, v in self._followers if p.alive]
        self._followers.append((process, view))
        view.nodes.update(self.nodes)
        view.channels.update(self._confirmed())
        view.block = self.height - CONFIRMATIONS

    def settled(self, tx: Tx, confirmations: int = 0) -> bool:
        """Whether a transaction has its confirmations."""
        return tx.block >= 0 and self.height - tx.block > confirmations

    def _keep_mining(self) -> None:
        if not self._mining:
            self._mining = True
            self._timeline.after(BLOCK_SECONDS, self._tick)

    def _tick(self) -> None:
        if self._timeline.now < self.stalled_until:
            self._timeline.after(BLOCK_SECONDS, self._tick)
            return
        self.mine()
        quiet = not self.pool and all(not block for _, block in self._blocks[-CONFIRMATIONS - 1 :])
        self._mining = not quiet
        if not quiet:
            self._timeline.after(BLOCK_SECONDS, self._tick)

    def _confirmed(self) -> dict[Hash, ChannelOnChain]:
        channels: dict[Hash, ChannelOnChain] = {}
        for _, block in self._blocks[: max(0, self.height - CONFIRMATIONS)]:
            for tx in block:
                for name, args in tx.events:
                    if "id" in args and name != "ClaimSkipped":
                        after = channel_after(channels.get(args["id"]), name, args)
                        if after is not None:
                            channels[args["id"]] = after
        return channels

    def _tell(self) -> None:
        """Each view a little later than the block, each in its own time."""
        for process, view in self._followers:
            if process.alive:
                self._timeline.after(self._rng.uniform(0.0, 1.0), lambda p=process, v=view: p.call(lambda: self._sync(v)))  # type: ignore[misc]

    def _sync(self, view: ChainView) -> None:
        if self.down:
            return
        fresh = self._confirmed()
        changed = [key for key in fresh.keys() | view.channels.keys() if fresh.get(key) != view.channels.get(key)]
        view.block = self.height - CONFIRMATIONS
        for key in sorted(changed):
            if key in fresh:
                view.channels[key] = fresh[key]
            else:
                del view.channels[key]
        for key in sorted(changed):
            view.publish(ChannelChanged(key))


class Actions:
    """A role's account on the chain: `settlement.chain.Actions`, and what the redeemer looks up behind it."""

    def __init__(self, chain: SimChain, me: Address, *, gas_price: int = 10**9) -> None:
        self._chain, self._me = chain, me
        self.chain = _Behind(chain, gas_price)
        self.sender = _Sender(me, chain)

    async def open_channel(
        self, payee: Address, amount: int, expires_at: int, signer: Address | None = None, *, label: str | None = None
    ) -> Hash:
        tx = await self._sent("open", payee, amount, expires_at, label=label, confirmations=CONFIRMATIONS)
        return Hash(tx.events[0][1]["id"])

    async def top_up(self, channel: Hash, amount: int, expires_at: int) -> Tx:
        return await self._sent("top_up", channel, amount, expires_at)

    async def redeem(self, channel: Hash, cumulative: int, signature: bytes) -> _Mined:
        return _Mined(await self._sent("redeem", channel, cumulative, signature))

    async def redeem_many(self, vouchers: Sequence[tuple[Hash, int, bytes]]) -> _Mined:
        return _Mined(await self._sent("redeem_many", tuple(vouchers)))

    async def cooperative_close(self, channel: Hash, cumulative: int, payee_signature: bytes) -> Tx:
        return await self._sent("cooperative_close", channel, cumulative, payee_signature)

    async def withdraw(self) -> _Mined:
        return _Mined(await self._sent("withdraw"))

    async def credited(self) -> Money:
        return Money(self._chain.head.credited.get(self._me, 0))

    async def balance(self) -> Money:
        self._chain.require_up()
        return Money(self._chain.head.balances.get(self._me, FUNDS))

    def redeemed(self, receipt: _Mined) -> dict[Hash, int]:
        paid: dict[Hash, int] = {}
        for name, args in receipt.events:
            if name == "Redeemed":
                paid[args["id"]] = paid.get(args["id"], 0) + args["amount"]
        return paid

    def skipped(self, receipt: _Mined) -> list[Hash]:
        return [args["id"] for name, args in receipt.events if name == "ClaimSkipped"]

    async def _sent(self, name: str, *args: Any, label: str | None = None, confirmations: int = 0) -> Tx:
        self._chain.require_up()
        tx = self._chain.send(self._me, name, *args, label=label)
        while self._chain.down or not self._chain.settled(tx, confirmations):  # noqa: ASYNC110  a receipt is polled for
            await asyncio.sleep(BLOCK_SECONDS / 2)
        if tx.failed:
            raise TransactionFailed(f"{name} reverted: {tx.failed}")
        return tx


@dataclass
class _Mined:
    """A receipt: the events as they were when it was mined."""

    tx: Tx
    events: list[Event] = field(init=False)
    tx_hash: Hash = field(init=False)
    gas_used: int = 60_000

    def __post_init__(self) -> None:
        self.events = list(self.tx.events)
        self.tx_hash = Hash(id(self.tx).to_bytes(32, "big"))


@dataclass
class _Sender:
    address: Address
    chain: SimChain

    async def resume(self) -> None:
        """The pool outlives a crash here."""

    def pending_calls(self) -> list[bytes]:
        """Ids of the channels in the account's pending transactions, as the calls' data would hold them."""
        ours = [tx for tx in self.chain.pool if tx.sender == self.address]
        flat = [tx.args for tx in ours if tx.name in ("redeem", "redeem_many")]
        withdrawals = [keccak256(b"withdraw(address)")[:4] for tx in ours if tx.name == "withdraw"]
        return withdrawals + [b"".join([args[0]] if isinstance(args[0], bytes) else [claim[0] for claim in args[0]]) for args in flat]

    async def confirmed(self, receipt: _Mined) -> _Mined:
        while self.chain.down or not self.chain.settled(receipt.tx, CONFIRMATIONS):  # noqa: ASYNC110  a receipt is polled for
            await asyncio.sleep(BLOCK_SECONDS / 2)
        if receipt.tx.failed:
            raise TransactionFailed(f"reverted after a reorganisation: {receipt.tx.failed}")
        return _Mined(receipt.tx)


class _Behind:
    """`Actions.chain`, as far as the redeemer asks."""

    def __init__(self, chain: SimChain, gas_price: int) -> None:
        self._chain = chain
        self.settings = _Settings()
        self.second = None
        self.book = _Book()
        self.w3 = _Web3(gas_price)
        self.channels = self
        self.events = self
        self.functions = self

    async def block_number(self) -> int:
        self._chain.require_up()
        return self._chain.height - 1

    def channel(self, channel: Hash) -> _State:
        return _State(self._chain.head.channels.get(channel))

    def Redeemed(self) -> _Behind:
        return self

    async def get_logs(self, from_block: int, to_block: int, argument_filters: dict[str, Any]) -> list[dict[str, Any]]:
        wanted, blocks = set(argument_filters["id"]), self._chain._blocks[from_block : to_block + 1]
        found = [(tx, args) for _, block in blocks for tx in block for name, args in tx.events if name == "Redeemed"]
        return [
            {"args": args, "transactionHash": id(tx).to_bytes(32, "big"), "blockNumber": tx.block}
            for tx, args in found
            if args["id"] in wanted
        ]


@dataclass
class _State:
    """An `eth_call` of `PaymentChannels.channel`."""

    found: ChannelOnChain | None

    async def call(self) -> tuple[Any, ...]:
        if (c := self.found) is None:
            return "0x" + "00" * 20, 0, "", 0, "", 0, 0
        return "0x" + c.signer.hex(), c.deposit, "0x" + c.payee.hex(), c.claimed, "0x" + c.payer.hex(), c.expires_at, c.closes_at


@dataclass
class _Settings:
    rpc_url: str = "http://127.0.0.1:1"
    confirmations: int = CONFIRMATIONS


@dataclass
class _Book:
    deployed_block: int = 0


class _Web3:
    def __init__(self, gas_price: int) -> None:
        self.eth = self
        self._gas_price = gas_price

    @property
    async def gas_price(self) -> int:
        return self._gas_price

    async def get_transaction_receipt(self, _hash: bytes) -> dict[str, int]:
        return {"gasUsed": 60_000}

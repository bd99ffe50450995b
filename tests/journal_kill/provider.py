"""The provider's journal under a killer: attempts from `Started` to the voucher, its redemption, and panels, by the daemon's own classes.

The scheduler and the chain beside it are scripted and remember through the facts: what they answered is their word, whatever happens to us.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from journal_kill.facts import NOW, Fact, FixedClock, Lost, Say, SeededRandom, WrongBalance, of_kind, require_one_signature
from journal_kill.panel import panel_turn, require_panel_kept
from node_fixtures import CHAIN_ID, CHANNEL, DOMAIN, PROVIDER, SCHEDULER, Channel, generate_job, house, on_sale, text_hash
from sqlalchemy import select

from gpumarket.core.codec import from_proto, parse, signed_receipt, voucher_proto
from gpumarket.core.errors import ProtocolError
from gpumarket.core.signing import channels_domain
from gpumarket.core.terms import Ack, Lease, Outcome, Receipt, Task, Voucher, keccak256
from gpumarket.core.units import Address, Hash, Money, money_bytes
from gpumarket.node.accounts import Accounts
from gpumarket.node.admission import Admitted, admit
from gpumarket.node.claims import Claims
from gpumarket.node.redeeming import journal_url
from gpumarket.node.tables import OPEN, OWED, attempts, metadata
from gpumarket.settlement.chain.claims import Paid
from gpumarket.settlement.chain.view import ChannelOnChain
from gpumarket.settlement.channel import ReceivedChannel
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.pricing import attempt_amount, counts_as_complete
from gpumarket.settlement.redeemer import Redeemer
from gpumarket.settlement.vouchers import sign_voucher, verify_voucher
from gpumarket.v1 import market_pb2 as market
from gpumarket.v1 import terms_pb2 as terms

FILE = "journal.db"
CHANNELS = channels_domain(CHAIN_ID, Address(b"\x22" * 20))
MODEL = on_sale(Task.GENERATE)
JOBS, TOKENS, WINDOW = 4, 12, 4


@dataclass
class World:
    """The scheduler and the chain: what they did stays done."""

    say: Say
    said: Sequence[Fact] = ()
    billed: dict[bytes, int] = field(default_factory=dict)
    vouchered: int = 0
    claimed: int = 0

    def __post_init__(self) -> None:
        for fact in of_kind(self.said, "answered"):
            self.billed[bytes.fromhex(fact["lease"])] = fact["amount"]
            self.vouchered = max(self.vouchered, fact["vouchered"])
        for fact in of_kind(self.said, "paid"):
            self.claimed = max(self.claimed, fact["cumulative"])

    def newest(self) -> terms.SignedVoucher:
        voucher = Voucher(CHANNEL, Money(self.vouchered))
        return voucher_proto(voucher, sign_voucher(SCHEDULER, CHANNELS, CHANNEL, self.vouchered))

    async def line(self, _scheduler: Address) -> Any:
        return SimpleNamespace(market=SimpleNamespace(Claim=self.claim))

    async def claim(self, call: terms.SignedCall, timeout: float, metadata: Any = None) -> market.ClaimReply:
        body = market.ClaimRequest.FromString(call.body)
        lease = from_proto(Lease, body.lease.lease)
        if lease.struct_hash not in self.billed:
            amount = fair_amount(lease, body.receipt, body.last_ack)
            self.billed[lease.struct_hash] = amount
            self.vouchered += amount
            self.say({"kind": "answered", "lease": lease.struct_hash.hex(), "amount": amount, "vouchered": self.vouchered})
        reply = market.ClaimReply(state=market.CLAIM_STATE_OWED, amount=money_bytes(self.billed[lease.struct_hash]))
        reply.voucher.CopyFrom(self.newest())
        return reply

    # --- the chain, as far as a redeemer asks ---

    async def redeem(self, channel: Hash, cumulative: int, signature: bytes) -> Any:
        verify_voucher(CHANNELS, channel, cumulative, signature, SCHEDULER.address)
        assert cumulative > self.claimed, "the contract pays a voucher once"
        paid, self.claimed = cumulative - self.claimed, cumulative
        self.say({"kind": "paid", "cumulative": cumulative, "amount": paid})
        return SimpleNamespace(gas_used=1, tx_hash=Hash(keccak256(b"%d" % cumulative)), logs=(), paid={channel: paid})

    def actions(self) -> Any:
        return SimpleNamespace(
            sender=SimpleNamespace(address=PROVIDER.address),
            redeem=self.redeem,
            redeemed=lambda receipt: receipt.paid,
            skipped=lambda _receipt: [],
            credited=_nothing,
        )


class ChainSays:
    """Answers of the chain about redemptions (settlement.chain.claims), from what was paid."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def resume(self) -> None: ...

    def in_flight(self, channel: Hash) -> bool:
        return False

    async def state(self, channel: Hash) -> ChannelOnChain:
        return ChannelOnChain(channel, SCHEDULER.address, PROVIDER.address, SCHEDULER.address, 10**20, self._world.claimed, 2 * NOW)

    async def gas_price(self) -> int:
        return 0

    async def confirmed(self, receipt: Any) -> Any:
        return receipt

    async def require_paid(self, channel: Hash, cumulative: int) -> None:
        assert (await self.state(channel)).claimed >= cumulative

    async def paid(self, channels: Any) -> list[Paid]:
        paid = of_kind(self._world.said, "paid")
        return [Paid(c, f["cumulative"], Money(f["amount"]), Hash(bytes(32)), 1) for c in channels for f in reversed(paid)]

    async def is_final(self, paid: Paid) -> bool:
        return True

    async def gas_used(self, tx: Hash) -> int:
        return 1


async def _nothing() -> int:
    return 0


async def work(folder: Path, say: Say, turn: int = 0) -> None:
    journal, accounts = await opened(folder)
    try:
        await live(accounts, World(say), say, turn)
    finally:
        await journal.close()


async def opened(folder: Path) -> tuple[Journal, Accounts]:
    """As the daemon opens them."""
    journal = Journal(journal_url(folder), metadata)
    journal.open()
    accounts = Accounts(journal)
    try:
        await accounts.load(PROVIDER, DOMAIN, NOW)
    except BaseException:
        await journal.close()
        raise
    return journal, accounts


async def live(accounts: Accounts, world: World, say: Say, turn: int) -> None:
    jobs = [job_of(turn * JOBS + n) for n in range(JOBS)]
    await asyncio.gather(*(one_attempt(accounts, job, say, complete=n % 2 == 0) for n, job in enumerate(jobs)))
    claims = claims_of(accounts, world, f"{turn}")
    for bill in list(accounts.bills.values()):
        await claims.claim(bill)
        say({"kind": "owed", "lease": bill.lease_hash.hex(), "vouchered": accounts.vouchered(CHANNEL)})
    await accounts.keep_fact("offer_sequence", turn + 1)
    await panel_turn(accounts.journal, say, turn)
    source = partial(received, accounts, world)
    redeemer = Redeemer(world.actions(), accounts.journal, source, FixedClock(), payer_of=lambda _: SCHEDULER.address)
    chain: Any = ChainSays(world)
    redeemer._claims = chain
    for redemption in await redeemer.redeem_now():
        say({"kind": "redeemed", "amount": redemption.amount})


def claims_of(accounts: Accounts, world: World, seed: str) -> Claims:
    peers: Any = world
    clock, chance, spokes = FixedClock(), SeededRandom(seed), {CHANNEL: Channel()}
    return Claims(accounts, peers, PROVIDER, DOMAIN, CHANNELS, spokes, clock, chance, retry_seconds_max=1.0)


def received(accounts: Accounts, world: World) -> list[ReceivedChannel]:
    held = accounts.vouchers.values()
    return [ReceivedChannel(v.channel, SCHEDULER.address, 10**20, NOW * 2, v.cumulative, v.signature, redeemed=world.claimed) for v in held]


def job_of(number: int) -> Any:
    job = generate_job(MODEL, max_tokens=TOKENS, window=WINDOW)
    spec = {"job_id": Hash(keccak256(b"kill sweep %d" % number))}
    return job.__class__(**{**{n: getattr(job, n) for n in job.__dataclass_fields__}, "spec_changes": spec})


def admitted(job: Any) -> Admitted:
    nonce = Hash(keccak256(b"nonce" + job.lease.struct_hash))
    return admit(job.open(), house(MODEL), {CHANNEL: Channel()}, nonce, NOW)


async def one_attempt(accounts: Accounts, job: Any, say: Say, *, complete: bool) -> None:
    """Started, acks window by window, receipt, last ack, bill: each said when the service would send what follows from it."""
    what, opening = admitted(job), job.open()
    lease, name = what.lease_hash, what.lease_hash.hex()
    accounts.reserve(what)
    begin = accounts.begin(what, opening.lease.SerializeToString(), opening.order.SerializeToString(), NOW)
    again = accounts.begin(what, opening.lease.SerializeToString(), opening.order.SerializeToString(), NOW)
    results = await asyncio.gather(begin, again, return_exceptions=True)
    assert [type(r) for r in results] == [type(None), ProtocolError], results
    say({"kind": "started", "lease": name, "nonce": what.nonce.hex()})
    for units in range(WINDOW, TOKENS, WINDOW):
        await accounts.keep_ack(lease, job.ack(units, text_hash(range(units))).SerializeToString())
        say({"kind": "acked", "lease": name, "units": units})
    receipt = Receipt(
        lease=lease,
        nonce=what.nonce,
        request_hash=what.spec.request_hash,
        output_hash=text_hash(range(TOKENS)),
        prefix_units=0,
        prefix_hash=what.lease.prefix_hash,
        prompt_units=what.spec.prompt_units,
        output_units=TOKENS,
        outcome=Outcome.COMPLETED,
        finished_at=NOW,
    )
    signed = signed_receipt(PROVIDER, DOMAIN, receipt)
    await accounts.keep_receipt(lease, signed)
    say({"kind": "signed", "what": "receipt", "at": name, "signature": signed.signature.hex()})
    if complete:
        await accounts.keep_ack(lease, job.ack(TOKENS, text_hash(range(TOKENS)), complete=True).SerializeToString())
        say({"kind": "acked", "lease": name, "units": TOKENS})
    await accounts.close(lease)


async def verify(folder: Path, said: Sequence[Fact]) -> None:
    journal, accounts = await opened(folder)
    later = list(said)
    try:
        rows = {bytes(r.lease): r for r in journal.read(lambda c: list(c.execute(select(attempts))))}
        for row in rows.values():
            assert row.state != OPEN, "recovery ends what a crash left open"
            signature = parse(terms.SignedReceipt, row.signed_receipt).signature.hex()
            later.append({"kind": "signed", "what": "receipt", "at": row.lease.hex(), "signature": signature})
        require_kept(said, rows, accounts)
        require_panel_kept(said, journal)
        require_books(rows, accounts)
        await live(accounts, World(later.append, said), later.append, turn=1)
        rows = {bytes(r.lease): r for r in journal.read(lambda c: list(c.execute(select(attempts))))}
        require_books(rows, accounts)
        require_one_signature(later)
        if any(row.state != OWED for row in rows.values() if row.amount):
            raise Lost("a bill that was not settled after the restart")
    finally:
        await journal.close()


def require_kept(said: Sequence[Fact], rows: dict[bytes, Any], accounts: Accounts) -> None:
    """Everything that the scenario was told to be durable is there."""
    for fact in said:
        row = rows.get(bytes.fromhex(fact["lease"])) if "lease" in fact else None
        match fact["kind"]:
            case "started":
                if row is None or row.nonce.hex() != fact["nonce"]:
                    raise Lost(f"an attempt that was started: {fact}")
            case "acked":
                if row is None or row.signed_ack is None or parse(terms.SignedAck, row.signed_ack).ack.units < fact["units"]:
                    raise Lost(f"an ack: {fact}")
            case "owed":
                if row is None or row.state != OWED or accounts.vouchered(CHANNEL) < fact["vouchered"]:
                    raise Lost(f"a bill that was paid, or its voucher: {fact}")


def require_books(rows: dict[bytes, Any], accounts: Accounts) -> None:
    """The sums that the journal keeps are those of its rows, and every voucher is its scheduler's."""
    owed = sum(row.amount for row in rows.values() if row.state == OWED)
    if accounts.owed_on(CHANNEL) != owed or accounts.vouchered(CHANNEL) < owed:
        raise WrongBalance(f"owed {accounts.owed_on(CHANNEL)}, vouchered {accounts.vouchered(CHANNEL)}, rows say {owed}")
    for voucher in accounts.vouchers.values():
        verify_voucher(CHANNELS, voucher.channel, voucher.cumulative, voucher.signature, SCHEDULER.address)
    for row in rows.values():
        lease = from_proto(Lease, parse(terms.SignedLease, row.signed_lease).lease)
        ack = parse(terms.SignedAck, row.signed_ack) if row.signed_ack is not None else terms.SignedAck()
        amount = fair_amount(lease, parse(terms.SignedReceipt, row.signed_receipt), ack)
        if row.amount != amount:
            raise WrongBalance(f"an attempt of {ack.ack.units} units earned {row.amount}, not {amount}")


def fair_amount(lease: Lease, receipt: terms.SignedReceipt, ack: terms.SignedAck) -> int:
    """What an attempt earns by its evidence."""
    said = from_proto(Ack, ack.ack) if ack.HasField("ack") else None
    complete = counts_as_complete(said, from_proto(Receipt, receipt.receipt), lease.window_units)
    return attempt_amount(lease, prompt_units=3, units=said.units if said else 0, complete=complete)

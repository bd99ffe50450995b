"""What every scheduler owes, in memory and in the journal, always changed together: first the journal, then memory, then anything visible.

Invariants: one row per lease and per (job, attempt), and an attempt opens only above every one seen of its job, so a zombie never runs
twice (I5); a voucher replaces another only when it is higher and holds (I3).
Callers run in tasks that are not cancelled in the middle: the journal commits a cancelled caller's work all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, RowMapping, func, insert, select, update

from gpumarket.core.codec import from_proto, parse, signed_receipt
from gpumarket.core.errors import ProtocolError
from gpumarket.core.signing import Domain, Signer
from gpumarket.core.terms import Ack, Lease, Outcome, Receipt
from gpumarket.core.units import Address, Hash, Money
from gpumarket.node.admission import Admitted
from gpumarket.node.credit import OpenJob, Standing
from gpumarket.node.tables import CLOSED, DUE, HELD, OPEN, OWED, REJECTED, SHORT, attempts, facts, vouchers
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.pricing import attempt_amount, counts_as_complete
from gpumarket.v1 import terms_pb2 as pb

NOTHING = Money(0)


@dataclass(frozen=True, slots=True)
class Bill:
    """An ended attempt with its evidence: what a claim is made of."""

    lease: Lease
    lease_hash: Hash
    signed_lease: pb.SignedLease
    signed_receipt: pb.SignedReceipt
    signed_ack: pb.SignedAck | None
    amount: Money
    """Earned by our own reckoning, base units."""
    proven: Money
    """The part of it that the client's signed ack alone proves."""


@dataclass(frozen=True, slots=True)
class HeldVoucher:
    """The newest voucher of a channel."""

    channel: Hash
    scheduler: Address
    cumulative: Money
    signature: bytes


class Accounts:
    """The provider's ledger. `load` before anything else."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._standings: dict[Address, Standing] = {}
        self._bills: dict[Hash, Bill] = {}
        self._vouchers: dict[Hash, HeldVoucher] = {}
        self._owed: dict[Hash, int] = {}
        self._held: set[Hash] = set()

    # --- reading -------------------------------------------------------------------------------------------------------------

    def standing(self, scheduler: Address) -> Standing:
        """The scheduler's account; a new one owes nothing."""
        return self._standings.setdefault(scheduler, Standing())

    @property
    def bills(self) -> Mapping[Hash, Bill]:
        """Everything that is not settled, by lease hash."""
        return self._bills

    @property
    def fresh_bills(self) -> int:
        """Bills that no scheduler has answered yet."""
        return len(self._bills.keys() - self._held)

    @property
    def vouchers(self) -> Mapping[Hash, HeldVoucher]:
        return self._vouchers

    def vouchered(self, channel: Hash) -> int:
        """Cumulative amount of the channel's newest voucher."""
        held = self._vouchers.get(channel)
        return held.cumulative if held else 0

    def owed_on(self, channel: Hash) -> int:
        """Sum of the amounts that claims on this channel were answered with as owed: its voucher must cover it."""
        return self._owed.get(channel, 0)

    @property
    def sums(self) -> dict[str, int]:
        """What was earned and where it stands, in base units: billed and not answered, held, ever owed, and under vouchers."""
        held = sum(bill.amount for lease, bill in self._bills.items() if lease in self._held)
        return {
            "due": sum(bill.amount for bill in self._bills.values()) - held,
            "held": held,
            "owed": sum(self._owed.values()),
            "vouchered": sum(voucher.cumulative for voucher in self._vouchers.values()),
            "short": sum(standing.short for standing in self._standings.values()),
        }

    @property
    def standings(self) -> Mapping[Address, Standing]:
        """Every scheduler that was ever dealt with."""
        return self._standings

    def receipt(self, lease: Hash) -> tuple[Lease, pb.SignedReceipt] | None:
        """The signed receipt of a lease, settled or not, with its lease."""
        query = select(attempts.c.signed_lease, attempts.c.signed_receipt).where(attempts.c.lease == lease)
        row = self.journal.read(lambda c: c.execute(query).mappings().one_or_none())
        if row is None or row["signed_receipt"] is None:
            return None
        return from_proto(Lease, parse(pb.SignedLease, row["signed_lease"]).lease), parse(pb.SignedReceipt, row["signed_receipt"])

    # --- one attempt ---------------------------------------------------------------------------------------------------------

    async def begin(self, job: Admitted, signed_lease: bytes, signed_order: bytes, now: int) -> None:
        """Write an attempt down before its `Started` leaves. Raises ProtocolError for one that was seen, or is below one that was."""
        lease = job.lease

        def work(connection: Connection) -> None:
            highest = connection.execute(select(func.max(attempts.c.attempt)).where(attempts.c.job == lease.job)).scalar()
            if highest is not None and lease.attempt <= highest:
                raise ProtocolError(
                    f"attempt {lease.attempt} of this job is over: attempt {highest} was opened here",
                    hint="ask the scheduler for the next attempt (Market.Retry)",
                )
            connection.execute(
                insert(attempts),
                {
                    "lease": job.lease_hash,
                    "job": lease.job,
                    "attempt": lease.attempt,
                    "scheduler": lease.scheduler,
                    "channel": lease.provider_channel,
                    "state": OPEN,
                    "prompt_units": job.spec.prompt_units,
                    "nonce": job.nonce,
                    "request_hash": job.spec.request_hash,
                    "signed_lease": signed_lease,
                    "signed_order": signed_order,
                    "reason": "",
                    "opened_at": now,
                },
            )

        await self.journal.transact(work)

    def reserve(self, job: Admitted) -> None:
        """Count the job as open, at once: between the credit check and the journal's answer nobody else may take the same credit."""
        self.standing(job.lease.scheduler).open[job.lease_hash] = job.open_job

    def release(self, job: Admitted) -> None:
        """A reserved job that was not begun after all."""
        self.standing(job.lease.scheduler).open.pop(job.lease_hash, None)

    def open_jobs(self, scheduler: Address) -> list[OpenJob]:
        return list(self.standing(scheduler).open.values())

    async def keep_ack(self, lease: Hash, evidence: bytes) -> None:
        """The newest ack of a running attempt."""
        await self._update(lease, signed_ack=evidence)

    async def keep_receipt(self, lease: Hash, receipt: pb.SignedReceipt) -> None:
        """The receipt, before it is shown to anyone."""
        await self._update(lease, signed_receipt=receipt.SerializeToString())

    async def close(self, lease: Hash) -> Bill:
        """The attempt is over, no further ack comes: from now on it is a bill."""

        def work(connection: Connection) -> Bill:
            row = connection.execute(select(attempts).where(attempts.c.lease == lease)).mappings().one()
            bill = _bill(row)
            connection.execute(update(attempts).where(attempts.c.lease == lease).values(state=DUE, amount=bill.amount))
            return bill

        bill = await self.journal.transact(work)
        self._count(bill)
        return bill

    async def _update(self, lease: Hash, **values: bytes) -> None:
        await self.journal.transact(lambda c: c.execute(update(attempts).where(attempts.c.lease == lease).values(**values)))

    # --- settlement ----------------------------------------------------------------------------------------------------------

    async def hold(self, bill: Bill, reason: str = "") -> None:
        """The scheduler holds the claim until the client reports."""
        if bill.lease_hash not in self._held:
            await self._settle(bill, HELD, bill.amount, reason, None)
            self._held.add(bill.lease_hash)

    async def settle(self, bill: Bill, state: str, amount: Money, reason: str, voucher: HeldVoucher | None) -> None:
        """A final answer with the voucher that came with it, in one transaction. `state` is OWED, REJECTED or CLOSED."""
        assert state in (OWED, REJECTED, CLOSED)
        short = bill.proven - amount if state != REJECTED else 0
        await self._settle(bill, SHORT if short > 0 else state, amount, reason, voucher, owed=amount if state == OWED else Money(0))
        standing = self.standing(bill.lease.scheduler)
        standing.short += max(0, short)
        standing.unpaid.pop(bill.lease_hash, None)
        self._bills.pop(bill.lease_hash, None)
        self._held.discard(bill.lease_hash)

    async def keep_voucher(self, voucher: HeldVoucher) -> None:
        """A voucher that was verified. A lower or equal one is no news and changes nothing."""
        if voucher.cumulative > self.vouchered(voucher.channel):
            await self.journal.transact(lambda c: _write_voucher(c, voucher))
            self._take_voucher(voucher)

    async def _settle(
        self, bill: Bill, state: str, amount: Money, reason: str, voucher: HeldVoucher | None, *, owed: Money = NOTHING
    ) -> None:
        channel = bill.lease.provider_channel
        if owed:
            self._owed[channel] = self.owed_on(channel) + owed
        newer = voucher if voucher is not None and voucher.cumulative > self.vouchered(voucher.channel) else None

        def work(connection: Connection) -> None:
            values = {"state": state, "amount": amount, "reason": reason[:500]}
            connection.execute(update(attempts).where(attempts.c.lease == bill.lease_hash).values(values))
            if newer is not None:
                _write_voucher(connection, newer)
            if owed:  # where nothing is, the channel may have no voucher yet
                where = vouchers.c.channel == channel
                before = connection.execute(select(vouchers.c.owed).where(where)).scalar_one()
                connection.execute(update(vouchers).where(where).values(owed=before + owed))

        await self.journal.transact(work)
        if newer is not None:
            self._take_voucher(newer)

    def _take_voucher(self, voucher: HeldVoucher) -> None:
        before = self.vouchered(voucher.channel)
        if voucher.cumulative > before:
            self.standing(voucher.scheduler).paid += voucher.cumulative - before
            self._vouchers[voucher.channel] = voucher

    # --- start ---------------------------------------------------------------------------------------------------------------

    async def load(self, signer: Signer, domain: Domain, now: int) -> int:
        """Read the ledger; end what a crash left open with a receipt up to its last ack. Returns how many attempts that was."""
        for row in self.journal.read(lambda c: c.execute(select(vouchers)).mappings().all()):
            self._take_voucher(
                HeldVoucher(Hash(row["channel"]), Address(row["scheduler"]), Money(row["cumulative"]), bytes(row["signature"]))
            )
            self._owed[Hash(row["channel"])] = row["owed"]
        left = self.journal.read(lambda c: c.execute(select(attempts).where(attempts.c.state == OPEN)).mappings().all())
        for row in left:
            if row["signed_receipt"] is None:
                await self.keep_receipt(Hash(row["lease"]), _receipt_after_crash(row, signer, domain, now))
            await self.close(Hash(row["lease"]))
        unsettled = select(attempts).where(attempts.c.state.in_((DUE, HELD)))
        for row in self.journal.read(lambda c: c.execute(unsettled).mappings().all()):
            self._count(_bill(row))
            if row["state"] == HELD:
                self._held.add(Hash(row["lease"]))
        for row in self.journal.read(lambda c: c.execute(select(attempts).where(attempts.c.state == SHORT)).mappings().all()):
            self.standing(Address(row["scheduler"])).short += _bill(row).proven - row["amount"]
        return len(left)

    def _count(self, bill: Bill) -> None:
        standing = self.standing(bill.lease.scheduler)
        standing.open.pop(bill.lease_hash, None)
        standing.unpaid[bill.lease_hash] = bill.amount
        self._bills[bill.lease_hash] = bill

    # --- facts ---------------------------------------------------------------------------------------------------------------

    def fact(self, name: str) -> int | None:
        """A number that survives restarts."""
        value: int | None = self.journal.read(lambda c: c.execute(select(facts.c.value).where(facts.c.name == name)).scalar_one_or_none())
        return value

    async def keep_fact(self, name: str, value: int) -> None:
        def work(connection: Connection) -> None:
            if connection.execute(update(facts).where(facts.c.name == name).values(value=value)).rowcount == 0:
                connection.execute(insert(facts), {"name": name, "value": value})

        await self.journal.transact(work)


def _write_voucher(connection: Connection, voucher: HeldVoucher) -> None:
    values = {"cumulative": voucher.cumulative, "signature": voucher.signature}
    where = vouchers.c.channel == voucher.channel
    known = connection.execute(select(vouchers.c.cumulative).where(where)).scalar_one_or_none()
    if known is None:
        connection.execute(insert(vouchers), {"channel": voucher.channel, "scheduler": voucher.scheduler, "owed": 0, **values})
    elif known < voucher.cumulative:
        connection.execute(update(vouchers).where(where).values(values))


def _bill(row: RowMapping) -> Bill:
    signed_lease = parse(pb.SignedLease, row["signed_lease"])
    lease = from_proto(Lease, signed_lease.lease)
    receipt = parse(pb.SignedReceipt, row["signed_receipt"])
    ack = parse(pb.SignedAck, row["signed_ack"]) if row["signed_ack"] is not None else None
    units = ack.ack.units if ack is not None else 0
    said = from_proto(Ack, ack.ack) if ack is not None else None
    complete = counts_as_complete(said, from_proto(Receipt, receipt.receipt), lease.window_units)
    amount = attempt_amount(lease, prompt_units=row["prompt_units"], units=units, complete=complete)
    proven = attempt_amount(lease, prompt_units=row["prompt_units"], units=units, complete=said is not None and said.complete)
    return Bill(lease, Hash(row["lease"]), signed_lease, receipt, ack, amount, proven)


def _receipt_after_crash(row: RowMapping, signer: Signer, domain: Domain, now: int) -> pb.SignedReceipt:
    """What a crash cut short counts up to its last ack: what went out after it is not known any more."""
    lease = from_proto(Lease, parse(pb.SignedLease, row["signed_lease"]).lease)
    ack = parse(pb.SignedAck, row["signed_ack"]).ack if row["signed_ack"] is not None else None
    receipt = Receipt(
        lease=Hash(row["lease"]),
        nonce=Hash(row["nonce"]),
        request_hash=Hash(row["request_hash"]),
        output_hash=Hash(ack.output_hash) if ack is not None else lease.prefix_hash,
        prefix_units=lease.prefix_units,
        prefix_hash=lease.prefix_hash,
        prompt_units=row["prompt_units"],
        output_units=ack.units if ack is not None else 0,
        outcome=Outcome.FAILED,
        finished_at=now,
    )
    return signed_receipt(signer, domain, receipt)

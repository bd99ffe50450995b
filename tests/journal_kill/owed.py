"""What else a client's journal must not forget: disputes with their evidence, the day's spending, and a guard that was imported."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from journal_kill.facts import NOW, Fact, Lost, Say, WrongBalance, of_kind
from sqlalchemy import select

from gpumarket.core.terms import keccak256
from gpumarket.core.units import Address, Hash, Money
from gpumarket.sdk import dispute_records, guarding, spending
from gpumarket.sdk.dispute_records import StoredDispute
from gpumarket.sdk.tables import CHANNELS
from gpumarket.settlement import guard
from gpumarket.settlement.guard_file import Guarded, GuardedChannel
from gpumarket.settlement.journal import Journal

ELSEWHERE = Address(b"\x5d" * 20)
"""Who is paid on the channels of an import."""
YESTERDAY = NOW - 600
EVIDENCE = b"an opening " * 40


async def disputes_turn(journal: Journal, say: Say, turn: int) -> None:
    """Two disputes are opened, one of them ends."""
    stored = [dispute(2 * turn + number) for number in range(2)]
    for one in stored:
        await journal.transact(partial(dispute_records.add, stored=one))
        say({"kind": "challenged", "job": one.job.hex(), "nonce": one.nonce.hex()})
    await journal.transact(partial(dispute_records.end, dispute=stored[0].dispute, outcome="slashed"))
    say({"kind": "dispute ended", "job": stored[0].job.hex()})


def dispute(number: int) -> StoredDispute:
    job, key, nonce = (Hash(keccak256(b"%s %d" % (what, number))) for what in (b"disputed", b"dispute", b"nonce"))
    return StoredDispute(job, key, nonce, EVIDENCE, "", NOW)


async def import_turn(journal: Journal, say: Say, turn: int) -> None:
    """A guard of another machine: a new channel each time, a higher amount on the first one, and what was spent there."""
    channels = [GuardedChannel(_channel(number), ELSEWHERE, Money(100 + turn), Money(10)) for number in range(turn + 1)]
    theirs = Guarded(channels, spent={YESTERDAY: Money(7 + turn)}, limit=Money(10**24 - turn))
    await journal.transact(lambda c: guarding.take_over(c, theirs, NOW))
    for entry in channels:
        say({"kind": "imported", "channel": entry.channel.hex(), "cumulative": entry.cumulative})
    say({"kind": "spent elsewhere", "amount": theirs.spent[YESTERDAY], "limit": theirs.limit})


def _channel(number: int) -> Hash:
    return Hash(keccak256(b"imported %d" % number))


def require_disputes_kept(said: Sequence[Fact], journal: Journal) -> None:
    """A dispute that somebody heard of has its nonce, and its evidence until it is over."""
    kept = {stored.job.hex(): stored for stored in journal.read(dispute_records.everything)}
    for fact in of_kind(said, "challenged"):
        if fact["job"] not in kept or kept[fact["job"]].nonce.hex() != fact["nonce"]:
            raise Lost(f"a dispute: {fact}")
    for fact in of_kind(said, "dispute ended"):
        if kept[fact["job"]].outcome != "slashed":
            raise Lost(f"the end of a dispute: {fact}")
    if any(stored.evidence != (b"" if stored.outcome else EVIDENCE) for stored in kept.values()):
        raise WrongBalance("evidence of a dispute that is over, or none of one that runs")


def require_import_kept(said: Sequence[Fact], journal: Journal) -> None:
    """An import is there as a whole or not at all, and what was signed here was spent here."""
    for fact in of_kind(said, "imported"):
        if (journal.read(partial(guard.guarded, channel=Hash(bytes.fromhex(fact["channel"])))) or 0) < fact["cumulative"]:
            raise Lost(f"an imported guard: {fact}")
    spent, limit = journal.read(spending.history), journal.read(spending.stored_limit)
    for fact in of_kind(said, "spent elsewhere"):
        if spent.get(YESTERDAY, 0) < fact["amount"] or limit is None or limit > fact["limit"]:
            raise Lost(f"what was spent on another machine, or the limit there: {fact}")
    rows = journal.read(lambda c: c.execute(select(CHANNELS)).all())
    imported = [row for row in rows if row.scheduler == ELSEWHERE]
    if bool(imported) != (YESTERDAY in spent):
        raise WrongBalance("half of an import")
    here = sum(row.voucher for row in rows if row.scheduler != ELSEWHERE)
    if sum(amount for at, amount in spent.items() if at != YESTERDAY) != here:
        raise WrongBalance(f"vouchers add up to {here}, and the day's spending is {spent}")

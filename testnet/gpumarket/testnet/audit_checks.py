"""The first six invariants of the market, recomputed from everybody's rows and signed statements. Pure: evidence in, findings out.

    I1 solvency            I2 durable before visible      I3 never two vouchers for one amount, never a lower one
    I4 bounded exposure    I5 paid at most once           I6 every accepted job ends

Never: a sum that a ledger states without adding it up again, a statement whose signature was not recovered here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from gpumarket.core.errors import BadSignature
from gpumarket.core.terms import Task
from gpumarket.core.units import Address, Hash, format_money
from gpumarket.node.tables import SETTLED
from gpumarket.scheduler.jobs import AttemptState, JobState
from gpumarket.scheduler.tables import FOREVER
from gpumarket.settlement import ladder
from gpumarket.settlement.vouchers import verify_voucher
from gpumarket.testnet.evidence import Evidence, OpenedAttempt, short

_UNENDED_JOBS = (JobState.LEASED, JobState.DELIVERED, JobState.CHECKING)
_UNENDED_ORDERS = ("ordered", "leased", "delivered")
_BAD_OUTPUT = "bad-output"
Figures = dict[str, int]


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one invariant. `problems` is empty where it holds; `seen` says what was looked at; amounts in base units."""

    problems: tuple[str, ...]
    seen: str
    figures: Figures = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return not self.problems


def check(evidence: Evidence) -> dict[str, Finding]:
    """Invariant → finding, all six."""
    return {name: rule(evidence) for name, rule in RULES.items()}


# --- I1 ------------------------------------------------------------------------------------------------------------------------


def solvency(e: Evidence) -> Finding:
    """Tokens in the contract cover what it owes; in each ledger used + held + open is what its jobs add up to, and never above vouchers."""
    chain = e.chain
    owed = sum(c.deposit - c.claimed for c in chain.channels.values() if not c.closed) + chain.credited
    problems = [f"the contract holds {chain.escrow}, it owes {owed}"] if chain.escrow < owed else []
    for c in chain.channels.values():
        if c.state is not None and c.state != (c.deposit, c.claimed):
            problems.append(f"channel {short(c.id)} has (deposit, claimed) {c.state}, its events add up to {(c.deposit, c.claimed)}")
        if c.claimed + c.refunded > c.deposit:
            problems.append(f"channel {short(c.id)} paid {c.claimed} and refunded {c.refunded} of {c.deposit}")
    for name, books in e.schedulers.items():
        problems += _unsound_hubs(e, name, books)
        problems += _unsound_spokes(e, name, books)
    open_channels = sum(not c.closed for c in chain.channels.values())
    seen = f"{format_money(chain.escrow)} in escrow for {open_channels} open channels, {format_money(owed)} of it owed"
    return Finding(tuple(problems), seen, {"escrow": chain.escrow, "owed_by_contract": owed})


def _unsound_hubs(e: Evidence, name: str, books: Any) -> Iterator[str]:
    channel_of = {row.key: row.channel for row in books.jobs}
    opened = Counter[bytes]()
    for job in books.jobs:
        opened[job.channel] += job.open
    charged = {state: Counter[bytes]() for state in (AttemptState.HELD, AttemptState.OWED)}
    for row in books.attempts:
        if row.state in charged and row.job in channel_of:
            charged[row.state][channel_of[row.job]] += e.by_lease[Hash(row.lease)].cost
    for row in books.client_channels:
        where = f"{name}: client channel {short(row.id)}"
        sums = (charged[AttemptState.OWED][row.id], charged[AttemptState.HELD][row.id], opened[row.id])
        if (row.used, row.held, row.open) != sums:
            yield f"{where} has (used, held, open) {(row.used, row.held, row.open)}, its jobs add up to {sums}"
        if sum(sums) > row.voucher:
            yield f"{where} has {sum(sums)} in use of vouchers of {row.voucher}"
        on_chain = e.chain.channels.get(Hash(row.id))
        if on_chain is None or row.voucher > on_chain.deposit:
            yield f"{where} has a voucher of {row.voucher}, the chain a deposit of {on_chain.deposit if on_chain else 'nothing'}"


def _unsound_spokes(e: Evidence, name: str, books: Any) -> Iterator[str]:
    for row in books.spokes:
        on_chain = e.chain.channels.get(Hash(row.id))
        if on_chain is None or row.vouchered + row.reserved > on_chain.deposit:
            has = on_chain.deposit if on_chain else "nothing"
            yield f"{name}: spoke {short(row.id)} has {row.vouchered} vouchered and {row.reserved} reserved, the chain a deposit of {has}"


# --- I2 ------------------------------------------------------------------------------------------------------------------------


def durable(e: Evidence) -> Finding:
    """Whatever one side holds of another, the other's own books hold too: leases, acks, receipts, and vouchers that were redeemed."""
    problems = [f"{a.holder}: attempt on lease {_name(a.lease)}: {flaw}" for a in e.held for flaw in a.flaws]
    known = {row.lease for books in e.schedulers.values() for row in books.attempts}
    unknown = [a for a in e.held if a.lease is not None and a.lease.struct_hash not in known]
    problems += [f"{a.holder} holds lease {_name(a.lease)}, which is in no scheduler's ledger" for a in unknown]
    acks, receipts = list(_acks_lost(e)), list(_receipts_lost(e))
    problems += [*filter(None, acks), *filter(None, receipts), *_unjournaled_redemptions(e)]
    counts = f"{len(e.held)} leases, {len(acks)} acks, {len(receipts)} receipts and {len(e.chain.settlements)} redemptions"
    return Finding(tuple(problems), f"{counts} stand in their makers' books")


def _acks_lost(e: Evidence) -> Iterator[str]:
    """For each ack that a provider or scheduler holds of a client whose books are here: why it is not in them, or nothing."""
    others = [(a.holder, a.lease, a.units) for a in e.held if a.holder in e.providers]
    for holder, lease, units in (*others, *(("the scheduler", a.lease, a.units) for a in e.attempts)):
        written = e.acked.get(lease.struct_hash) if lease is not None else None
        if written is not None:
            yield f"{holder} holds an ack of {units} units on {_name(lease)}, its client wrote down {written}" if units > written else ""


def _receipts_lost(e: Evidence) -> Iterator[str]:
    """For each receipt that should be in a journal that is here: why it is not, or nothing."""
    known = {a.lease.provider for a in e.journaled.values() if a.lease is not None}
    shown = [(a.holder, a.lease, a.row.receipt) for a in e.held if a.holder in e.clients]
    for holder, lease, receipt in (*shown, *(("the scheduler", a.lease, a.row.receipt) for a in e.attempts)):
        if not receipt or lease is None or lease.provider not in known:
            continue
        journaled = e.journaled.get(lease.struct_hash)
        same = journaled is not None and journaled.row.signed_receipt == receipt
        yield "" if same else f"{holder} holds a receipt of {_name(lease)} that is not in its provider's journal"
    for a in e.journaled.values():
        if a.row.state in SETTLED and not a.row.signed_receipt:
            yield f"{a.holder} settled {_name(a.lease)} and has no receipt of it in its journal"


def _unjournaled_redemptions(e: Evidence) -> Iterator[str]:
    """What was redeemed of a channel, its payee holds a voucher for, or its payer's guard released: a payer may push by itself."""
    most = Counter[bytes](_guards(e))
    for channel, cumulative, _, _ in _vouchers(e):
        most[channel] = max(most[channel], cumulative)
    audited = {row.id for books in e.schedulers.values() for row in (*books.client_channels, *books.spokes)}
    for c in e.chain.channels.values():
        if c.id in audited and c.claimed > most[c.id]:
            yield f"{c.claimed} was redeemed of channel {short(c.id)}, journaled is {most[c.id]}"


# --- I3 ------------------------------------------------------------------------------------------------------------------------


def guarded(e: Evidence) -> Finding:
    """Every voucher is signed by its channel's signer and not above what the payer's guard released; no channel is without its guard."""
    guards, problems, count = _guards(e), list[str](), 0
    for channel, cumulative, signature, holder in _vouchers(e):
        on_chain = e.chain.channels.get(Hash(channel))
        count += 1
        if on_chain is None:
            problems.append(f"{holder} holds a voucher for channel {short(channel)}, which is not on the chain")
            continue
        if cumulative and (flaw := _voucher_flaw(e, channel, cumulative, signature, on_chain.signer)):
            problems.append(f"{holder}: the voucher of {cumulative} for channel {short(channel)}: {flaw}")
        if channel not in guards and _payer_is_audited(e, on_chain.payer, channel):
            problems.append(f"{holder} holds a voucher of {cumulative} for channel {short(channel)}; its payer's guard is missing")
        elif cumulative > guards.get(channel, cumulative):
            problems.append(f"{holder} holds a voucher of {cumulative} for channel {short(channel)}; the guard stands at {guards[channel]}")
    problems += _lower_vouchers(e, guards)
    return Finding(tuple(problems), f"{count} vouchers of {len(guards)} guarded channels, each signed, none above its guard")


def _lower_vouchers(e: Evidence, guards: Mapping[bytes, int]) -> Iterator[str]:
    for name, books in e.schedulers.items():
        for row in books.spokes:
            if guards.get(row.id, -1) > row.vouchered:
                yield f"{name}: spoke {short(row.id)} says {row.vouchered} was vouchered, its guard released {guards[row.id]}"
            if row.id not in guards:
                yield f"{name}: the guard of spoke {short(row.id)} is missing"
        for row in books.client_channels:
            rungs = [amount for amount, _ in ladder.steps(row.ladder)]
            if any(low >= high for low, high in pairwise([*rungs, row.voucher])):
                yield f"{name}: the vouchers kept of client channel {short(row.id)} do not rise: {rungs}, {row.voucher}"
            on_chain = e.chain.channels.get(Hash(row.id))
            if on_chain is not None and not on_chain.closed and on_chain.claimed > row.voucher:
                yield f"{name}: a voucher of {row.voucher} for channel {short(row.id)}, of which {on_chain.claimed} was redeemed"
    for name, books_ in e.clients.items():
        for row in books_.channels:
            if guards.get(row.id, -1) < row.voucher:
                yield f"{name}: signed {row.voucher} for channel {short(row.id)}, its guard stands at {guards.get(row.id, 'nothing')}"
    for name, held in e.providers.items():
        for row in held.vouchers:
            paid = e.chain.channels[Hash(row.channel)].claimed if Hash(row.channel) in e.chain.channels else 0
            if paid > row.cumulative and paid > guards.get(row.channel, paid):
                yield f"{name}: a voucher of {row.cumulative} for channel {short(row.channel)}, of which {paid} was redeemed"


def _guards(e: Evidence) -> dict[bytes, int]:
    guards = [*(books.guard for books in e.schedulers.values()), *(books.guard for books in e.clients.values())]
    return {bytes(row.channel): row.cumulative for rows in guards for row in rows}


def _vouchers(e: Evidence) -> Iterator[tuple[bytes, int, bytes, str]]:
    """(channel, cumulative, signature, holder) of every voucher that a payee holds."""
    for name, held in e.providers.items():
        yield from ((row.channel, row.cumulative, row.signature, name) for row in held.vouchers)
    for name, books in e.schedulers.items():
        for row in books.client_channels:
            yield row.id, row.voucher, row.signature, name
            yield from ((row.id, amount, signature, name) for amount, signature in ladder.steps(row.ladder))


def _voucher_flaw(e: Evidence, channel: bytes, cumulative: int, signature: bytes, signer: Address) -> str:
    try:
        verify_voucher(e.channels_domain, Hash(channel), cumulative, signature, signer)
    except BadSignature as error:
        return error.message
    return ""


def _payer_is_audited(e: Evidence, payer: Address, channel: bytes) -> bool:
    """Whether the books of the channel's payer are among the evidence."""
    spokes = {row.id for books in e.schedulers.values() for row in books.spokes}
    return channel in spokes or any(row.id == channel for books in e.clients.values() for row in books.channels)


# --- I4 ------------------------------------------------------------------------------------------------------------------------


def bounded_exposure(e: Evidence) -> Finding:
    """A client is exposed by W at most, a provider by one window of each attempt, and a scheduler reserves what its jobs may still earn."""
    problems, most = list[str](), 0
    limits = {row.id: (name, e.exposure[name]) for name, books in e.clients.items() if name in e.exposure for row in books.channels}
    for books in e.schedulers.values():
        for row in books.client_channels:
            name, limit = limits.get(row.id, ("", None))
            most = max(most, row.voucher - row.used)
            if limit is not None and row.voucher - row.used > limit:
                problems.append(f"{name} is exposed to {row.voucher - row.used} on channel {short(row.id)}, its limit is {limit}")
    problems += _unreserved(e)
    problems += _beyond_the_window(e)
    return Finding(tuple(problems), f"clients are exposed to {format_money(most)} at most", {"exposure_max": most})


def _beyond_the_window(e: Evidence) -> Iterator[str]:
    for a in e.journaled.values():
        if a.lease is None or a.receipt is None:
            continue
        item = a.row.prompt_units if a.lease.task is not Task.GENERATE else 0  # a row goes out whole, with as many units as its input has
        if a.receipt.output_units - a.units > a.lease.window_units + item:
            sent = f"{a.holder} sent {a.receipt.output_units} units on {_name(a.lease)} with {a.units} acked"
            yield f"{sent}; the window is {a.lease.window_units}"


def _unreserved(e: Evidence) -> Iterator[str]:
    expected = Counter[bytes]()
    for a in e.attempts:
        if a.lease is not None and a.row.state == AttemptState.OPEN:
            expected[a.lease.provider_channel] += a.lease.maximum
        elif a.lease is not None and a.row.state == AttemptState.HELD:
            expected[a.lease.provider_channel] += a.row.amount
    for name, books in e.schedulers.items():
        for row in books.spokes:
            if row.reserved != expected[row.id]:
                yield f"{name}: {row.reserved} is reserved on spoke {short(row.id)}, its open jobs may earn {expected[row.id]}"


# --- I5 ------------------------------------------------------------------------------------------------------------------------


def paid_once(e: Evidence) -> Finding:
    """Every (job, attempt) is there once; what it is owed is what its acked units are worth; a channel paid the sum of these, no more."""
    problems = [f"{a.name}: {flaw}" for a in e.attempts for flaw in a.flaws]
    problems += [*_strangers(e), *_twice(e)]
    earned, charged = Counter[bytes](), Counter[bytes]()
    overpaid = owed = 0
    for a in e.attempts:
        if a.row.state != AttemptState.OWED or a.lease is None:
            continue
        earned[a.lease.provider_channel] += a.row.amount
        charged[a.row.job] += a.cost
        owed += a.row.amount
        if a.row.amount > a.worth:
            overpaid += a.row.amount - a.worth
            problems.append(f"{a.name} is owed {a.row.amount}, its {a.units} acked units are worth {a.worth}")
    problems += _beyond_their_maximum(e, charged)
    problems += _unearned(e, earned)
    paid = sum(c.claimed for c in e.chain.channels.values())
    figures = {"attempts": len(e.attempts), "owed": owed, "overpaid": overpaid, "paid_on_chain": paid}
    return Finding(tuple(problems), f"{len(e.attempts)} attempts, {format_money(owed)} owed, overpaid {format_money(overpaid)}", figures)


def _strangers(e: Evidence) -> Iterator[str]:
    """Leases whose channels are not between their own parties: whoever signed them pays for nothing."""
    for a in e.attempts:
        if a.lease is None:
            continue
        spoke, hub = e.chain.channels.get(a.lease.provider_channel), e.chain.channels.get(a.lease.client_channel)
        if spoke is None or (spoke.payer, spoke.payee) != (a.lease.scheduler, a.lease.provider):
            yield f"{a.name}: its spoke {short(a.lease.provider_channel)} is not between its scheduler and its provider"
        if hub is None or (hub.signer, hub.payee) != (a.lease.client, a.lease.scheduler):
            yield f"{a.name}: its channel {short(a.lease.client_channel)} is not between its client and its scheduler"


def _twice(e: Evidence) -> Iterator[str]:
    ledger = Counter((bytes(a.row.job), a.row.number) for a in e.attempts)
    served = Counter((bytes(a.lease.job), a.lease.attempt) for a in e.held if a.lease is not None and a.holder in e.providers)
    for counts, what in ((ledger, "is in the ledger"), (served, "was served")):
        for (job, number), count in counts.items():
            if count > 1:
                yield f"attempt {number} of job {short(job)} {what} {count} times"
    yield from _units_twice(e)


def _units_twice(e: Evidence) -> Iterator[str]:
    """Output that two attempts are paid for: each begins where the one before it ended, unless its client called that bad."""
    jobs: dict[bytes, list[OpenedAttempt]] = {}
    for a in e.attempts:
        if a.lease is not None and a.row.state == AttemptState.OWED:
            jobs.setdefault(bytes(a.row.job), []).append(a)
    for job, attempts in jobs.items():
        attempts.sort(key=lambda a: a.row.number)
        for before, after in pairwise(attempts):
            assert before.lease is not None and after.lease is not None
            if before.row.reason != _BAD_OUTPUT and before.lease.prefix_units + before.units > after.lease.prefix_units:
                again = before.lease.prefix_units + before.units - after.lease.prefix_units
                yield f"job {short(job)}: {again} units are paid by attempt {before.row.number} and by {after.row.number}"


def _beyond_their_maximum(e: Evidence, charged: Mapping[bytes, int]) -> Iterator[str]:
    maximum = {bytes(a.row.job): a.spec.max_amount for a in e.attempts if a.spec is not None}
    for job, amount in charged.items():
        if amount > maximum.get(job, amount):
            yield f"job {short(job)} cost {amount}, its maximum was {maximum[job]}"
    for name, books in e.clients.items():
        for row in books.jobs:
            if row.state == "done" and charged.get(bytes(row.job), 0) > row.billed:
                yield f"{name} was charged {charged[bytes(row.job)]} for job {short(row.job)}, by its own acks it costs {row.billed}"


def _unearned(e: Evidence, earned: Mapping[bytes, int]) -> Iterator[str]:
    for name, books in e.schedulers.items():
        for row in books.spokes:
            if row.vouchered != earned.get(row.id, 0):
                yield f"{name}: {row.vouchered} was vouchered on spoke {short(row.id)}, its attempts earned {earned.get(row.id, 0)}"
            on_chain = e.chain.channels.get(Hash(row.id))
            if on_chain is not None and on_chain.claimed > earned.get(row.id, 0):
                yield f"{name}: {on_chain.claimed} was paid on spoke {short(row.id)}, its attempts earned {earned.get(row.id, 0)}"


# --- I6 ------------------------------------------------------------------------------------------------------------------------


def all_ended(e: Evidence) -> Finding:
    """No job, attempt or claim is left open with anybody, and nobody knows a job that its scheduler has lost."""
    problems, jobs, states = list[str](), 0, Counter[str]()
    known = {bytes(row.key) for books in e.schedulers.values() for row in books.jobs}
    for name, books in e.schedulers.items():
        for row in books.jobs:
            jobs, states[JobState(row.state).name.lower()] = jobs + 1, states[JobState(row.state).name.lower()] + 1
            if row.state in _UNENDED_JOBS or row.open or row.live_until == FOREVER:
                problems.append(f"{name}: job {short(row.key)} is {JobState(row.state).name.lower()}, {row.open} still open")
        for row in books.attempts:
            if row.state in (AttemptState.OPEN, AttemptState.HELD):
                problems.append(f"{name}: attempt {row.number} of job {short(row.job)} is {AttemptState(row.state).name.lower()}")
    lost = 0
    for a in e.held:
        if a.lease is not None and bytes(a.lease.job) not in known:
            lost += 1
            problems.append(f"{a.holder} knows job {short(a.lease.job)}, and no scheduler does")
        if a.holder in e.providers and a.row.state not in SETTLED:
            problems.append(f"{a.holder}: attempt {a.row.attempt} of job {short(a.row.job)} is {a.row.state}")
    for name, books_ in e.clients.items():
        waiting = [row for row in books_.jobs if row.state in _UNENDED_ORDERS]
        problems += [f"{name}: job {short(row.job)} is {row.state}" for row in waiting]
    seen = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return Finding(tuple(problems), f"{jobs} jobs: {seen or 'none'}", {"jobs": jobs, "lost": lost, **states})


def _name(lease: Any) -> str:
    return short(lease.struct_hash) if lease is not None else "that cannot be read"


RULES: dict[str, Callable[[Evidence], Finding]] = {
    "I1": solvency,
    "I2": durable,
    "I3": guarded,
    "I4": bounded_exposure,
    "I5": paid_once,
    "I6": all_ended,
}

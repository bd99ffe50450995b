"""Ledger state to rows and back. Only here do the scheduler's tables meet SQL; portable statements only, many rows at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Table, bindparam, insert, select, update

from gpumarket.core.codec import from_proto, parse
from gpumarket.core.terms import JobSpec, Lease
from gpumarket.core.units import Address, Hash
from gpumarket.scheduler import tables as t
from gpumarket.scheduler.lifecycle import Attempt, AttemptState, Job, JobState, charged, finished
from gpumarket.scheduler.prepared import Prepared
from gpumarket.scheduler.reputation import Reputation
from gpumarket.settlement import guard
from gpumarket.settlement.channel import PaidChannel, ReceivedChannel
from gpumarket.v1 import terms_pb2 as pb

Row = dict[str, Any]


@dataclass(slots=True)
class Dirty:
    """What changed since the last flush."""

    jobs: set[Hash] = field(default_factory=set)
    hubs: set[Hash] = field(default_factory=set)
    spokes: set[Hash] = field(default_factory=set)
    reputations: set[Address] = field(default_factory=set)
    offers: dict[Hash, bytes] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.jobs or self.hubs or self.spokes or self.reputations or self.offers)


@dataclass(slots=True)
class Kept:
    """What a restart reads."""

    jobs: list[Job]
    hubs: list[tuple[ReceivedChannel, Address, bool]]
    spokes: list[tuple[PaidChannel, Address, int]]
    reputations: dict[Address, Reputation]
    offers: list[Hash]


def held(job: Job) -> int:
    """What the job's client has held for it, fees included."""
    return sum(charged(a) for a in job.attempts if a.state is AttemptState.HELD)


class Batch:
    """Rows of one flush, as of one point in time. Built in the loop's thread, written in the journal's."""

    def __init__(self) -> None:
        self._new: dict[Table, list[Row]] = {}
        self._changed: dict[Table, list[Row]] = {}
        self.guards: list[tuple[Hash, int]] = []
        self._admitted: list[Hash] = []
        self.new_jobs: list[Hash] = []
        self.new_attempts: list[Hash] = []
        self.new_offers: list[Hash] = []
        self.new_hubs: list[Hash] = []
        self.new_spokes: list[Hash] = []
        self.new_reputations: list[Address] = []

    def add_job(self, job: Job, *, new: bool, known_attempts: Collection[Hash]) -> None:
        live_until = job.spec.deadline if finished(job) else t.FOREVER
        row: Row = {"key": job.key, "state": int(job.state), "open": job.open, "live_until": live_until}
        if new:
            self.new_jobs.append(job.key)
            row |= {"client": job.spec.client, "channel": job.channel, "job_order": job.order}
            row["created_at"] = job.created_at
        self._put(t.jobs, row, new)
        for attempt in job.attempts:
            known = attempt.hash in known_attempts
            if not known:
                self.new_attempts.append(attempt.hash)
            self._put(t.attempts, _attempt_row(job, attempt, new=not known), new=not known)

    def add_hub(self, state: ReceivedChannel, payer: Address, close_signed: bool, *, new: bool) -> None:
        row: Row = {name: getattr(state, name) for name in _HUB}
        row |= {"id": state.id, "close_signed": close_signed}
        if new:
            self.new_hubs.append(state.id)
            row |= {"payer": payer, "signer": state.signer}
        self._put(t.client_channels, row, new)

    def add_spoke(self, state: PaidChannel, provider: Address, *, new: bool, pays: bool) -> None:
        row: Row = {name: getattr(state, name) for name in _SPOKE} | {"id": state.id}
        if new:
            self.new_spokes.append(state.id)
            self._admitted.append(state.id)
            row |= {"provider": provider}
        if pays:
            self.guards.append((state.id, state.vouchered))
        self._put(t.spokes, row, new)

    def add_reputation(self, provider: Address, reputation: Reputation, *, new: bool) -> None:
        if new:
            self.new_reputations.append(provider)
        self._put(t.reputations, {"provider": provider} | {name: getattr(reputation, name) for name in _REPUTATION}, new)

    def add_offers(self, offers: Mapping[Hash, bytes]) -> None:
        self.new_offers.extend(offers)
        for digest, signed in offers.items():
            self._put(t.offers, {"hash": digest, "signed_offer": signed}, new=True)

    def write(self, connection: Connection) -> None:
        """Run in the journal's transaction: rows, and the guard of every channel that pays."""
        for table, rows in self._new.items():
            INSERTS[table].run(connection, rows)
        for table, rows in self._changed.items():
            UPDATES[table].run(connection, rows)
        for channel in self._admitted:
            guard.admit(connection, channel)
        for channel, cumulative in self.guards:
            guard.advance(connection, channel, cumulative)

    def _put(self, table: Table, row: Row, new: bool) -> None:
        if new:
            self._new.setdefault(table, []).append(row)
        else:
            row["pk"] = row.pop(_KEYS[table])
            self._changed.setdefault(table, []).append(row)


_HUB = ("deposit", "expires_at", "voucher", "signature", "ladder", "used", "held", "open", "redeemed", "closing", "closed")
_SPOKE = ("deposit", "expires_at", "vouchered", "reserved", "redeemed", "closing", "closed")
_REPUTATION = ("kept", "broken", "updated_at", "jailed_until", "rejections")
_TABLES = (t.jobs, t.attempts, t.offers, t.client_channels, t.spokes, t.reputations)
_ATTEMPT = ("amount", "units", "complete", "accepted", "hold_until", "receipt", "ack", "outcome", "reason")
_KEYS = {table: next(iter(table.primary_key)).name for table in _TABLES}


def _update(table: Table, *names: str) -> Prepared:
    key = next(iter(table.primary_key))
    statement = update(table).where(key == bindparam("pk")).values({name: bindparam(name) for name in names})
    return Prepared(statement, table, ("pk", *names))


INSERTS = {table: Prepared(insert(table), table, tuple(table.columns.keys())) for table in _TABLES}
UPDATES = {
    t.jobs: _update(t.jobs, "state", "open", "live_until"),
    t.attempts: _update(t.attempts, "state", *_ATTEMPT),
    t.client_channels: _update(t.client_channels, *_HUB, "close_signed"),
    t.spokes: _update(t.spokes, *_SPOKE),
    t.reputations: _update(t.reputations, *_REPUTATION),
}


def load(connection: Connection, now: int) -> Kept:
    """Everything that a restart needs."""
    rows = connection.execute(select(t.jobs).where(t.jobs.c.live_until >= now)).mappings().all()
    guards = {row.channel: row.cumulative for row in connection.execute(select(t.guard))}
    hubs = [
        (ReceivedChannel(Hash(r["id"]), Address(r["signer"]), **{n: r[n] for n in _HUB}), Address(r["payer"]), r["close_signed"])
        for r in connection.execute(select(t.client_channels)).mappings()
    ]
    spokes = [
        (PaidChannel(Hash(r["id"]), Address(r["provider"]), **{n: r[n] for n in _SPOKE}), Address(r["provider"]), guards[r["id"]])
        for r in connection.execute(select(t.spokes)).mappings()
    ]
    reputations = {
        Address(r["provider"]): Reputation(**{n: r[n] for n in _REPUTATION}) for r in connection.execute(select(t.reputations)).mappings()
    }
    offers = [Hash(h) for h in connection.execute(select(t.offers.c.hash)).scalars()]
    return Kept([_job(connection, r) for r in rows], hubs, spokes, reputations, offers)


def load_job(connection: Connection, key: Hash) -> Job | None:
    """One job with its attempts."""
    row = connection.execute(select(t.jobs).where(t.jobs.c.key == key)).mappings().one_or_none()
    return None if row is None else _job(connection, row)


def load_lease(connection: Connection, lease: Hash) -> tuple[Hash, int] | None:
    """(job, attempt number) of a lease."""
    found = connection.execute(select(t.attempts.c.job, t.attempts.c.number).where(t.attempts.c.lease == lease)).one_or_none()
    return None if found is None else (Hash(found.job), found.number)


def _job(connection: Connection, row: Mapping[Any, Any]) -> Job:
    found = select(t.attempts, t.offers.c.signed_offer).join(t.offers, t.attempts.c.offer == t.offers.c.hash)
    attempts = connection.execute(found.where(t.attempts.c.job == row["key"]).order_by(t.attempts.c.number)).mappings()
    return Job(
        key=Hash(row["key"]),
        spec=from_proto(JobSpec, parse(pb.JobOrder, row["job_order"]).spec),
        order=row["job_order"],
        channel=Hash(row["channel"]),
        created_at=row["created_at"],
        state=JobState(row["state"]),
        open=row["open"],
        attempts=tuple(_attempt(a) for a in attempts),
    )


def _attempt(row: Mapping[Any, Any]) -> Attempt:
    lease = from_proto(Lease, parse(pb.SignedLease, row["signed_lease"]).lease)
    state = AttemptState(row["state"])
    return Attempt(lease, Hash(row["lease"]), row["signed_lease"], row["signed_offer"], state, **{name: row[name] for name in _ATTEMPT})


def _attempt_row(job: Job, attempt: Attempt, *, new: bool) -> Row:
    row: Row = {name: getattr(attempt, name) for name in _ATTEMPT} | {"lease": attempt.hash, "state": int(attempt.state)}
    if new:
        row |= {"job": job.key, "number": attempt.lease.attempt, "provider": attempt.lease.provider}
        row |= {"signed_lease": attempt.signed, "offer": offer_digest(attempt.offer)}
    return row


def offer_digest(signed: bytes) -> Hash:
    """Name of a stored offer: sha256 of its serialized SignedOffer."""
    return Hash(hashlib.sha256(signed).digest())

"""I1 to I8 over a simulated world: what must hold after every step, at every message that leaves, and once all is quiet.

Steps look at memory and disks of the living; `Watch` looks at each message as it leaves its sender, when what it says must be durable (I2)
and signatures must only rise (I3). `settled` looks at the end, when time alone had its say (I6).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from simulation.medium import Medium
from simulation.provider_role import ProviderRole
from simulation.shop import CLIENT, CLIENT_SETTINGS, PROVIDER_SETTINGS, SCHEDULER_SETTINGS
from simulation.virtual import START
from simulation.world import World
from sqlalchemy import select

from gpumarket.core.codec import from_proto, parse
from gpumarket.core.errors import JournalError
from gpumarket.core.terms import Ack, JobSpec, Lease, Receipt
from gpumarket.core.units import Hash, money_from_bytes
from gpumarket.node import tables as node
from gpumarket.node.provider import credit_start
from gpumarket.scheduler import records
from gpumarket.scheduler import tables as ledger
from gpumarket.scheduler.jobs import AttemptState, JobState, charged
from gpumarket.scheduler.lifecycle import finished
from gpumarket.sdk import tables as client
from gpumarket.settlement.channel import check
from gpumarket.settlement.pricing import attempt_amount, client_amount, counts_as_complete
from gpumarket.v1 import market_pb2 as mpb
from gpumarket.v1 import provider_pb2 as ppb
from gpumarket.v1 import terms_pb2 as pb


class Broken(AssertionError):
    """An invariant does not hold."""


LOOKS: Counter[str] = Counter()
"""How often each was looked at in this process, by its first word: I1 .. I8."""


def need(holds: bool, what: str) -> None:
    LOOKS[what.partition(":")[0]] += 1
    if not holds:
        raise Broken(what)


# --- each message ----------------------------------------------------------------------------------------------------------------


class Watch:
    """The network's tap."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._signed: dict[Hash, dict[int, bytes]] = {}
        self._risen: dict[tuple[str, bytes], int] = {}
        self._media: dict[str, Medium] = {role.name: role.medium for role in world.roles}
        self.claimed_at: dict[Hash, tuple[int, int, object]] = {}
        """By lease: (units of the highest ack that a claim surely arrived with, when in unix seconds, at which life of the scheduler)."""
        self.broken: list[str] = []
        world.net.taps.append(self)

    def __call__(self, sender: str, method: str, message: Any) -> None:
        try:
            self._look(sender, message)
        except Broken as error:
            self.broken.append(f"{sender} {method}: {error}")

    def _look(self, sender: str, message: Any) -> None:
        match message:
            case mpb.MatchRequest() if message.HasField("voucher"):
                self._voucher(sender, message.voucher)
            case mpb.MatchReply() if message.HasField("granted"):
                self._durable(sender, ledger.attempts, "lease", _lease_hash(message.granted.lease), "a lease")
            case mpb.ClaimReply():
                if message.HasField("voucher"):
                    self._voucher(sender, message.voucher)
            case mpb.HeartbeatDown() if message.HasField("voucher"):
                self._voucher(sender, message.voucher)
            case ppb.InferReply() if message.HasField("finished"):
                self._receipt(sender, message.finished.receipt)
            case ppb.InferRequest() if message.HasField("ack"):
                self._ack(sender, message.ack)
            case pb.SignedCall():
                self._call(sender, message)

    def _voucher(self, sender: str, signed: pb.SignedVoucher) -> None:
        channel, cumulative = Hash(signed.voucher.channel), money_from_bytes(signed.voucher.cumulative)
        table = client.GUARD if sender == "client" else ledger.guard
        guard = self._media[sender].read(
            lambda c: c.execute(select(table.c.cumulative).where(table.c.channel == channel)).scalar_one_or_none()
        )
        need(guard is not None and cumulative <= guard, f"I2: a voucher of {cumulative} left, the guard says {guard}")
        before = self._signed.setdefault(channel, {})  # an old copy may be sent again: the same bytes
        need(
            cumulative in before or cumulative > max(before, default=0),
            f"I3: a voucher of {cumulative} after one of {max(before, default=0)}",
        )
        need(before.setdefault(cumulative, signed.signature) == signed.signature, f"I3: two messages for {cumulative}")

    def only_rises(self, holder: str, channel: bytes, cumulative: int) -> None:
        """Raises Broken for a holder whose durable voucher is lower than it was."""
        last = self._risen.get((holder, channel), 0)
        need(cumulative >= last, f"I3: {holder} held a voucher of {last}, and now one of {cumulative}")
        self._risen[holder, channel] = cumulative

    def _durable(self, sender: str, table: Any, column: str, key: bytes, what: str) -> None:
        found = self._media[sender].read(lambda c: c.execute(select(table.c[column]).where(table.c[column] == key)).first())
        need(found is not None, f"I2: {what} left before it was durable")

    def _receipt(self, sender: str, signed: pb.SignedReceipt) -> None:
        row = self._row(sender, node.attempts, node.attempts.c.lease == signed.receipt.lease)
        need(row is not None and row["signed_receipt"] == signed.SerializeToString(), "I2: a receipt left before it was durable")

    def _ack(self, sender: str, signed: pb.SignedAck) -> None:
        acks = self._media[sender].read(lambda c: c.execute(select(client.ATTEMPTS.c.lease, client.ATTEMPTS.c.ack)).all())
        for lease, ack in acks:
            if ack is not None and _lease_hash(parse(pb.SignedLease, lease)) == signed.ack.lease:
                need(parse(pb.SignedAck, ack).ack.units >= signed.ack.units, "I2: an ack left before it was durable")
                return
        need(False, "I2: an ack left before it was durable")

    def _call(self, sender: str, call: pb.SignedCall) -> None:
        if not sender.startswith("provider"):
            return
        body = mpb.ClaimRequest()
        body.ParseFromString(call.body)
        lease = _lease_hash(body.lease)
        self._durable(sender, node.attempts, "lease", lease, "a claim")
        units = body.last_ack.ack.units
        world = self._world
        arrives = world.scheduler.market is not None and not world.net.weather.lost and not {sender, "scheduler"} & world.net.cut
        if arrives and (lease not in self.claimed_at or units > self.claimed_at[lease][0]):
            self.claimed_at[lease] = units, int(START + world.timeline.now), world.scheduler.process

    def _row(self, sender: str, table: Any, where: Any) -> Any:
        return self._media[sender].read(lambda c: c.execute(select(table).where(where)).mappings().first())


# --- each step -------------------------------------------------------------------------------------------------------------------


def holds_now(world: World, watch: Watch) -> None:
    """Raises Broken with the first invariant that does not hold."""
    need(not world.timeline.defects, f"a role failed by a defect: {world.timeline.defects[:2]}")
    need(not watch.broken, f"{watch.broken[:2]}")
    _chain(world)
    _scheduler_memory(world)
    _scheduler_disk(world, watch)
    _client(world)
    _providers(world)
    for role in world.providers:
        for row in role.medium.read(lambda c: c.execute(select(node.vouchers.c.channel, node.vouchers.c.cumulative)).all()):
            watch.only_rises(role.name, row.channel, row.cumulative)


def _chain(world: World) -> None:
    contract = world.chain.head
    need(contract.escrow == contract.owed(), f"I1: the contract holds {contract.escrow} and owes {contract.owed()}")
    for channel in contract.channels.values():
        need(0 <= channel.claimed <= channel.deposit, f"I1: {channel}")


def _scheduler_memory(world: World) -> None:
    market = world.scheduler.market
    if market is None or not world.scheduler.alive:
        return
    book = market.ledger
    need(book.failure is None, f"the scheduler's ledger has failed: {book.failure}")
    try:
        book.check()
    except JournalError as error:
        raise Broken(f"I1: {error.message}") from error
    for hub in book.hubs.values():
        check(hub.state)
        jobs = [job for job in book.jobs.values() if job.channel == hub.state.id]
        for job in jobs:
            need(job.spent + job.open <= job.spec.max_amount + len(job.attempts), f"I4: a job may cost {job.spent + job.open}")
    for spoke in book.spokes.values():
        check(spoke.state)
        owed = [a for j in book.jobs.values() for a in j.attempts if a.lease.provider_channel == spoke.state.id]
        waiting: int = sum(a.lease.maximum for a in owed if a.state is AttemptState.OPEN)
        waiting += sum(a.amount for a in owed if a.state is AttemptState.HELD)
        need(spoke.state.reserved == waiting, f"I1: {spoke.state.reserved} is reserved for a provider, its attempts need {waiting}")
    for job in book.jobs.values():
        opened = [a for a in job.attempts if a.state is AttemptState.OPEN]
        need(not opened or opened == [job.newest], "I5: an attempt that is not the newest is open")


def _scheduler_disk(world: World, watch: Watch) -> None:
    medium = world.scheduler.medium

    def look(connection: Any) -> tuple[Any, ...]:
        rows = [connection.execute(select(t)).mappings().all() for t in (ledger.attempts, ledger.spokes, ledger.client_channels)]
        jobs = {r["key"]: r for r in connection.execute(select(ledger.jobs)).mappings()}
        return (*rows, jobs, {g.channel: g.cumulative for g in connection.execute(select(ledger.guard))})

    attempts, spokes, hubs, jobs, guards = medium.read(look)
    paid: dict[bytes, int] = {}
    used: dict[bytes, int] = {}
    for row in attempts:
        if row["state"] != AttemptState.OWED:
            continue
        lease = from_proto(Lease, parse(pb.SignedLease, row["signed_lease"]).lease)
        need(row["amount"] <= lease.maximum, "I5: an attempt is owed more than its lease")
        paid[lease.provider_channel] = paid.get(lease.provider_channel, 0) + row["amount"]
        channel = jobs[row["job"]]["channel"]
        used[channel] = used.get(channel, 0) + client_amount(row["amount"], lease.fee_ppm)
    live = world.scheduler.market
    for row in spokes:
        vouchered = paid.get(row["id"], 0)
        need(row["vouchered"] == vouchered, f"I5: a provider was vouchered {row['vouchered']} and earned {vouchered}")
        # what is owed may pass the guard after a restart, until the payee was heard: then nothing was released of it
        spoke = live.ledger.spokes.get(row["id"]) if live is not None else None
        released = spoke.released if spoke is not None else 0
        need(guards[row["id"]] >= released, f"I3: the guard {guards[row['id']]} is below {released}, which was released")
    for row in hubs:
        watch.only_rises("scheduler", row["id"], row["voucher"])
        need(row["used"] == used.get(row["id"], 0), f"I7: the client was charged {row['used']}, its attempts cost {used.get(row['id'], 0)}")
        need(row["used"] + row["held"] + row["open"] <= row["voucher"] <= row["deposit"], f"I1: {dict(row)}")


def _client(world: World) -> None:
    medium = world.client.medium

    def look(connection: Any) -> tuple[Any, Any]:
        channels = connection.execute(select(client.CHANNELS)).mappings().all()
        return channels, {g.channel: g.cumulative for g in connection.execute(select(client.GUARD))}

    channels, guards = medium.read(look)
    used = {
        row.id: (row.used, row.voucher)
        for row in world.scheduler.medium.read(
            lambda c: c.execute(select(ledger.client_channels.c.id, ledger.client_channels.c.used, ledger.client_channels.c.voucher)).all()
        )
    }
    for row in channels:
        theirs, taken = used.get(row["id"], (0, 0))
        need(row["voucher"] == guards[row["id"]], "I3: the client's guard is not its voucher")
        need(taken <= row["voucher"], f"I2: the scheduler holds a voucher of {taken}, the client signed {row['voucher']}")
        over = row["voucher"] - theirs
        need(over <= CLIENT_SETTINGS.exposure_limit, f"I4: the client is exposed to {over} of {CLIENT_SETTINGS.exposure_limit}")
    if world.client.alive and world.client.desk is not None:
        for state in world.client.desk.account._channels.values():
            need(state.open >= 0, f"I4: jobs worth {state.open} run on a channel: one was let go of twice")


def _providers(world: World) -> None:
    guards = {g.channel: g.cumulative for g in world.scheduler.medium.read(lambda c: c.execute(select(ledger.guard)).all())}
    for role in world.providers:
        for channel, held in role.vouchers().items():
            need(held.cumulative <= guards.get(channel, -1), f"I2: {role.name} holds {held.cumulative}, guarded is {guards.get(channel)}")
        provider = getattr(role, "provider", None)
        if provider is None or not role.alive:
            continue
        for session in provider.service._sessions.values():
            attempt = session._attempt
            ahead = attempt.meter.sent - attempt.meter.acked
            need(ahead <= attempt.lease.window_units, f"I4: {ahead} units unacknowledged")  # no item here is above half a window
        start = credit_start(PROVIDER_SETTINGS, provider.house)
        for standing in provider.accounts._standings.values():
            limit = standing.limit(start, PROVIDER_SETTINGS.credit_growth)
            earned = sum(standing.unpaid.values())
            need(standing.owed <= limit + earned, f"I4: {role.name} is owed {standing.owed}, its limit is {limit}")
            need(len(standing.open) <= sum(m.slots + PROVIDER_SETTINGS.queue_limit for m in provider.house.models.values()), "I8: places")


# --- the end ---------------------------------------------------------------------------------------------------------------------


def settled(world: World, watch: Watch, honest: Sequence[ProviderRole]) -> None:
    """After the last fault and enough time: every job has ended everywhere, nothing is reserved, evidence was honoured."""
    market = world.scheduler.market
    assert market is not None
    for job in market.ledger.jobs.values():
        need(finished(job), f"I6: job {job.key.hex()[:8]} is {job.state.name}: {[(a.state.name, a.hold_until) for a in job.attempts]}")
        need(job.state not in (JobState.LEASED, JobState.CHECKING, JobState.DELIVERED), f"I6: job {job.key.hex()[:8]} is {job.state.name}")
    for hub in market.ledger.hubs.values():
        need((hub.state.open, hub.state.held) == (0, 0), f"I6: {hub.state.open} open, {hub.state.held} held")
    for spoke in market.ledger.spokes.values():
        need(spoke.state.reserved == 0, f"I6: {spoke.state.reserved} is still reserved")
    states = world.client.medium.read(lambda c: c.execute(select(client.JOBS.c.job, client.JOBS.c.state)).all())
    unended = [(row.job.hex()[:8], row.state) for row in states if row.state in ("ordered", "leased", "delivered")]
    need(not unended, f"I6: the client's jobs {unended} have not ended")
    for role in world.providers:
        kept = role.medium.read(lambda c: c.execute(select(node.attempts)).mappings().all())
        rows = [row for row in kept if not _unpayable(world, row)]
        waiting = [r["state"] for r in rows if r["state"] not in node.SETTLED]
        need(not waiting, f"I6: {role.name} has bills {waiting}")
        for row in rows:
            need(row["state"] != node.REJECTED or role not in honest, f"honest {role.name} was rejected: {row['reason']}")
            _honoured(row, watch, world.scheduler.process)
    _delivered_is_billed(world)


def client_is_out(world: World) -> None:
    """Everything has ended and it asked to close with consent: no channel that its journal knows is open and closed by nobody. One whose
    opening a crash interrupted is known again with the next purchase."""
    known = world.client.medium.read(lambda c: set(c.execute(select(client.CHANNELS.c.id)).scalars()))
    left = [c for c in world.chain.head.channels.values() if c.payer == CLIENT.address and not c.closes_at and c.id in known]
    need(not left, f"a client cannot get out: {[c.id.hex()[:8] for c in left]}")


def _unpayable(world: World, row: Any) -> bool:
    """Still unpaid, and its channel was closed with the scheduler's key behind its daemon's back: no voucher can follow. What is lost so is
    within the provider's credit, which `holds_now` watches."""
    channel = Hash(parse(pb.SignedLease, row["signed_lease"]).lease.provider_channel)
    return row["state"] not in node.SETTLED and channel in world.closed_alone and channel not in world.chain.head.channels


def _honoured(row: Any, watch: Watch, scheduler: object) -> None:
    """A provider whose claim came in time is paid what the client's ack proves, unless two checks speak against it."""
    if row["state"] == node.REJECTED or row["signed_ack"] is None:
        return
    lease = from_proto(Lease, parse(pb.SignedLease, row["signed_lease"]).lease)
    spec = from_proto(JobSpec, parse(pb.JobOrder, row["signed_order"]).spec)
    ack = from_proto(Ack, parse(pb.SignedAck, row["signed_ack"]).ack)
    proven = attempt_amount(lease, prompt_units=row["prompt_units"], units=ack.units, complete=ack.complete)
    units, at, life = watch.claimed_at.get(Hash(row["lease"]), (0, 2**62, None))
    if units < ack.units or life is not scheduler or at >= spec.deadline + SCHEDULER_SETTINGS.claim_grace_seconds - 10:
        return  # evidence counts until the claim grace is over
    need((row["amount"] or 0) >= proven, f"I7: acked evidence of {proven} was paid with {row['amount']} ({row['state']}, {row['reason']})")


def _delivered_is_billed(world: World) -> None:
    """No attempt is owed more than its own evidence carries; nobody pays for more than the client's limit says."""

    def look(connection: Any) -> Any:
        return [records._job(connection, row) for row in connection.execute(select(ledger.jobs)).mappings()]

    for job in world.scheduler.medium.read(look):
        need(sum(charged(a) for a in job.attempts) <= job.spec.max_amount, "I7: a job cost more than its maximum")
        for attempt in job.attempts:
            if attempt.state is not AttemptState.OWED or not attempt.amount:
                continue
            ack = from_proto(Ack, parse(pb.SignedAck, attempt.ack).ack) if attempt.ack else None
            receipt = from_proto(Receipt, parse(pb.SignedReceipt, attempt.receipt).receipt) if attempt.receipt else None
            complete = attempt.complete and (
                (ack is not None and ack.complete) or (receipt is not None and counts_as_complete(ack, receipt, attempt.lease.window_units))
            )
            units = ack.units if ack is not None else 0
            most = attempt_amount(attempt.lease, prompt_units=job.spec.prompt_units, units=units, complete=complete)
            need(attempt.amount <= most, f"I7: an attempt is owed {attempt.amount}, its evidence carries {most}")


def _lease_hash(signed: pb.SignedLease) -> Hash:
    return from_proto(Lease, signed.lease).struct_hash

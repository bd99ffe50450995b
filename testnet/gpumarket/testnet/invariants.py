"""The invariants of the market, checked from outside at the end of a run: on the chain, in everybody's books, in logs and processes.

Each check returns what it saw; a check that fails raises Broken with the numbers. They are the I1 .. I10 of the design: solvency, durable
before visible, never two messages for one amount, bounded exposure, paid at most once, every job ends, billed as promised, bounded
resources, no secret or prompt outside, fail closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpumarket.core.codec import from_proto, open_lease, open_receipt, parse
from gpumarket.core.errors import GpumarketError
from gpumarket.core.signing import Domain
from gpumarket.core.terms import JobSpec, Lease
from gpumarket.core.units import Address, Hash, fee_floor, format_money, hex0x
from gpumarket.scheduler.lifecycle import AttemptState, JobState
from gpumarket.testnet.chain_facts import ChainFacts
from gpumarket.testnet.ledgers import ClientBooks, ProviderBooks, SchedulerBooks
from gpumarket.v1 import terms_pb2 as pb

_UNENDED = (JobState.LEASED, JobState.DELIVERED, JobState.CHECKING)


class Broken(Exception):
    """An invariant does not hold; the text has the numbers."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that the checks look at."""

    domain: Domain
    chain: ChainFacts
    scheduler_address: Address
    scheduler: SchedulerBooks
    providers: Mapping[Address, ProviderBooks]
    client: ClientBooks
    client_limit: int
    """W: how far a client's voucher may be above what was used."""
    secrets: Sequence[bytes]
    """What must appear nowhere: prompts, passwords, keys."""
    places: Sequence[tuple[str, Callable[[], bytes]]]
    """(name, read) of every log, command line and environment."""
    processes: int
    """How many run, children included."""
    refusals: Mapping[str, bool]
    """Probe → whether it was refused."""


def check_all(evidence: Evidence) -> dict[str, tuple[bool, str]]:
    """Invariant → (holds, what was seen)."""
    found = {}
    for name, check in CHECKS.items():
        try:
            found[name] = (True, check(evidence))
        except Broken as broken:
            found[name] = (False, str(broken))
    return found


def solvency(e: Evidence) -> str:
    """I1. Tokens in the contract cover what it owes; in each ledger used + held + open never pass the vouchers received."""
    channels = [c for c in e.chain.channels.values() if not c.closed]
    owed = sum(c.deposit - c.claimed for c in channels) + e.chain.credited
    _need(e.chain.escrow == owed, f"the contract holds {e.chain.escrow}, it owes {owed}")
    for row in e.scheduler.client_channels:
        _need(
            row.used + row.held + row.open <= row.voucher <= row.deposit,
            f"client channel: {row.used}+{row.held}+{row.open} > {row.voucher}",
        )
    for row in e.scheduler.spokes:
        _need(row.vouchered + row.reserved <= row.deposit, f"spoke: {row.vouchered}+{row.reserved} > {row.deposit}")
    return f"{format_money(e.chain.escrow)} in escrow for {len(channels)} channels, all of it owed"


def durable(e: Evidence) -> str:
    """I2. Whatever one side shows, the other side's books already hold: receipts, and vouchers that were redeemed."""
    journaled = {row.lease: row for books in e.providers.values() for row in books.attempts}
    shown = 0
    for row in e.client.attempts:
        if not row.receipt:
            continue
        lease = from_proto(Lease, parse(pb.SignedLease, row.lease).lease).struct_hash
        _need(
            lease in journaled and journaled[lease].signed_receipt == row.receipt,
            f"receipt of {hex0x(lease)} is not in its provider's journal",
        )
        shown += 1
    held = {Hash(row.channel): row.cumulative for books in e.providers.values() for row in books.vouchers}
    held |= {Hash(row.id): row.voucher for row in e.scheduler.client_channels}
    for channel in e.chain.channels.values():
        _need(
            channel.claimed <= held.get(channel.id, 0),
            f"{channel.claimed} was redeemed of {hex0x(channel.id)}, journaled is {held.get(channel.id, 0)}",
        )
    return f"{shown} receipts and {len(e.chain.settlements)} redemptions stand in their makers' journals"


def guarded(e: Evidence) -> str:
    """I3. No payee holds a voucher above what its payer's guard released."""
    guard = {Hash(row.channel): row.cumulative for row in (*e.scheduler.guard, *e.client.guard)}
    vouchers = [(Hash(row.channel), row.cumulative) for books in e.providers.values() for row in books.vouchers]
    vouchers += [(Hash(row.id), row.voucher) for row in e.scheduler.client_channels]
    for channel, cumulative in vouchers:
        _need(
            cumulative <= guard.get(channel, -1),
            f"a voucher of {cumulative} for {hex0x(channel)}; the guard stands at {guard.get(channel)}",
        )
    return f"{len(vouchers)} channels, no voucher above its guard"


def bounded_exposure(e: Evidence) -> str:
    """I4. The client's voucher is at most W above what was used; nothing is reserved or held once all is settled."""
    for row in e.scheduler.client_channels:
        _need(row.voucher - row.used <= e.client_limit, f"the client is exposed to {row.voucher - row.used}, its limit is {e.client_limit}")
    left = sum(row.reserved for row in e.scheduler.spokes)
    _need(left == 0, f"{left} is still reserved for providers")
    most = max((row.voucher - row.used for row in e.scheduler.client_channels), default=0)
    return f"the client is exposed to {format_money(most)} of at most {format_money(e.client_limit)}"


def paid_once(e: Evidence) -> str:
    """I5. One row for each (job, attempt); what a channel paid is the sum of its owed attempts, and no more was ever paid on chain."""
    numbers = [(row.job, row.number) for row in e.scheduler.attempts]
    _need(len(numbers) == len(set(numbers)), "an attempt is in the ledger twice")
    owed: dict[bytes, int] = {}
    for row in e.scheduler.attempts:
        if row.state == AttemptState.OWED:
            owed[row.provider] = owed.get(row.provider, 0) + row.amount
    for spoke in e.scheduler.spokes:
        earned = owed.get(spoke.provider, 0)
        _need(spoke.vouchered == earned, f"{hex0x(spoke.provider)} was vouchered {spoke.vouchered} and earned {earned}")
        paid = e.chain.channels[Hash(spoke.id)].claimed
        _need(paid <= earned, f"{hex0x(spoke.provider)} was paid {paid} and earned {earned}")
    return f"{len(numbers)} attempts, each paid at most once"


def all_ended(e: Evidence) -> str:
    """I6. No job is left open, with the scheduler or with the client."""
    open_jobs = [row for row in e.scheduler.jobs if row.state in _UNENDED]
    _need(not open_jobs, f"{len(open_jobs)} jobs are still open with the scheduler")
    waiting = [row for row in e.client.jobs if row.state in ("ordered", "leased", "delivered")]
    _need(not waiting, f"{len(waiting)} jobs are still open with the client")
    return f"{len(e.scheduler.jobs)} jobs, all ended"


def billed_as_promised(e: Evidence) -> str:
    """I7. Every receipt and lease verifies, names the ordered model, and the client pays attempts and fees, within each job's maximum."""
    specs = {row.key: from_proto(JobSpec, parse(pb.JobOrder, row.job_order).spec) for row in e.scheduler.jobs}
    spent: dict[bytes, int] = {}
    checked = 0
    for row in e.scheduler.attempts:
        lease = _verified_lease(e.domain, row.signed_lease)
        _need(lease.model == specs[row.job].model, f"job {hex0x(row.job)} ordered another model than was leased")
        if row.receipt:
            _verify_receipt(e.domain, row.receipt, lease)
            checked += 1
        if row.state == AttemptState.OWED:
            spent[row.job] = spent.get(row.job, 0) + row.amount + fee_floor(row.amount, lease.fee_ppm)
    for job, amount in spent.items():
        _need(amount <= specs[job].max_amount, f"job {hex0x(job)} cost {amount}, its maximum was {specs[job].max_amount}")
    used = sum(row.used for row in e.scheduler.client_channels)
    _need(used == sum(spent.values()), f"clients were charged {used}, their jobs cost {sum(spent.values())}")
    return f"{checked} receipts verify; {format_money(used)} was charged, attempt by attempt as leased"


def bounded_resources(e: Evidence) -> str:
    """I8. Channels grow with clients plus providers, processes with roles; neither with jobs."""
    parties = len(e.providers) + len({row.payer for row in e.scheduler.client_channels})
    _need(len(e.chain.channels) <= parties, f"{len(e.chain.channels)} channels for {parties} parties")
    most = 6 * (len(e.providers) + 2)
    _need(e.processes <= most, f"{e.processes} processes, expected at most {most}")
    return f"{len(e.chain.channels)} channels and {e.processes} processes for {len(e.scheduler.jobs)} jobs"


def no_leak(e: Evidence) -> str:
    """I9. No prompt, password or key in a log, a command line or an environment."""
    for name, read in e.places:
        content = read()
        _need(not any(secret in content for secret in e.secrets), f"a secret or prompt stands in {name}")
    return f"{len(e.secrets)} secrets and prompts searched in {len(e.places)} logs, command lines and environments"


def fails_closed(e: Evidence) -> str:
    """I10. What must be refused was refused, each with its typed error."""
    taken = [name for name, refused in e.refusals.items() if not refused]
    _need(bool(e.refusals) and not taken, f"accepted: {', '.join(taken) or 'nothing was probed'}")
    return f"refused: {', '.join(e.refusals)}"


CHECKS: dict[str, Callable[[Evidence], str]] = {
    "I1": solvency,
    "I2": durable,
    "I3": guarded,
    "I4": bounded_exposure,
    "I5": paid_once,
    "I6": all_ended,
    "I7": billed_as_promised,
    "I8": bounded_resources,
    "I9": no_leak,
    "I10": fails_closed,
}


def process_places(pids: Iterable[int]) -> list[tuple[str, Callable[[], bytes]]]:
    """Command lines and environments of processes, where the system shows them (Linux)."""
    proc = Path("/proc")
    if not proc.is_dir():
        return []
    return [(f"process {pid} {kind}", _reader(proc / str(pid) / kind)) for pid in pids for kind in ("cmdline", "environ")]


def log_places(folder: Path) -> list[tuple[str, Callable[[], bytes]]]:
    """Every log of a testnet."""
    return [(f"log {file.name}", _reader(file)) for file in sorted(folder.glob("*.log"))]


def _reader(file: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            return file.read_bytes()
        except (FileNotFoundError, ProcessLookupError):  # the process ended meanwhile, and what it showed with it
            return b""

    return read


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Broken(otherwise)


def _verified_lease(domain: Domain, raw: bytes) -> Lease:
    try:
        return open_lease(domain, parse(pb.SignedLease, raw))
    except GpumarketError as error:
        raise Broken(f"a lease does not verify: {error.message}") from error


def _verify_receipt(domain: Domain, raw: bytes, lease: Lease) -> None:
    try:
        receipt = open_receipt(domain, parse(pb.SignedReceipt, raw), lease.provider)
    except GpumarketError as error:
        raise Broken(f"a receipt does not verify: {error.message}") from error
    _need(receipt.lease == lease.struct_hash, "a receipt is of another lease")

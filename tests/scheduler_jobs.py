"""Jobs made by hand, for tests of the scheduler's state machine and ledger."""

from __future__ import annotations

from gpumarket.core.terms import Ack, JobSpec, Lease, Outcome, Receipt, Task, keccak256
from gpumarket.core.units import ZERO_HASH, Address, Hash, Money
from gpumarket.scheduler import lifecycle as life
from gpumarket.scheduler.lifecycle import Attempt, Change, Job
from gpumarket.settlement.pricing import attempt_maximum

CLIENT, SCHEDULER, PROVIDER = (Address(bytes([i]) * 20) for i in (1, 2, 3))
MILLION, FEE_PPM, CHECK, GRACE, NOW = 10**6, 10_000, 60, 120, 1_000
UNITS, PRICE = 100, 10 * MILLION
MOST = Money(2_000)


def spec_of() -> JobSpec:
    return JobSpec(
        client=CLIENT,
        scheduler=SCHEDULER,
        job_id=Hash(b"j" * 32),
        task=Task.EMBED,
        model=Hash(b"m" * 32),
        request_hash=Hash(b"r" * 32),
        prompt_units=UNITS,
        max_output_units=UNITS,
        max_amount=MOST,
        constraints_hash=ZERO_HASH,
        profile=Hash(b"p" * 32),
        deadline=NOW + 600,
    )


def next_attempt(job: Job, prefix: int = 0) -> Attempt:
    spec = job.spec
    lease = Lease(
        job=spec.key,
        spec=spec.struct_hash,
        attempt=len(job.attempts) + 1,
        client=CLIENT,
        scheduler=SCHEDULER,
        provider=PROVIDER,
        model=spec.model,
        task=spec.task,
        prompt_price_per_mtok=Money(PRICE),
        output_price_per_mtok=Money(0),
        maximum=attempt_maximum(spec, PRICE, 0, FEE_PPM, spent=job.spent, prefix_units=prefix),
        fee_ppm=FEE_PPM,
        client_channel=Hash(b"c" * 32),
        provider_channel=Hash(b"s" * 32),
        profile=spec.profile,
        window_units=16,
        prefix_units=prefix,
        prefix_hash=ZERO_HASH,
        issued_at=NOW,
        deadline=spec.deadline,
    )
    return Attempt(lease, lease.struct_hash, b"", b"")


def leased() -> Change:
    spec = spec_of()
    job = Job(spec.key, spec, b"", Hash(b"c" * 32), NOW)
    return life.grant(job, next_attempt(job), until=0)


def ack_of(job: Job, units: int, *, complete: bool = False, will_check: bool = False, attempt: int = 0) -> Ack:
    return Ack(job.attempts[attempt - 1].hash, units, Hash(keccak256(b"%d" % units)), complete, will_check)


def receipt_of(job: Job, units: int, outcome: Outcome = Outcome.COMPLETED) -> Receipt:
    return Receipt(job.newest.hash, ZERO_HASH, job.spec.request_hash, ZERO_HASH, 0, ZERO_HASH, UNITS, units, outcome, NOW)


def claim(job: Job, ack: Ack | None, units: int = UNITS, outcome: Outcome = Outcome.COMPLETED, number: int = 1) -> Change:
    return life.claim(job, number, receipt_of(job, units, outcome), ack, (b"receipt", b"ack"), NOW, CHECK)

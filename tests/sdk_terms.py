"""Plans, leases and receipts for unit tests of the SDK's pure parts."""

from __future__ import annotations

from typing import Any

from gpumarket.core.terms import JobSpec, Lease, Outcome, Receipt, Task, keccak256
from gpumarket.core.units import ZERO_HASH, Address, Hash, Money
from gpumarket.sdk.job_plan import JobPlan
from gpumarket.sdk.session import Progress
from gpumarket.v1 import terms_pb2 as pb

NOW = 1_800_000_000
DEADLINE = NOW + 300
TOKEN = 10**18
CONSTRAINTS = pb.Constraints()


def address(name: str) -> Address:
    return Address(keccak256(name.encode())[:20])


def a_hash(name: str) -> Hash:
    return keccak256(name.encode())


def spec(task: Task = Task.GENERATE, *, units: int = 10, output: int = 12, **changes: Any) -> JobSpec:
    values: dict[str, Any] = {
        "client": address("client"),
        "scheduler": address("scheduler"),
        "job_id": a_hash("job"),
        "task": task,
        "model": a_hash("model"),
        "request_hash": a_hash("request"),
        "prompt_units": units,
        "max_output_units": output if task is Task.GENERATE else units,
        "max_amount": Money(TOKEN),
        "constraints_hash": keccak256(CONSTRAINTS.SerializeToString(deterministic=True)),
        "profile": a_hash("profile"),
        "deadline": DEADLINE,
    }
    return JobSpec(**(values | changes))


def lease(job: JobSpec, *, attempt: int = 1, prefix_units: int = 0, prefix_hash: Hash = ZERO_HASH, **changes: Any) -> Lease:
    values: dict[str, Any] = {
        "job": job.key,
        "spec": job.struct_hash,
        "attempt": attempt,
        "client": job.client,
        "scheduler": job.scheduler,
        "provider": address(f"provider {attempt}"),
        "model": job.model,
        "task": job.task,
        "prompt_price_per_mtok": Money(TOKEN),
        "output_price_per_mtok": Money(2 * TOKEN),
        "maximum": Money(TOKEN // 2),
        "fee_ppm": 10_000,
        "client_channel": a_hash("channel"),
        "provider_channel": a_hash("spoke"),
        "profile": job.profile,
        "window_units": 4,
        "prefix_units": prefix_units,
        "prefix_hash": prefix_hash,
        "issued_at": NOW,
        "deadline": job.deadline,
    }
    return Lease(**(values | changes))


def receipt(progress: Progress, *, units: int, output_hash: Hash, **changes: Any) -> Receipt:
    assert progress.lease is not None and progress.nonce is not None
    values: dict[str, Any] = {
        "lease": progress.lease.struct_hash,
        "nonce": progress.nonce,
        "request_hash": progress.plan.spec.request_hash,
        "output_hash": output_hash,
        "prefix_units": progress.lease.prefix_units,
        "prefix_hash": progress.lease.prefix_hash,
        "prompt_units": progress.plan.spec.prompt_units,
        "output_units": units,
        "outcome": Outcome.COMPLETED,
        "finished_at": NOW,
    }
    return Receipt(**(values | changes))


def text_plan(output: int = 12, attempts: int = 5) -> JobPlan:
    return JobPlan(spec(output=output), attempts_max=attempts)


def rows_plan(*item_units: int) -> JobPlan:
    return JobPlan(spec(Task.EMBED, units=sum(item_units)), item_units=item_units)

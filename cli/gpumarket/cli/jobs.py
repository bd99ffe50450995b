"""`gpumarket job`: your jobs, from the journal."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpumarket.cli import buyer
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption, noun, verb
from gpumarket.core.errors import ConfigError, GpumarketError
from gpumarket.core.units import format_money, hex0x

if TYPE_CHECKING:
    from gpumarket.sdk import Client
    from gpumarket.sdk.results import JobResult, JobSummary

app = noun("Your jobs.")
JobArgument = Annotated[str, typer.Argument(help="Job id, or the beginning of one.")]
ChecksOption = Annotated[bool, typer.Option("--checks", help="Also jobs that were bought to check others.")]


@verb(app, "list")
async def list_jobs(checks: ChecksOption = False, config: ConfigOption = None) -> None:
    """All jobs, newest first."""
    async with buyer.market(config) as market:
        jobs = market.jobs(checks=checks)
    current().emit([_document(job) for job in jobs], lambda _: current().table([_row(job) for job in jobs]))


@verb(app, "get")
async def get(job: JobArgument, config: ConfigOption = None) -> None:
    """One job in full."""
    async with buyer.market(config) as market:
        current().emit(_document(find_job(market, job)))


@verb(app, "resume")
async def resume(
    job: Annotated[str | None, typer.Argument(help="Job id; all interrupted ones by default.")] = None, config: ConfigOption = None
) -> None:
    """Bring interrupted jobs to their end, without paying twice."""
    async with buyer.market(config) as market:
        if job is not None:
            current().emit(_result(await market.resume(find_job(market, job).job)))
            return
        results = await market.resume_all()
    current().emit([_ended(result) for result in results])


@verb(app, "wait")
async def wait(job: JobArgument, config: ConfigOption = None) -> None:
    """The job's result: at once when it has ended, else by resuming it."""
    async with buyer.market(config) as market:
        current().emit(_result(await market.resume(find_job(market, job).job)))


def find_job(market: Client, text: str) -> JobSummary:
    """The one job whose id begins so. Raises ConfigError."""
    wanted = text.lower() if text.startswith("0x") else f"0x{text.lower()}"
    found = [job for job in market.jobs(checks=True) if hex0x(job.job).startswith(wanted)]
    if len(found) != 1:
        what = "no job" if not found else f"{len(found)} jobs"
        raise ConfigError(f"{what} begin{'s' if not found else ''} with {wanted}", hint="gpumarket job list")
    return found[0]


def _document(job: JobSummary) -> dict[str, Any]:
    return {
        "job": hex0x(job.job),
        "task": job.task.name.lower(),
        "model": job.model,
        "purpose": job.purpose,
        "state": job.state,
        "resumable": job.resumable,
        "provider": hex0x(job.provider) if job.provider else "",
        "attempts": job.attempts,
        "cost": job.cost,
        "max_cost": job.max_cost,
        "verdict": job.verdict,
        "created_at": job.created_at,
        "deadline": job.deadline,
    }


def _row(job: JobSummary) -> dict[str, Any]:
    created = datetime.datetime.fromtimestamp(job.created_at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return {
        "job": hex0x(job.job)[:18],
        "created": created,
        "model": job.model,
        "purpose": job.purpose,
        "state": f"{job.state}, resumable" if job.resumable else job.state,
        "verdict": job.verdict,
        "attempts": job.attempts,
        "cost": format_money(job.cost),
    }


def _result(result: JobResult) -> dict[str, Any]:
    from gpumarket.sdk.results import ChatResult, InferResult

    document = buyer.outcome_document(result)
    if isinstance(result, ChatResult):
        return {**document, "text": result.text, "finish_reason": result.finish_reason}
    if isinstance(result, InferResult):
        return {**document, "outputs": buyer.tensors_document(result)}
    return {**document, "vectors": [[float(x) for x in vector] for vector in result]}


def _ended(result: JobResult | Exception) -> dict[str, Any]:
    if isinstance(result, GpumarketError):
        return {"error": result.as_dict()}
    if isinstance(result, Exception):
        raise result
    return _result(result)

"""From what the caller wants to a journaled order: request bytes, quote, limit, `JobSpec`.

Invariant: nothing of the request leaves the client here; a quote carries hashes and counts only, and a quote above max_cost ends it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from sqlalchemy import Connection

from gpumarket.core.codec import parse, signed_order, to_proto
from gpumarket.core.errors import ConfigError, OverMaxCost, ProtocolError
from gpumarket.core.tensor_requests import TensorRequest, from_bytes, from_proto
from gpumarket.core.tensors import item_flaw
from gpumarket.core.terms import JobSpec, Task, keccak256, request_hash
from gpumarket.core.units import MONEY_MAX, Address, Hash, Money, format_money, money_from_bytes
from gpumarket.sdk import job_ids, store
from gpumarket.sdk.account import PaidChannelState
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.hub import Hub
from gpumarket.sdk.job_plan import JobPlan
from gpumarket.sdk.reconciling import reconcile
from gpumarket.sdk.requests import warnings_from_json
from gpumarket.sdk.results import Quote, Warnings
from gpumarket.v1 import market_pb2 as mpb
from gpumarket.v1 import terms_pb2 as pb

HEADROOM = 2
"""Without a max_cost a job may cost up to twice its quote: room for a second provider that is dearer than the first."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What an order would be, told before anything of it is written: its job, its price now, and what of the request had to be cut."""

    job: Hash
    quote: Quote
    task: Task
    warnings: Warnings


Approve = Callable[[Terms], Awaitable[Money]]
"""Answers what the purchase may cost in all, or raises: then nothing is ordered."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be bought. `request` is the serialized body of the task; `units` and `output_units` as in JobSpec."""

    alias: str
    model: Hash
    task: Task
    request: bytes
    units: int
    output_units: int
    profile: Hash
    max_cost: Money | None = None
    constraints: pb.Constraints = field(default_factory=pb.Constraints)
    options: Mapping[str, Any] = field(default_factory=dict)
    purpose: str = "user"
    parent: Hash | None = None
    explain: bool = False
    traceparent: str = ""
    """Context of the span that this belongs to; empty where nothing is traced."""
    job_id: Hash | None = None
    """Made by the caller, who may ask for the same job again; None: one is drawn."""
    scheduler: Address | None = None
    """Which one it must go through; None is the one that new orders go to."""
    approve: Approve | None = None
    """Asked once, between the first quote and the order; its answer takes the place of `max_cost`."""

    @property
    def fingerprint(self) -> Hash:
        """Of what is asked, to tell two requests under one job id apart."""
        return job_ids.fingerprint(self.model, self.task, self.request, self.options)


async def quote(desk: Desk, hub: Hub, ask: Ask) -> Quote:
    """The price now at one scheduler. Raises NoProvider, and OverMaxCost when it is above the caller's limit."""
    order = pb.JobOrder(
        spec=to_proto(_spec(desk, hub.address, ask, Hash(bytes(32)), Hash(bytes(32)), Money(MONEY_MAX)), pb.JobSpec()),
        constraints=_serialized(ask),
    )
    with desk.tracing.span("client.quote", parent=ask.traceparent, task=ask.task.name.lower()) as span:
        reply = await hub.match(mpb.MatchRequest(order=order, quote=True, traceparent=span.context))
    if not reply.HasField("quote"):
        raise ProtocolError("the scheduler answered a quote with something else")
    found = reply.quote
    try:
        result = Quote(
            model=ask.alias,
            digest=ask.model,
            provider=Address(found.provider),
            prompt_price_per_mtok=money_from_bytes(found.prompt_price_per_mtok),
            output_price_per_mtok=money_from_bytes(found.output_price_per_mtok),
            fee_ppm=found.fee_ppm,
            maximum=money_from_bytes(found.maximum),
            prompt_tokens=ask.units,
            max_output_tokens=ask.output_units if ask.task is Task.GENERATE else 0,
        )
    except ValueError as error:
        raise ProtocolError(f"a quote that is none: {error}") from error
    if ask.max_cost is not None and result.maximum > ask.max_cost:
        raise OverMaxCost(
            f"{ask.alias} costs up to {format_money(result.maximum)}, your limit is {format_money(ask.max_cost)}",
            hint="raise max_cost, ask for less output, or try later",
        )
    return result


async def place(desk: Desk, ask: Ask) -> tuple[store.StoredJob, PaidChannelState]:
    """Quote, then journal the order with the voucher that covers it; from then on it is its scheduler's. Where the one that new orders go
    to does not answer, another one may take it. Raises OverMaxCost or OutOfFunds before anything is written."""

    async def terms(hub: Hub) -> tuple[Hub, Quote, mpb.SchedulerInfo]:
        return hub, await quote(desk, hub, ask), await hub.info()

    schedulers = desk.schedulers
    hub, price, info = await (schedulers.ask(terms) if ask.scheduler is None else terms(schedulers.line(ask.scheduler)))
    if desk.settings.job_seconds > info.max_job_seconds:
        raise ConfigError(
            f"job_seconds is {desk.settings.job_seconds}; the scheduler takes at most {info.max_job_seconds}",
            hint="lower GPUMARKET_CLIENT_JOB_SECONDS",
        )
    channel = await desk.account.channel(hub.address, info.channel_margin_seconds)
    if not channel.reported:
        await reconcile(desk, channel)
    if ask.approve is not None:
        ask = await _approved(desk, channel.scheduler, ask, ask.approve, price)
    maximum = _maximum(desk, ask, price)
    job = _new_job(desk, channel, ask, maximum)

    def record(connection: Connection) -> None:
        if ask.job_id is not None:
            job_ids.claim(connection, ask.job_id, job.job, ask.fingerprint)
        store.add_job(connection, job)

    await desk.account.cover(channel, maximum, record)
    return job, channel


async def _approved(desk: Desk, scheduler: Address, ask: Ask, approve: Approve, price: Quote) -> Ask:
    """`ask` with the job's id and what it may cost, as the caller's approval has it."""
    job_id = ask.job_id or Hash(desk.random.token(32))
    job = keccak256(desk.signer.address + scheduler + job_id)
    limit = await approve(Terms(job, price, ask.task, warnings_from_json(ask.options.get("warnings", ()))))
    return replace(ask, job_id=job_id, max_cost=limit, options={**ask.options, "max_cost": str(limit)}, approve=None)


def explained_order(desk: Desk, hub: Hub, ask: Ask) -> pb.JobOrder:
    """The order as it would be placed, for `Explain`. Unsigned: the question needs no signature, and nobody can place it as an order."""
    spec = _spec(desk, hub.address, ask, Hash(bytes(32)), Hash(bytes(32)), ask.max_cost or Money(MONEY_MAX))
    return pb.JobOrder(spec=to_proto(spec, pb.JobSpec()), constraints=_serialized(ask))


def plan_of(spec: JobSpec, request: bytes, attempts_max: int) -> JobPlan:
    """What the session machine needs to know of a request."""
    if spec.task is Task.GENERATE:
        generate = parse(pb.GenerateRequest, request)
        told = generate.top_logprobs if generate.HasField("top_logprobs") else None
        return JobPlan(spec, stop_tokens=frozenset(generate.stop_tokens), attempts_max=attempts_max, top_logprobs=told)
    if spec.task is Task.EMBED:
        inputs = parse(pb.EmbedRequest, request).inputs
        return JobPlan(spec, item_units=tuple(len(i.ids) for i in inputs), attempts_max=attempts_max)
    if spec.task is Task.INFER:
        return _tensor_plan(spec, from_bytes(request), attempts_max)
    check = parse(pb.CheckRequest, request)
    if check.HasField("infer"):
        return _tensor_plan(spec, from_proto(check.infer), attempts_max)
    if check.embed.inputs:
        return JobPlan(spec, item_units=tuple(len(i.ids) for i in check.embed.inputs), attempts_max=attempts_max)
    units = len(check.generate.prompt) + len(check.output)
    return JobPlan(spec, item_units=(units,), item_bytes=4 * len(check.output), attempts_max=attempts_max)


def _tensor_plan(spec: JobSpec, request: TensorRequest, attempts_max: int) -> JobPlan:
    flaw = partial(item_flaw, request.outputs, bool(request.rows))
    return JobPlan(spec, item_units=(1,) * request.items, attempts_max=attempts_max, item_flaw=flaw)


def _maximum(desk: Desk, ask: Ask, price: Quote) -> Money:
    """What the order may cost: max_cost, or twice the quote; never so high that the voucher would pass W when the price does not."""
    roomy = HEADROOM * price.maximum
    if ask.max_cost is None:
        wanted: int = roomy
    else:
        wanted = min(roomy, ask.max_cost) if ask.purpose == "check" else ask.max_cost
    return Money(min(wanted, max(desk.settings.exposure_limit, price.maximum)))


def _new_job(desk: Desk, channel: PaidChannelState, ask: Ask, maximum: Money) -> store.StoredJob:
    job_id, salt = ask.job_id or Hash(desk.random.token(32)), Hash(desk.random.token(32))
    spec = _spec(desk, channel.scheduler, ask, job_id, salt, maximum)
    return store.StoredJob(
        job=spec.key,
        alias=ask.alias,
        purpose=ask.purpose,
        parent=ask.parent,
        state="ordered",
        channel=channel.id,
        order=signed_order(desk.signer, desk.domain, spec, _serialized(ask)),
        request=ask.request,
        salt=salt,
        options=ask.options,
        attempt=0,
        billed=Money(0),
        will_check=False,
        verdict="",
        verdict_facts={},
        finish_reason="",
        created_at=desk.clock.now(),
        spec=spec,
    )


def _spec(desk: Desk, scheduler: Address, ask: Ask, job_id: Hash, salt: Hash, maximum: Money) -> JobSpec:
    return JobSpec(
        client=desk.signer.address,
        scheduler=scheduler,
        job_id=job_id,
        task=ask.task,
        model=ask.model,
        request_hash=request_hash(salt, ask.request),
        prompt_units=ask.units,
        max_output_units=ask.output_units,
        max_amount=maximum,
        constraints_hash=keccak256(_serialized(ask)),
        profile=ask.profile,
        deadline=desk.clock.now() + desk.settings.job_seconds,
    )


def _serialized(ask: Ask) -> bytes:
    return ask.constraints.SerializeToString(deterministic=True)

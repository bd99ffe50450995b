"""The scheduler's part of a job's trace: order, match, lease, calls about it, settlement; the redemption, linked to what it pays.

A job's context is kept in memory from its order to its settlement, and never with the money: after a restart the rest is not traced.
What a caller sends as context is a stranger's text, parsed strictly. Must never: slow down a request that carries none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc.aio

from gpumarket.core.units import Hash, hex0x
from gpumarket.scheduler.jobs import Attempt, AttemptState, Job
from gpumarket.settlement.redeemer import Redemption
from gpumarket.telemetry.spans import NO_SPAN, OFF, Span, Tracing
from gpumarket.telemetry.trace_context import Links, Trails, from_metadata, parse
from gpumarket.v1 import market_pb2 as pb

Reply = Callable[[pb.MatchReply], None]


class Spans:
    """All spans of one scheduler."""

    def __init__(self, tracing: Tracing = OFF) -> None:
        self._tracing = tracing
        self._trails, self._links = Trails(), Links()

    def order(self, request: pb.MatchRequest, handle: Callable[[pb.MatchRequest, Reply], None], reply: Reply) -> None:
        """Handle an order or a quote, within spans where it names a context."""
        if not self._tracing.on or parse(request.traceparent) is None:
            handle(request, reply)
            return
        order = _Order(self._tracing, request, self._trails, reply)
        handle(request, order.answered)
        order.handled()

    def call(self, name: str, context: grpc.aio.ServicerContext[Any, Any]) -> Span:
        """A unary call, where its caller traces."""
        if not self._tracing.on:
            return NO_SPAN
        parent = from_metadata(context.invocation_metadata())
        return self._tracing.span(f"scheduler.{name}", parent=parent) if parent else NO_SPAN

    def settled(self, job: Job, attempt: Attempt) -> None:
        """An attempt came to its end, and that is durable."""
        parent = self._trails.of(job.key)
        if not parent:
            return
        state = attempt.state.name.lower()
        with self._tracing.span("scheduler.settle", parent=parent, job=hex0x(job.key), attempt=attempt.lease.attempt, state=state) as span:
            if attempt.state is AttemptState.OWED:
                self._links.add(job.channel, span.context)

    def redeemed(self, redemption: Redemption) -> None:
        """A client's voucher was turned into tokens: a trace of its own, linked to the jobs that it pays."""
        links = self._links.take(redemption.channel)
        if links:
            self._tracing.span("scheduler.redeem", links=links, count=len(links)).end()


class _Order:
    """One order: matched while it is handled, leased until it is answered, which is when its commit is back."""

    def __init__(self, tracing: Tracing, request: pb.MatchRequest, trails: Trails, reply: Reply) -> None:
        self._tracing, self._trails, self._reply = tracing, trails, reply
        self._whole = tracing.span("scheduler.quote" if request.quote else "scheduler.order", parent=request.traceparent)
        self._step = tracing.span("scheduler.match", parent=self._whole.context)
        self._over = False

    def handled(self) -> None:
        if not self._over:
            self._step.end()
            self._step = self._tracing.span("scheduler.lease", parent=self._whole.context)

    def answered(self, answer: pb.MatchReply) -> None:
        self._over = True
        self._whole.note(outcome=answer.WhichOneof("result") or "")
        if answer.HasField("granted"):
            lease = answer.granted.lease.lease
            self._whole.note(job=hex0x(Hash(lease.job)), attempt=lease.attempt)
            self._trails.keep(lease.job, self._whole.context)
        elif answer.HasField("problem"):
            self._whole.fail(answer.problem.code)
        self._step.end()
        self._whole.end()
        self._reply(answer)

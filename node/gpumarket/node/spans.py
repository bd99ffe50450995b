"""A provider's part of a job's trace: admission, queue, prefill, decode, receipt, claim; the redemption, linked to what it pays.

Contexts are kept in memory only, from the attempt to its claim; after a restart the rest is not traced. What a client sends as context is a
stranger's text, parsed strictly. Nothing here happens per token or per ack.
"""

from __future__ import annotations

from typing import Any

import grpc.aio

from gpumarket.core.units import hex0x
from gpumarket.node.accounts import Bill
from gpumarket.node.admission import Admitted
from gpumarket.node.tables import OWED
from gpumarket.settlement.redeemer import Redemption
from gpumarket.telemetry.spans import NO_SPAN, OFF, Span, Tracing
from gpumarket.telemetry.trace_context import Links, Trails, from_metadata


class Spans:
    """All spans of one provider."""

    def __init__(self, tracing: Tracing = OFF) -> None:
        self._tracing = tracing
        self._trails, self._links = Trails(), Links()

    def attempt(self, context: grpc.aio.ServicerContext[Any, Any]) -> AttemptSpans:
        """An Infer call that has just come in."""
        parent = from_metadata(context.invocation_metadata()) if self._tracing.on else ""
        return AttemptSpans(self._tracing if parent else OFF, parent, self._trails)

    def claim(self, bill: Bill) -> Span:
        """One try to claim a bill."""
        parent = self._trails.of(bill.lease_hash)
        if not parent:
            return NO_SPAN
        return self._tracing.span("provider.claim", parent=parent, job=hex0x(bill.lease.job), attempt=bill.lease.attempt)

    def settled(self, bill: Bill, state: str, claim: Span) -> None:
        """The claim came to its end, and that is durable."""
        claim.note(state=state)
        if state == OWED:
            self._links.add(bill.lease.provider_channel, claim.context)

    def redeemed(self, redemption: Redemption) -> None:
        """A voucher was turned into tokens: a trace of its own, linked to the claims that it pays."""
        links = self._links.take(redemption.channel)
        if links:
            self._tracing.span("provider.redeem", links=links, count=len(links)).end()


class AttemptSpans:
    """One attempt: a span for all of it, and one after the other for its stages."""

    def __init__(self, tracing: Tracing, parent: str, trails: Trails) -> None:
        self._tracing, self._trails = tracing, trails
        self._whole = tracing.span("provider.infer", parent=parent)
        self._stage = tracing.span("provider.admission", parent=self._whole.context)

    def admitted(self, job: Admitted) -> None:
        """It may run."""
        lease = job.lease
        self._whole.note(job=hex0x(lease.job), attempt=lease.attempt, task=lease.task.name.lower())
        self._trails.keep(job.lease_hash, self._whole.context)

    def stage(self, name: str) -> None:
        """The stage before is over, and this one begins."""
        self._stage.end()
        self._stage = self._tracing.span(f"provider.{name}", parent=self._whole.context)

    def note(self, outcome: str, units: int) -> None:
        """How it ended, in its provider's words."""
        self._whole.note(outcome=outcome, units=units)

    def end(self, code: str = "") -> None:
        """It is over; `code` says why it failed."""
        self._stage.end()
        if code:
            self._whole.fail(code)
        self._whole.end()

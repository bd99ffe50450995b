"""Spans by OpenTelemetry, sent in batches over OTLP/HTTP from a thread of their own. Imported only when traces are on (`tracing`).

Bounded: what does not fit into the queue, because the collector is slow or away, is dropped; no job waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from types import TracebackType
from typing import Self

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, Status, StatusCode, TraceFlags, set_span_in_context
from opentelemetry.trace import Span as OtelSpan

from gpumarket.telemetry.spans import ATTRIBUTES, TEXT_MAX, Attribute, Span, code_of
from gpumarket.telemetry.trace_context import TraceContext, parse

FLUSH_MS = 3_000
SEND_SECONDS = 3
"""Longest try to reach the collector: a process that ends waits for it."""
LINKS_MAX = 64


class OtlpTracing:
    """Spans of one process. `exporter` replaces the one that the OTEL_EXPORTER_OTLP_* variables name."""

    on = True

    def __init__(self, service: str, exporter: SpanExporter | None = None) -> None:
        resource = Resource.create({SERVICE_NAME: service, SERVICE_VERSION: version("gpumarket")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(timeout=SEND_SECONDS)))
        self._tracer = self._provider.get_tracer("gpumarket")

    def span(self, name: str, *, parent: str = "", links: Sequence[str] = (), **attributes: Attribute) -> Span:
        context = Context()
        above = parse(parent)
        if above is not None:
            context = set_span_in_context(NonRecordingSpan(_referred(above)), context)
        linked = [Link(_referred(found)) for text in links[-LINKS_MAX:] if (found := parse(text)) is not None]
        return _Span(self._tracer.start_span(name, context, attributes=_said(attributes), links=linked))

    def close(self) -> None:
        self._provider.force_flush(FLUSH_MS)
        self._provider.shutdown()


class _Span:
    def __init__(self, span: OtelSpan) -> None:
        self._span = span
        at = span.get_span_context()
        self.context = str(TraceContext(at.trace_id, at.span_id, at.trace_flags))

    def note(self, **attributes: Attribute) -> None:
        self._span.set_attributes(_said(attributes))

    def fail(self, code: str) -> None:
        self._span.set_status(Status(StatusCode.ERROR, code[:TEXT_MAX]))

    def end(self) -> None:
        if self._span.is_recording():
            self._span.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not isinstance(error, GeneratorExit):
            self.fail(code_of(error))
        self.end()


def _said(attributes: dict[str, Attribute]) -> dict[str, Attribute]:
    strange = attributes.keys() - ATTRIBUTES
    assert not strange, f"span attributes that are not listed: {sorted(strange)}"
    return {f"gpumarket.{k}": v[:TEXT_MAX] if isinstance(v, str) else v for k, v in attributes.items()}


def _referred(context: TraceContext) -> SpanContext:
    return SpanContext(context.trace_id, context.span_id, is_remote=True, trace_flags=TraceFlags(context.flags))

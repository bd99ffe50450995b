"""Traces: a stranger's context is parsed strictly, what is kept is bounded, spans say only what is listed, and off is off."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gpumarket.core.errors import ConfigError, MissingExtra, Unreachable
from gpumarket.core.units import Hash
from gpumarket.scheduler.spans import Spans
from gpumarket.telemetry.otlp import OtlpTracing
from gpumarket.telemetry.spans import NO_SPAN, OFF
from gpumarket.telemetry.trace_context import Links, TraceContext, Trails, from_metadata, parse, to_metadata
from gpumarket.telemetry.tracing import from_environment
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import terms_pb2

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
MALFORMED = (
    "",
    PARENT.upper(),
    PARENT + "-00",
    PARENT[:-1],
    " " + PARENT[1:],
    PARENT.replace("00-4", "ff-4", 1),
    PARENT.replace("00-4", "01-4", 1),
    "00-" + "0" * 32 + PARENT[35:],
    PARENT[:36] + "0" * 16 + "-01",
    PARENT.replace("-", "_"),
    PARENT.replace("4", "٤"),
    PARENT[:-1] + "\n",
    "x" * 1_000_000,
    PARENT.encode(),
    None,
    7,
)


@pytest.fixture
def sent() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(sent: InMemorySpanExporter) -> Iterator[OtlpTracing]:
    made = OtlpTracing("test", sent)
    yield made
    made.close()


def spans(tracing: OtlpTracing, sent: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    tracing._provider.force_flush()
    return {span.name: span for span in sent.get_finished_spans()}


# --- context -------------------------------------------------------------------------------------------------------------------


def test_context_of_a_good_traceparent_comes_back_as_itself() -> None:
    assert str(parse(PARENT)) == PARENT


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_context_that_is_malformed_is_dropped(text: Any) -> None:
    assert parse(text) is None
    assert from_metadata([("traceparent", text)]) == ""


@given(st.text(max_size=80))
def test_context_of_any_text_is_none_or_exactly_that_text(text: str) -> None:
    found = parse(text)
    assert found is None or str(found) == text


def test_context_given_twice_is_dropped() -> None:
    assert from_metadata([("traceparent", PARENT), ("traceparent", PARENT)]) == ""
    assert from_metadata([("user-agent", "x"), ("traceparent", PARENT)]) == PARENT
    assert from_metadata(None) == ""


def test_context_is_sent_where_there_is_one() -> None:
    assert to_metadata(PARENT) == (("traceparent", PARENT),)
    assert to_metadata("") is None


def test_trails_forget_the_oldest_and_keep_nothing_for_nothing() -> None:
    trails = Trails(most=2)
    for key in (b"a", b"b", b"a", b"c"):
        trails.keep(key, PARENT)
    trails.keep(b"d", "")
    assert (len(trails), trails.of(b"a"), trails.of(b"b"), trails.of(b"d")) == (2, PARENT, "", "")


def test_links_are_bounded_and_taken_once() -> None:
    links = Links(keys_most=2, each_most=2)
    for number in range(5):
        links.add(b"a", f"{number}")
    links.add(b"b", PARENT)
    links.add(b"c", PARENT)
    links.add(b"c", "")
    assert (links.take(b"a"), links.take(b"c"), links.take(b"c")) == ([], [PARENT], [])
    for number in range(5):
        links.add(b"b", f"{number}")
    assert links.take(b"b") == ["3", "4"]


# --- on and off ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_SDK_DISABLED": "TRUE", "OTEL_TRACES_EXPORTER": "otlp"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
    ],
)
def test_tracing_that_is_not_asked_for_is_off(env: dict[str, str]) -> None:
    assert from_environment("client", env) is OFF


@pytest.mark.parametrize(
    "env",
    [
        {"OTEL_TRACES_EXPORTER": "otlp"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1/v1/traces", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
    ],
)
def test_tracing_that_is_asked_for_is_on(env: dict[str, str]) -> None:
    tracing = from_environment("client", env)
    assert tracing.on
    tracing.close()


@pytest.mark.parametrize(
    "env", [{"OTEL_TRACES_EXPORTER": "jaeger"}, {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}]
)
def test_tracing_by_means_that_are_not_here_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        from_environment("client", env)


def test_tracing_without_its_packages_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpumarket.telemetry.otlp", None)
    with pytest.raises(MissingExtra) as refused:
        from_environment("client", {"OTEL_TRACES_EXPORTER": "otlp"})
    assert refused.value.hint == "pip install 'gpumarket[tracing]'"


def test_tracing_that_is_off_imports_nothing() -> None:
    code = "import sys; from gpumarket.telemetry.tracing import from_environment as f; f('x', {}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not [name for name in done.stdout.split() if name.startswith("opentelemetry")]


def test_span_that_is_off_does_nothing() -> None:
    with OFF.span("x", parent=PARENT, job="0x") as span:
        assert span is NO_SPAN
        span.note(units=1)
    assert span.context == ""


# --- spans ---------------------------------------------------------------------------------------------------------------------


def test_span_of_a_parent_is_of_its_trace(tracing: OtlpTracing, sent: InMemorySpanExporter) -> None:
    with tracing.span("child", parent=PARENT, attempt=1) as span:
        context = parse(span.context)
    found = spans(tracing, sent)["child"]
    assert context is not None and found.parent is not None and found.attributes is not None
    assert (context.trace_id, found.parent.span_id) == (int(PARENT[3:35], 16), int(PARENT[36:52], 16))
    assert dict(found.attributes) == {"gpumarket.attempt": 1}


@pytest.mark.parametrize("parent", ["", "00-evil", PARENT.upper()])
def test_span_of_no_good_parent_begins_a_trace(tracing: OtlpTracing, sent: InMemorySpanExporter, parent: str) -> None:
    tracing.span("root", parent=parent).end()
    assert spans(tracing, sent)["root"].parent is None


def test_span_says_nothing_that_is_not_listed(tracing: OtlpTracing) -> None:
    with pytest.raises(AssertionError):
        tracing.span("x", prompt="Say hello")
    with tracing.span("x") as span, pytest.raises(AssertionError):
        span.note(key="0xsecret")


def test_span_cuts_long_words(tracing: OtlpTracing, sent: InMemorySpanExporter) -> None:
    tracing.span("x", reason="r" * 5_000).end()
    attributes = spans(tracing, sent)["x"].attributes
    assert attributes is not None and len(str(attributes["gpumarket.reason"])) == 80


def test_span_of_a_failure_tells_its_code_and_not_its_text(tracing: OtlpTracing, sent: InMemorySpanExporter) -> None:
    with pytest.raises(Unreachable), tracing.span("known"):
        raise Unreachable("http://secret does not answer")
    with pytest.raises(ValueError), tracing.span("strange"):
        raise ValueError("the prompt was: hello")
    found = spans(tracing, sent)
    assert [found[name].status.description for name in ("known", "strange")] == ["unreachable", "ValueError"]
    assert not any(span.events for span in found.values())


def test_span_of_an_iteration_that_was_left_has_not_failed(tracing: OtlpTracing, sent: InMemorySpanExporter) -> None:
    def numbers() -> Iterator[int]:
        with tracing.span("left"):
            yield 1

    iteration = numbers()
    next(iteration)
    iteration.close()  # type: ignore[attr-defined]
    assert spans(tracing, sent)["left"].status.is_ok or spans(tracing, sent)["left"].status.is_unset


def test_span_drops_links_that_are_malformed(tracing: OtlpTracing, sent: InMemorySpanExporter) -> None:
    tracing.span("linked", links=["evil", PARENT]).end()
    assert [TraceContext(x.context.trace_id, x.context.span_id, 1) for x in spans(tracing, sent)["linked"].links] == [parse(PARENT)]


# --- a scheduler's orders ------------------------------------------------------------------------------------------------------


def answered(request: pb.MatchRequest, reply: Any) -> None:
    lease = terms_pb2.Lease(job=b"j" * 32, attempt=1)
    reply(pb.MatchReply(granted=pb.Granted(lease=terms_pb2.SignedLease(lease=lease))))


def test_order_without_a_context_is_handled_and_not_traced(tracing: OtlpTracing, sent: InMemorySpanExporter) -> None:
    replies: list[pb.MatchReply] = []
    for text in ("", "00-evil", "x" * 100_000):
        Spans(tracing).order(pb.MatchRequest(traceparent=text), answered, replies.append)
    assert (len(replies), spans(tracing, sent)) == (3, {})


def test_order_with_a_context_is_traced_until_its_commit(tracing: OtlpTracing, sent: InMemorySpanExporter) -> None:
    waiting: list[Any] = []
    replies: list[pb.MatchReply] = []
    made = Spans(tracing)
    made.order(pb.MatchRequest(traceparent=PARENT), lambda request, reply: waiting.append(reply), replies.append)
    assert set(spans(tracing, sent)) == {"scheduler.match"}
    answered(pb.MatchRequest(), waiting[0])
    found = spans(tracing, sent)
    assert set(found) == {"scheduler.match", "scheduler.lease", "scheduler.order"}
    assert len(replies) == 1
    assert made._trails.of(Hash(b"j" * 32)).startswith(PARENT[:35])


def test_order_that_is_refused_is_traced_with_its_code(tracing: OtlpTracing, sent: InMemorySpanExporter) -> None:
    def refuse(request: pb.MatchRequest, reply: Any) -> None:
        reply(pb.MatchReply(problem=pb.Problem(code="busy", message="a secret")))

    Spans(tracing).order(pb.MatchRequest(traceparent=PARENT, quote=True), refuse, lambda reply: None)
    assert spans(tracing, sent)["scheduler.quote"].status.description == "busy"
    assert "scheduler.lease" not in spans(tracing, sent)

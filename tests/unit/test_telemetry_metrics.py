"""Metrics: bounded whatever is counted, text that Prometheus's own tool finds nothing wrong with, and a window that cannot be overrun."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpumarket.core.errors import ConfigError, PortInUse, Unreachable
from gpumarket.core.units import Hash
from gpumarket.node import metrics as provider
from gpumarket.scheduler import metrics as scheduler
from gpumarket.settlement.chain.gas_tally import GasTally
from gpumarket.telemetry.measuring import Measuring
from gpumarket.telemetry.metrics import Exposition, Kind, Metric, Reading, counter, gauge, histogram, tokens
from gpumarket.telemetry.readiness import Readiness
from gpumarket.telemetry.window import AT_ONCE_MAX, Recent, Window

HOSTILE = ("0x" + "ab" * 20, 'x"} 1\ngpumarket_evil{a="', "a" * 10_000, "\x00", "", *(f"made-up-{n}" for n in range(200)))


async def nothing() -> Mapping[str, Reading]:
    return {}


SOURCE = Measuring({"p2p": (nothing, 0.0), "wallet": (nothing, 0.0)}).metric
TABLES: dict[str, Sequence[Metric]] = {
    "provider": provider.metrics_of(["tiny-llama", "all-MiniLM-L6-v2"], SOURCE),
    "scheduler": scheduler.metrics_of(SOURCE),
}


def reading(metric: Metric, values: Sequence[str]) -> Reading:
    return dict.fromkeys(values, 1.0) if metric.label else 1.0


def exposed(metrics: Sequence[Metric], extra: Sequence[str] = ()) -> str:
    now = {m.name: reading(m, (*m.values, *extra)) for m in metrics if m.kind is not Kind.HISTOGRAM}
    exposition = Exposition(metrics, lambda: now)
    for metric in metrics:
        if metric.kind is Kind.HISTOGRAM:
            for value in metric.values:
                exposition.observer(metric.name, value)(0.3)
    return exposition.text().decode()


# --- labels --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", TABLES)
def test_metrics_labels_stay_bounded_whatever_is_counted(role: str) -> None:
    metrics = {metric.full_name: metric for metric in TABLES[role]}
    seen = 0
    for family in text_string_to_metric_families(exposed(TABLES[role], HOSTILE)):
        metric = metrics.get(family.name) or metrics.get(f"{family.name}_total")
        for sample in family.samples if metric else ():
            assert metric is not None
            labels = {k: v for k, v in sample.labels.items() if k != "le"}
            assert labels.keys() == ({metric.label} if metric.label else set())
            assert set(labels.values()) <= {*metric.values, "other"}, f"{sample.name} {labels}"
            seen += 1
    assert seen > 100


def test_metrics_what_is_not_listed_is_summed_up_as_other() -> None:
    text = exposed([counter("seen_total", "Things.", "kind", ("a", "b"))], HOSTILE)
    (family,) = (f for f in text_string_to_metric_families(text) if f.name == "gpumarket_seen")
    assert {s.labels["kind"]: s.value for s in family.samples} == {"a": 1, "b": 1, "other": len(HOSTILE)}


def test_metrics_values_that_nothing_happened_to_are_shown_as_zero() -> None:
    exposition = Exposition([counter("seen_total", "Things.", "kind", ("a", "b"))], lambda: {"seen_total": {"a": 2}})
    assert 'gpumarket_seen_total{kind="b"} 0.0' in exposition.text().decode()


def test_metrics_that_cannot_be_read_are_left_out() -> None:
    assert "gpumarket_gone" not in Exposition([gauge("gone", "Not known.")], dict).text().decode()


def test_histogram_of_an_unlisted_value_is_refused() -> None:
    exposition = Exposition([histogram("wait_seconds", "Waits.", (1.0,), "model", ("a",))], dict)
    with pytest.raises(KeyError):
        exposition.observer("wait_seconds", "b")


@pytest.mark.parametrize(
    ("name", "kind", "label", "values"),
    [("seen", Kind.COUNTER, "", ()), ("seen_total", Kind.GAUGE, "", ()), ("seen_total", Kind.COUNTER, "kind", ())],
)
def test_metric_against_the_conventions_is_refused(name: str, kind: Kind, label: str, values: tuple[str, ...]) -> None:
    with pytest.raises(AssertionError):
        Metric(name, kind, "Help.", label, values)


def test_money_as_tokens_is_a_float_of_whole_tokens() -> None:
    assert tokens(25 * 10**17) == 2.5


@pytest.mark.parametrize("role", TABLES)
def test_metrics_text_is_promtool_clean(role: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("NOT CHECKED: promtool is not installed (Debian: apt install prometheus)")
    done = subprocess.run([promtool, "check", "metrics"], input=exposed(TABLES[role]), capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_model_labels_are_short_clean_and_unique() -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    models: Any = {Hash(bytes([n]) * 32): Named(name) for n, name in enumerate(["a" * 90, "b c\n", "twin", "twin"])}
    labels = list(provider.model_labels(models).values())
    assert labels == ["a" * 40, "b_c_", "twin-02020202", "twin-03030303"]


def test_gas_tally_counts_what_mined_and_reverted_transactions_took() -> None:
    tally = GasTally()
    tally.count({"status": 1, "gasUsed": 21_000, "effectiveGasPrice": 3}, max_fee=10)
    tally.count({"status": 0, "gasUsed": 1_000, "effectiveGasPrice": 10**30}, max_fee=10)  # a node's word is not above what was offered
    tally.count({"status": 1, "gasUsed": 1}, max_fee=10)
    assert (tally.mined, tally.reverted, tally.gas_used, tally.spent_wei) == (2, 1, 22_001, 63_000 + 10_000 + 10)


# --- measuring -----------------------------------------------------------------------------------------------------------------


async def test_measurement_that_fails_costs_its_own_readings_and_is_counted() -> None:
    async def fails() -> Mapping[str, Reading]:
        raise Unreachable("the chain at http://secret does not answer")

    async def works() -> Mapping[str, Reading]:
        return {"works": 1.0}

    measuring = Measuring({"fails": (fails, 0.0), "works": (works, 0.0)})
    assert await measuring.take() == {"works": 1.0, "measurements_failed_total": {"fails": 1}}


async def test_measurement_that_hangs_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumarket.telemetry.measuring.WAIT_SECONDS", 0.05)
    asked = 0

    async def hangs() -> Mapping[str, Reading]:
        nonlocal asked
        asked += 1
        await asyncio.Event().wait()
        return {}

    measuring = Measuring({"hangs": (hangs, 0.0)})
    for _ in range(3):
        assert (await measuring.take())["measurements_failed_total"]
    assert asked == 1, "what hangs is not asked again before it has answered"
    await measuring.close()


async def test_recent_answer_is_made_once_for_all_who_ask_together() -> None:
    made = 0

    async def make() -> int:
        nonlocal made
        made += 1
        await asyncio.sleep(0)
        return made

    recent = Recent(make, 60.0)
    assert await asyncio.gather(*(recent.get() for _ in range(50))) == [1] * 50
    assert await recent.get() == 1


async def test_recent_failure_is_raised_and_not_remembered() -> None:
    answers: list[Any] = [Unreachable("away"), 7]

    async def make() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return int(answer)

    recent = Recent(make, 60.0)
    with pytest.raises(Unreachable):
        await recent.get()
    assert await recent.get() == 7


# --- readiness -----------------------------------------------------------------------------------------------------------------


async def test_readiness_names_every_check_that_fails_and_no_text_of_an_error() -> None:
    async def fine() -> str:
        return ""

    async def wrong() -> str:
        return "too old"

    async def raises() -> str:
        raise Unreachable("postgresql://user:hunter2@host is away")

    readiness = Readiness({"fine": (fine, 1.0), "chain": (wrong, 1.0), "ledger": (raises, 1.0)})
    assert await readiness.troubles() == ["chain: too old", "ledger: failed (unreachable)"]


async def test_readiness_of_a_check_that_hangs_is_refused_in_time() -> None:
    async def hangs() -> str:
        await asyncio.Event().wait()
        return ""

    readiness = Readiness({"engine": (hangs, 0.05)})
    assert await readiness.troubles() == ["engine: no answer within 0.05 s"]
    await readiness.close()


# --- window --------------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def window(text: Any = None, troubles: Any = None) -> AsyncIterator[tuple[str, aiohttp.ClientSession]]:
    async def nothing_to_say() -> bytes:
        return b"gpumarket_x 1\n"

    async def no_troubles() -> list[str]:
        return []

    shown = Window(text or nothing_to_say, troubles or no_troubles, ready_fresh_seconds=0.0)
    try:
        url = await shown.open("127.0.0.1:0")
        async with aiohttp.ClientSession() as session:
            yield url, session
    finally:
        await shown.close()


async def test_window_shows_metrics_health_and_readiness() -> None:
    async with window() as (url, session):
        async with session.get(f"{url}/metrics") as answer:
            assert (answer.status, await answer.text()) == (200, "gpumarket_x 1\n")
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        async with session.get(f"{url}/healthz") as answer:
            assert answer.status == 200
        async with session.get(f"{url}/readyz") as answer:
            assert (answer.status, json.loads(await answer.text())) == (200, {"ready": True, "reasons": []})


async def test_window_refuses_readiness_with_reasons_and_hides_a_defect() -> None:
    async def troubles() -> list[str]:
        return ["p2p: down"]

    async def defect() -> list[str]:
        raise RuntimeError("a secret")

    async with window(troubles=troubles) as (url, session), session.get(f"{url}/readyz") as answer:
        assert (answer.status, json.loads(await answer.text())) == (503, {"ready": False, "reasons": ["p2p: down"]})
    async with window(troubles=defect) as (url, session), session.get(f"{url}/readyz") as answer:
        assert answer.status == 503
        assert "secret" not in await answer.text()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_window_changes_nothing(method: str) -> None:
    async with window() as (url, session), session.request(method, f"{url}/metrics") as answer:
        assert answer.status == 405


async def test_window_turns_away_more_than_a_few_at_once() -> None:
    gate, waiting = asyncio.Event(), 0

    async def slow() -> bytes:
        nonlocal waiting
        waiting += 1
        await gate.wait()
        return b""

    async with window(text=slow) as (url, session):

        async def ask() -> int:
            async with session.get(f"{url}/metrics") as answer:
                return answer.status

        asked = [asyncio.create_task(ask()) for _ in range(AT_ONCE_MAX + 8)]
        while sum(task.done() for task in asked) < 8:  # noqa: ASYNC110  they are answered by the server, which has no event for it
            await asyncio.sleep(0.01)
        gate.set()
        statuses = sorted(await asyncio.gather(*asked))
    assert statuses == [200] * AT_ONCE_MAX + [503] * 8
    assert waiting == 1, "all who were let in share one answer"


@pytest.mark.parametrize("listen", ["9100", "127.0.0.1", "127.0.0.1:x", ":1", "127.0.0.1:70000"])
async def test_window_at_an_address_that_is_none_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError):
        await Window(nothing, nothing, ready_fresh_seconds=0.0).open(listen)  # type: ignore[arg-type]


async def test_window_at_a_port_that_is_taken_is_refused_with_a_hint() -> None:
    async with window() as (url, _):
        with pytest.raises(PortInUse):
            await Window(nothing, nothing, ready_fresh_seconds=0.0).open(url.removeprefix("http://"))  # type: ignore[arg-type]


def test_metrics_are_not_imported_by_the_sdk() -> None:
    code = "import sys; from gpumarket.sdk import Client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not [m for m in done.stdout.split() if m.startswith(("prometheus_client", "opentelemetry"))]

"""A market of real processes, watched: what its metrics, its health and its traces say of real jobs, and what they must never say."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from trace_collector import Collector, Seen, collecting

from gpumarket.core.settings import ChainSettings, load
from gpumarket.core.units import hex0x
from gpumarket.sdk import Client
from gpumarket.sdk.settings import ClientSettings
from gpumarket.telemetry.spans import ATTRIBUTES
from gpumarket.testnet.network import Network
from gpumarket.testnet.plan import MINILM, SCHEDULER, TINY_LLAMA, Plan, honest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
PATIENCE_SECONDS = 120.0
WORDS = ("quincunx", "borogove", "slithy")
"""In every prompt here, and nowhere else."""
DAEMONS = (SCHEDULER, "provider-1", "provider-2")


@dataclass
class Watched:
    """What was seen of one network."""

    metrics: dict[str, str] = field(default_factory=dict)
    health: dict[str, tuple[int, str]] = field(default_factory=dict)
    ready: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)
    stopped: tuple[int, dict[str, Any]] = (0, {})
    """Readiness of the scheduler while its p2p process does not answer."""
    strange: tuple[int, int] = (0, 0)
    """Statuses of a path that is none, and of a POST."""
    secrets: dict[str, str] = field(default_factory=dict)
    jobs: list[str] = field(default_factory=list)
    logs: str = ""
    collector: Collector = field(default_factory=Collector)

    def value(self, role: str, name: str, **labels: str) -> float:
        return value_of(self.metrics[role], name, **labels)


def value_of(text: str, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return float(sample.value)
    raise AssertionError(f"no {name}{labels}")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("observed")
    with collecting() as collector, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        yield asyncio.run(watch(folder / "net", collector))


async def watch(folder: Path, collector: Collector) -> Watched:
    seen = Watched(collector=collector)
    plan = Plan(honest(2, text=1, warm=True), scheduler={"check_seconds": 5}, client={"check_probability": 1.0})
    async with Network(folder, plan) as network, aiohttp.ClientSession() as session:
        await use(network, seen)
        await settle(network, session)
        for name in DAEMONS:
            base = network.ready[name]["observe"]
            seen.metrics[name] = (await fetch(session, f"{base}/metrics"))[1]
            seen.health[name] = await fetch(session, f"{base}/healthz")
            status, text = await fetch(session, f"{base}/readyz")
            seen.ready[name] = status, json.loads(text)
        base = network.ready[SCHEDULER]["observe"]
        async with session.post(f"{base}/metrics") as posted:
            seen.strange = (await fetch(session, f"{base}/metrics/../secret"))[0], posted.status
        async with hung_p2p(network):
            await until(lambda: status_of(session, f"{base}/readyz"), lambda status: status != 200)  # the last answer serves a second
            status, text = await fetch(session, f"{base}/readyz")
            seen.stopped = status, json.loads(text)
        seen.secrets = secrets_of(network)
    seen.logs = "".join(file.read_text() for file in network.folder.logs.glob("*.log"))
    return seen


async def use(network: Network, seen: Watched) -> None:
    settings = load(ClientSettings, file=network.client_config, env={})
    async with Client(settings, load(ChainSettings, file=network.client_config, env={})) as client:
        vectors = await client.embed(MINILM, [f"{WORDS[0]} {WORDS[1]}", WORDS[2]])
        text = await client.chat(TINY_LLAMA, f"Say {WORDS[0]}", max_tokens=40)
        seen.jobs = [hex0x(vectors.job), hex0x(text.job)]
        assert vectors.verdict.state.value == "accepted"


async def settle(network: Network, session: aiohttp.ClientSession) -> None:
    """Wait until everything is owed, then have it redeemed."""

    async def metric(role: str, name: str, **labels: str) -> float:
        return value_of((await fetch(session, f"{network.ready[role]['observe']}/metrics"))[1], name, **labels)

    await until(lambda: metric(SCHEDULER, "gpumarket_clients_money_tokens", state="held"), lambda held: held == 0)
    await until(lambda: metric(SCHEDULER, "gpumarket_clients_money_tokens", state="open"), lambda left: left == 0)
    for role in DAEMONS[:2]:
        await until(lambda role=role: metric(role, "gpumarket_unredeemed_tokens"), lambda amount: amount > 0)  # type: ignore[misc]
        network.processes.signal(role, signal.SIGUSR1)
        await until(lambda role=role: metric(role, "gpumarket_redemptions_total"), lambda count: count > 0)  # type: ignore[misc]


async def until(ask: Callable[[], Any], holds: Callable[[float], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not holds(await ask()):  # noqa: ASYNC110  over HTTP there is no event
            await asyncio.sleep(0.3)


async def status_of(session: aiohttp.ClientSession, url: str) -> int:
    return (await fetch(session, url))[0]


async def fetch(session: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with session.get(url) as response:
        return response.status, await response.text()


@asynccontextmanager
async def hung_p2p(network: Network) -> AsyncIterator[None]:
    """The scheduler's p2p process stands still."""
    scheduler = psutil.Process(network.processes.roles[SCHEDULER].process.pid)
    (child,) = (c for c in scheduler.children() if any("p2p" in word for word in c.cmdline()))
    child.suspend()
    try:
        yield
    finally:
        child.resume()


def secrets_of(network: Network) -> dict[str, str]:
    """What must be nowhere: keys, passwords, prompts; and what would be a label without bound: addresses."""
    found = {f"word {word}": word for word in WORDS}
    for name, key in network.wallets.items():
        found[f"key of {name}"] = key.secret.hex()
        found[f"address of {name}"] = key.address.hex()
        found[f"password of {name}"] = (network.folder.keys / f"{name}.password").read_text().strip()
    return found


# --- metrics -------------------------------------------------------------------------------------------------------------------


def test_scheduler_metrics_count_the_jobs_that_ran(watched: Watched) -> None:
    assert watched.value(SCHEDULER, "gpumarket_orders_total") >= 3  # two jobs, and a check of the first
    assert watched.value(SCHEDULER, "gpumarket_leases_total", task="embed") >= 1
    assert watched.value(SCHEDULER, "gpumarket_leases_total", task="generate") >= 1
    assert watched.value(SCHEDULER, "gpumarket_leases_total", task="check") >= 1
    assert watched.value(SCHEDULER, "gpumarket_verdicts_total", verdict="accepted") >= 1
    assert watched.value(SCHEDULER, "gpumarket_attempt_states_total", state="owed") >= 3
    assert watched.value(SCHEDULER, "gpumarket_providers", standing="proven") == 2
    assert watched.value(SCHEDULER, "gpumarket_chain_trouble") == 0
    assert watched.value(SCHEDULER, "gpumarket_p2p_up") == 1
    assert watched.value(SCHEDULER, "gpumarket_transactions_total", outcome="mined") > 0
    assert watched.value(SCHEDULER, "gpumarket_gas_spent_ether_total") > 0


def test_scheduler_metrics_show_money_as_it_moved(watched: Watched) -> None:
    used = watched.value(SCHEDULER, "gpumarket_clients_money_tokens", state="used")
    vouchered = watched.value(SCHEDULER, "gpumarket_providers_money_tokens", state="vouchered")
    assert used > vouchered > 0, "what clients pay is what providers earn and the fee"


def test_provider_metrics_count_tokens_first_output_and_earnings(watched: Watched) -> None:
    role = "provider-1"
    assert watched.value(role, "gpumarket_tokens_total", model=TINY_LLAMA) >= 1
    assert watched.value(role, "gpumarket_first_token_seconds_count", model=TINY_LLAMA) >= 1
    assert watched.value(role, "gpumarket_money_tokens", state="owed") > 0
    assert watched.value(role, "gpumarket_money_tokens", state="redeemed") > 0
    assert watched.value(role, "gpumarket_schedulers", state="connected") == 1
    assert watched.value(role, "gpumarket_stake_tokens", state="bonded") >= 200
    assert watched.value(role, "gpumarket_wallet_gas_ether") > 0
    assert sum(watched.value(p, "gpumarket_attempts_total", outcome="completed") for p in DAEMONS[1:]) >= 3


def test_metrics_of_every_daemon_are_promtool_clean(watched: Watched) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("NOT CHECKED: promtool is not installed (Debian: apt install prometheus)")
    for role, text in watched.metrics.items():
        done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (0, ""), f"{role}: {done.stderr}"


def test_metrics_and_traces_hold_no_secret_prompt_key_or_address(watched: Watched) -> None:
    shown = "".join(watched.metrics.values()) + "".join(text for _, text in watched.health.values())
    shown += json.dumps([*watched.ready.values(), watched.stopped])
    traced = b"".join(watched.collector.raw)
    for what, secret in watched.secrets.items():
        assert secret not in shown, f"{what} is in the metrics"
        assert secret.encode() not in traced, f"{what} is in the traces"
        if len(secret) == 64:
            assert bytes.fromhex(secret) not in traced, f"{what} is in the traces"
    assert [job for job in watched.jobs if job in shown] == []


def test_metrics_names_end_in_their_units(watched: Watched) -> None:
    for text in watched.metrics.values():
        for family in text_string_to_metric_families(text):
            samples = {sample.name for sample in family.samples}
            if family.type == "counter":
                assert all(name.endswith(("_total", "_created")) for name in samples), family.name
            assert not re.search(r"_(ms|milliseconds|minutes|wei|kb|mb)(_|$)", family.name), family.name


# --- health --------------------------------------------------------------------------------------------------------------------


def test_health_of_every_daemon_is_ok_while_it_lives(watched: Watched) -> None:
    assert set(watched.health.values()) == {(200, "ok\n")}


def test_readiness_of_every_daemon_holds_after_a_canary_through_its_engines(watched: Watched) -> None:
    assert watched.ready == {role: (200, {"ready": True, "reasons": []}) for role in DAEMONS}, watched.logs[-4_000:]


def test_readiness_is_refused_with_its_reason_while_the_p2p_process_hangs(watched: Watched) -> None:
    status, answer = watched.stopped
    assert status == 503
    assert answer["ready"] is False
    assert [reason.partition(":")[0] for reason in answer["reasons"]] == ["p2p"]


def test_window_answers_its_three_paths_and_nothing_else(watched: Watched) -> None:
    assert watched.strange == (404, 405)


# --- traces --------------------------------------------------------------------------------------------------------------------

JOB_SPANS = {
    "gpumarket-client": {"client.job", "client.quote", "client.order", "client.infer", "client.ack", "client.receipt"},
    "gpumarket-scheduler": {
        "scheduler.quote",
        "scheduler.order",
        "scheduler.match",
        "scheduler.lease",
        "scheduler.claim",
        "scheduler.settle",
    },
    "gpumarket-provider": {
        "provider.infer",
        "provider.admission",
        "provider.queue",
        "provider.prefill",
        "provider.decode",
        "provider.receipt",
        "provider.claim",
    },
}


def roots(watched: Watched) -> list[Seen]:
    return [span for span in watched.collector.spans if span.name == "client.job"]


def test_trace_of_one_job_leads_from_the_client_to_its_settlement(watched: Watched) -> None:
    assert len(roots(watched)) == 2
    for root in roots(watched):
        found: dict[str, set[str]] = {}
        for span in watched.collector.of(root.trace):
            found.setdefault(span.service, set()).add(span.name)
        for service, names in JOB_SPANS.items():
            assert names <= found[service], f"{service} lacks {names - found[service]}"


def test_trace_spans_hang_together(watched: Watched) -> None:
    for root in roots(watched):
        spans = watched.collector.of(root.trace)
        known = {span.span for span in spans}
        assert [span.name for span in spans if span.parent not in known] == ["client.job"]
        refused = {span.name for span in spans if span.failed}
        assert refused <= {"scheduler.order"}, f"{refused}: a channel that was just opened may still be unknown there, nothing else"


def test_trace_of_a_redemption_is_linked_to_the_jobs_that_it_pays(watched: Watched) -> None:
    jobs = {root.trace for root in roots(watched)}
    for name in ("provider.redeem", "scheduler.redeem"):
        redeemed = [span for span in watched.collector.spans if span.name == name]
        assert redeemed, f"no {name}"
        assert {link for span in redeemed for link in span.links} & jobs


def test_trace_spans_say_only_what_is_listed(watched: Watched) -> None:
    allowed = {f"gpumarket.{name}" for name in ATTRIBUTES}
    assert {key for span in watched.collector.spans for key in span.attributes} <= allowed

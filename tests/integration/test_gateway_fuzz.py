"""schemathesis on /openapi.json: whatever is sent, the answer is one that the document has, and never the gateway's own failure."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import sdk_models
from gateway_market import gateway
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.result import Ok
from sdk_market import FakeProvider

from gpumarket.core.units import hex0x
from gpumarket.gateway.endpoints import ENDPOINTS
from gpumarket.gateway.openapi import document_of

load_all_checks()
WANTED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
)
MODELS, TABLE = {"embeddings": "mini"}, "table"
"""What is asked for in some of the cases, so that more than the model's name is tried."""
FAST, ALL = 200, 5_000


@dataclass(frozen=True)
class Served:
    url: str
    key: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A gateway in a thread of its own: schemathesis asks and waits."""
    loop, stop, found = asyncio.new_event_loop(), asyncio.Event(), list[Served]()
    up = threading.Event()

    async def serve() -> None:
        folder: Path = tmp_path_factory.mktemp("fuzz")
        seller = FakeProvider("a", models=(sdk_models.EMBED, sdk_models.CHAT, sdk_models.TABLE))
        async with gateway(folder, seller, client={"deposit": "50", "exposure": "10"}, output_tokens_default=16, choices_max=4) as g:
            await g.room.counter.client.add_model(TABLE, sdk_models.TABLE.digest)
            found.append(Served(g.url, g.key))
            up.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert up.wait(60)
    yield found[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(60)


def known_model(case: Any) -> Any:
    """The same for a model that there is."""
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = MODELS.get(case.operation.label.rpartition("/")[2], "chat")
    if case.path_parameters:
        there = {"model": TABLE if "/v2/" in case.operation.label else "chat", "version": hex0x(sdk_models.TABLE.digest)}
        case.path_parameters = {name: there[name] for name in case.path_parameters}
    if isinstance(case.body, dict) and case.body.get("inputs"):
        rows = len(case.body["inputs"])
        given = case.body["inputs"][0] if isinstance(case.body["inputs"][0], dict) else {}
        fits = {"name": "x", "datatype": "FP32", "shape": [rows, 2], "data": [0.5] * 2 * rows}
        case.body["inputs"] = [fits | {name: given[name] for name in ("data", "shape") if len(str(given.get(name))) % 3 == 0}]
        for output in case.body.get("outputs") or ():
            output["name"] = "y"
    return case


def fuzz(served: Served, cases: int) -> tuple[Counter[int], Counter[str]]:
    """So many cases over all endpoints, valid and broken ones; the statuses that came, and how often each endpoint answered."""
    document = document_of(ENDPOINTS)
    del document["security"]  # every case has the key that is given
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=served.url)
    operations: list[Any] = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) == len(ENDPOINTS)
    each = -(-cases // sum(endpoint.table is not None for endpoint in ENDPOINTS))  # a GET has little that may vary
    statuses, answered = Counter[int](), Counter[str]()
    checks = [CHECKS.get_one(name) for name in WANTED]
    for operation in operations:
        valid, broken = (operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE))

        @settings(
            max_examples=each,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=st.one_of(valid, valid.map(known_model), broken))
        def ask(case: Any) -> None:
            response = case.call(headers={"authorization": f"Bearer {served.key}"})
            statuses[response.status_code] += 1
            answered[case.operation.label] += response.status_code == 200
            case.validate_response(response, checks=checks)

        ask()
    print(dict(statuses), dict(answered))
    return statuses, answered


def test_fuzzed_requests_get_documented_answers(served: Served) -> None:
    statuses, _ = fuzz(served, FAST)
    assert sum(statuses.values()) >= FAST * 0.9
    assert {200, 400} <= set(statuses)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_many_fuzzed_requests_get_documented_answers(served: Served) -> None:
    statuses, answered = fuzz(served, ALL)
    assert sum(statuses.values()) >= ALL * 0.9
    assert all(answered.values()), answered
    assert {200, 400, 404} <= set(statuses)


def test_fuzzed_requests_without_a_key_are_all_refused(served: Served) -> None:
    wrong, _ = fuzz(Served(served.url, "gm-" + "A" * 43), 30)
    assert set(wrong) <= {401, 404}  # no route has a name that is a dot or a slash

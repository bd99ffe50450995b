"""docs/metrics.md, the board and the alerts name the metrics that there are, and no others; alerts fire when they should."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from gpumarket.telemetry.metrics import PREFIX, Kind, Metric

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "docker" / "monitoring"
BOARD: dict[str, Any] = json.loads((MONITORING / "grafana" / "boards" / "gpumarket.json").read_text("utf-8"))
ALERTS: dict[str, Any] = yaml.safe_load((MONITORING / "alerts.yml").read_text("utf-8"))
CASES: dict[str, Any] = yaml.safe_load((MONITORING / "alerts_test.yml").read_text("utf-8"))
NAME = re.compile(rf"\b{PREFIX}\w+")


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tools_metrics", ROOT / "tools" / "metrics.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = tool()
PROVIDER: list[Metric]
SCHEDULER: list[Metric]
PROVIDER, SCHEDULER = map(list, TOOL.both())
EXPORTED = {metric.full_name: metric for metric in (*PROVIDER, *SCHEDULER, *TOOL.of_gateway())}


def base(name: str) -> str:
    """The metric of a sample's name."""
    return name if name in EXPORTED else re.sub(r"_(bucket|count|sum)$", "", name)


def rules() -> list[dict[str, Any]]:
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


def expressions() -> dict[str, str]:
    """Every expression of the board and the alerts, by where it stands."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in rules()}
    for panel in BOARD["panels"]:
        found |= {f"panel {panel['title']} {target['refId']}": target["expr"] for target in panel.get("targets", ())}
    return found


def test_metrics_page_has_the_tables_that_the_daemons_have() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    assert TOOL.tables() in page, "run .venv/bin/python tools/metrics.py"


def test_board_and_alerts_name_only_metrics_that_are_exported() -> None:
    wrong = [(where, name) for where, text in expressions().items() for name in NAME.findall(text) if base(name) not in EXPORTED]
    assert wrong == []


def test_board_and_alerts_name_only_label_values_that_there_are() -> None:
    wrong = []
    for where, text in expressions().items():
        for name, matchers in re.findall(rf"({PREFIX}\w+)\{{([^}}]*)\}}", text):
            metric = EXPORTED[base(name)]
            for label, values in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
                if label not in ("instance", "job", "le") and (label != metric.label or not set(values.split("|")) <= set(metric.values)):
                    wrong.append((where, name, label, values))
    assert wrong == []


def test_board_answers_the_three_questions_in_rows() -> None:
    assert [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"] == ["Am I earning?", "Why not?", "Is anything at risk?"]


def test_board_panels_have_ids_and_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_board_reads_the_provisioned_source() -> None:
    source = yaml.safe_load((MONITORING / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text("utf-8"))
    (uid,) = {entry["uid"] for entry in source["datasources"]}
    assert {panel["datasource"]["uid"] for panel in BOARD["panels"] if panel["type"] != "row"} == {uid}


def test_alerts_say_what_to_do_next_and_have_a_case_each_way() -> None:
    tried: dict[str, set[bool]] = {}
    for case in CASES["tests"]:
        for check in case["alert_rule_test"]:
            tried.setdefault(check["alertname"], set()).add(bool(check["exp_alerts"]))
    assert {rule["alert"] for rule in rules()} == set(tried)
    assert [name for name, ways in tried.items() if ways != {True, False}] == []
    assert all(rule["annotations"].keys() == {"summary", "next"} and rule["labels"]["severity"] for rule in rules())


@pytest.mark.parametrize(
    "words", [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")]
)
def test_promtool_finds_nothing_wrong(words: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("NOT CHECKED: promtool is not installed (Debian: apt install prometheus)")
    done = subprocess.run([promtool, *words], cwd=MONITORING, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_metric_names_and_labels_follow_the_conventions() -> None:
    for metric in EXPORTED.values():
        assert re.fullmatch(r"gpumarket_[a-z0-9]+(_[a-z0-9]+)*", metric.full_name)
        assert metric.help.endswith("."), metric.name
        assert len(metric.values) <= 64, f"{metric.name} has as many series"
        assert (metric.kind is Kind.COUNTER) == metric.name.endswith("_total")


def test_metrics_that_two_daemons_share_mean_the_same() -> None:
    of_scheduler = {metric.name: metric for metric in SCHEDULER}
    for metric in PROVIDER:
        other = of_scheduler.get(metric.name, metric)
        assert (other.kind, other.label) == (metric.kind, metric.label), metric.name

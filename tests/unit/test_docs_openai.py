"""docs/openai.md says of parameters what the gateway's tables say; test_cli_testnet and test_gateway_conformance run its code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from gpumarket.core.settings import load
from gpumarket.gateway.problems import codes
from gpumarket.gateway.settings import GatewaySettings

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "openai.md").read_text("utf-8")


def test_openai_page_has_the_parameters_that_the_gateway_has() -> None:
    spec = importlib.util.spec_from_file_location("tools_gateway_parameters", ROOT / "tools" / "gateway_parameters.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.page(PAGE) == PAGE, "run .venv/bin/python tools/gateway_parameters.py"


def test_openai_page_names_only_codes_that_there_are() -> None:
    table = PAGE.split("## Errors")[1].split("## ")[0]
    named = set(re.findall(r"`([a-z_]+)`", table)) - {"code", "param"}
    assert len(named) > 10
    assert named <= set(codes())


def test_openai_page_has_one_block_of_each_language() -> None:
    languages = re.findall(r"^```(\w+)$", PAGE, re.MULTILINE)
    assert sorted(languages) == ["bash", "js", "python", "toml"]


@pytest.mark.parametrize("name", ["openai.md", "tensors.md"])
def test_pages_on_the_gateway_have_links_that_lead_somewhere(name: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / "docs" / name).read_text("utf-8"))
    assert targets and [t for t in targets if not (ROOT / "docs" / t).exists()] == []


def test_openai_page_settings_are_read_by_the_gateway(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    file = tmp_path / "settings.toml"
    file.write_text(block)
    assert load(GatewaySettings, file=file, env={}) == load(GatewaySettings, env={}), "the page shows defaults"


@pytest.mark.parametrize("word", ["x-gpumarket-job", "x-request-id", "Idempotency-Key", "Retry-After"])
def test_openai_page_tells_of_what_answers_carry(word: str) -> None:
    assert word in PAGE

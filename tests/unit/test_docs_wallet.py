"""docs/wallet.md names only commands, options and settings that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpumarket.cli.main import run
from gpumarket.core import keystore
from gpumarket.node.settings import ProviderSettings
from gpumarket.scheduler.settings import SchedulerSettings
from gpumarket.sdk.settings import ClientSettings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "wallet.md"
COMMANDS = sorted({match for match in re.findall(r"`gpumarket ([^`]+)`", PAGE.read_text("utf-8"))})


@pytest.mark.parametrize("command", COMMANDS)
def test_wallet_page_names_commands_that_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = command.split()
    verb = words[:1] if words[0] == "economics" else words[:2]
    assert run([*verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in words if option.startswith("--"))


def test_wallet_page_names_settings_that_exist() -> None:
    text = PAGE.read_text("utf-8")
    assert len(COMMANDS) > 12
    assert {"owner", "owner_key_file", "spend_limit"} <= set(ClientSettings.model_fields)
    assert "owner" in ProviderSettings.model_fields and "owner" in SchedulerSettings.model_fields
    assert f"`{keystore.CREDENTIAL}`" in text

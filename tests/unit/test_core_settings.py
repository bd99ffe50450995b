"""Settings: who wins, and what an unknown key is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumarket.core.errors import ConfigError
from gpumarket.core.settings import ChainSettings, load


def write(folder: Path, text: str) -> Path:
    file = folder / "gpumarket.toml"
    file.write_text(text)
    return file


def test_settings_flag_beats_variable_beats_file_beats_default(tmp_path: Path) -> None:
    file = write(tmp_path, "[chain]\nconfirmations = 3\npoll_seconds = 0.25\nrpc_url = 'http://file'\n")
    env = {"GPUMARKET_CHAIN_CONFIRMATIONS": "4", "GPUMARKET_CHAIN_RPC_URL": "http://env"}
    settings = load(ChainSettings, file=file, env=env, flags={"rpc_url": "http://flag", "confirmations": None})
    assert (settings.rpc_url, settings.confirmations, settings.poll_seconds) == ("http://flag", 4, 0.25)
    assert settings.address_book == ChainSettings().address_book


def test_settings_unknown_key_in_file_is_told_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="confirmation") as caught:
        load(ChainSettings, file=write(tmp_path, "[chain]\nconfirmation = 3\n"), env={})
    assert caught.value.hint == "did you mean 'confirmations'?"


def test_settings_unknown_variable_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="GPUMARKET_CHAIN_RPC_URI") as caught:
        load(ChainSettings, env={"GPUMARKET_CHAIN_RPC_URI": "x"})
    assert "rpc_url" in caught.value.hint


def test_settings_key_unlike_any_is_told_all() -> None:
    with pytest.raises(ConfigError) as caught:
        load(ChainSettings, env={"GPUMARKET_CHAIN_ZZZ": "x"})
    assert "confirmations" in caught.value.hint and "rpc_url" in caught.value.hint


def test_settings_value_of_wrong_type_is_named_without_a_did_you_mean() -> None:
    with pytest.raises(ConfigError, match=r"chain\.confirmations") as caught:
        load(ChainSettings, env={"GPUMARKET_CHAIN_CONFIRMATIONS": "two"})
    assert caught.value.hint == ""


def test_settings_flag_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="rpc"):
        load(ChainSettings, env={}, flags={"rpc": "x"})


@pytest.mark.parametrize("text", ["not toml [", "chain = 3\n"])
def test_settings_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"TOML|table"):
        load(ChainSettings, file=write(tmp_path, text), env={})


def test_settings_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent"):
        load(ChainSettings, file=tmp_path / "absent.toml", env={})


def test_settings_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        ChainSettings().rpc_url = "x"

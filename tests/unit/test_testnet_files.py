"""A testnet's files: settings, keys, the folder and what it says about itself."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from gpumarket.core.errors import ConfigError, StateLocked
from gpumarket.core.settings import load
from gpumarket.node.settings import ProviderSettings
from gpumarket.testnet import keys, plan, settings_file
from gpumarket.testnet.folder import Folder
from gpumarket.testnet.network import Network
from gpumarket.testnet.processes import mark_of


def test_settings_file_round_trips_every_kind_of_value(tmp_path: Path) -> None:
    values = {"text": 'a "quoted" \\ line\nand DEL \x7f', "flag": True, "count": 3, "share": 0.25, "list": ["x", "y"], "path": tmp_path}
    file = settings_file.write(tmp_path / "a.toml", {"one": {**values, "rows": [{"a": 1}, {"b": "two"}]}, "two": {"empty": []}})
    read = tomllib.loads(file.read_text())
    assert read["one"] == {**values, "path": str(tmp_path), "rows": [{"a": 1}, {"b": "two"}]}
    assert read["two"] == {"empty": []}


def test_settings_file_refuses_a_value_that_toml_lacks(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="NoneType"):
        settings_file.write(tmp_path / "a.toml", {"one": {"nothing": None}})


def test_settings_file_is_what_the_provider_reads(tmp_path: Path) -> None:
    models = [{"model": "0x" + "11" * 32, "prompt_price": "0.02", "output_price": "0.1", "warm": False}]
    file = settings_file.write(tmp_path / "p.toml", {"provider": {"state": tmp_path, "models": models, "checks": False}})
    read = load(ProviderSettings, file=file, env={})
    assert (read.state, read.checks, read.models[0].prompt_price) == (tmp_path, False, "0.02")


def test_wallet_is_private_and_made_once(tmp_path: Path) -> None:
    key, key_file, password_file = keys.wallet(tmp_path / "keys", "provider-1")
    assert keys.wallet(tmp_path / "keys", "provider-1")[0].address == key.address
    assert {oct(file.stat().st_mode & 0o777) for file in (key_file, password_file)} == {"0o600"}
    assert (tmp_path / "keys").stat().st_mode & 0o077 == 0
    assert keys.wallet(tmp_path / "keys", "provider-2")[0].address != key.address


def test_peer_id_equals_that_of_libp2p(tmp_path: Path) -> None:
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    file = tmp_path / "p2p.key"
    ours = keys.peer_id(file)
    pair = create_new_key_pair(bytes.fromhex(file.read_text()))
    assert ours == str(ID.from_pubkey(pair.public_key))
    assert ours.startswith("12D3KooW")


@pytest.mark.parametrize(("data", "text"), [(b"", ""), (b"\0\0a", "112g"), (b"hello world", "StV1DL6CwTryKyV")])
def test_base58_known_values(data: bytes, text: str) -> None:
    assert keys.base58(data) == text


def test_folder_with_a_running_testnet_is_refused(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "net")
    folder.create()
    folder.write_marks([mark_of("scheduler", os.getpid())])
    with pytest.raises(StateLocked, match="scheduler"):
        folder.create()
    folder.write_marks([])
    folder.create()
    assert folder.root.stat().st_mode & 0o077 == 0


async def test_network_refused_by_a_running_testnet_leaves_what_that_one_wrote_down(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "net")
    folder.create()
    marks = [mark_of("scheduler", os.getpid())]
    folder.write_marks(marks)
    folder.write_manifest({"running": True})
    refused = Network(folder.root, plan.Plan(plan.honest(1)))
    with pytest.raises(StateLocked):
        await refused.__aenter__()
    await refused.down()
    assert folder.marks() == marks and folder.describe() == {"running": True}, "`testnet down` must still find it"


def test_folder_that_cannot_be_is_refused_and_holds_no_testnet() -> None:
    folder = Folder.at(Path("/dev/null/net"))
    with pytest.raises(ConfigError, match="cannot use") as caught:
        folder.create()
    assert "--dir" in caught.value.hint
    with pytest.raises(ConfigError, match="no testnet runs"):
        folder.describe()
    assert folder.marks() == []


def test_folder_without_a_testnet_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Folder.at(tmp_path).describe()
    assert caught.value.hint == "gpumarket testnet up"


def test_folder_log_of_an_unknown_role_names_those_there_are(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    folder.logs.mkdir()
    (folder.logs / "scheduler.log").write_text("")
    assert folder.log("scheduler").name == "scheduler.log"
    with pytest.raises(ConfigError, match="scheduler"):
        folder.log("nobody")


def test_plan_cheater_undercuts_every_honest_provider_and_takes_no_checks() -> None:
    honest = [model for provider in plan.honest(9) for model in provider.models if model.name == plan.MINILM]
    cheat = plan.cheater()
    assert float(cheat.models[0].prompt_price) < min(float(model.prompt_price) for model in honest)
    assert cheat.settings == {"checks": False} and cheat.cheat == "lower-precision"

"""Folders for roles on hosts of their own: made once, completed later, each with its own secrets only."""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
from settlement_chain import LocalChain

from gpumarket.contracts.deploy import AddressBook
from gpumarket.core import keystore
from gpumarket.core.errors import ConfigError, Unreachable
from gpumarket.core.settings import ChainSettings, load
from gpumarket.node.settings import ProviderSettings
from gpumarket.scheduler.settings import SchedulerSettings
from gpumarket.sdk.lock import read_lock
from gpumarket.sdk.settings import ClientSettings
from gpumarket.settlement.chain import connect
from gpumarket.testnet.assignments import is_scheduler
from gpumarket.testnet.plan import CHEATS
from gpumarket.testnet.provision import Provision, plan_of, provision

NAMES = ("scheduler", "client", "provider-1", "provider-3")


def say(_: str) -> None:
    return None


def place(root: Path, chain: LocalChain, names: tuple[str, ...], *, rpc: str = "") -> Provision:
    for folder in ("network", "roles", "database"):
        (root / folder).mkdir(exist_ok=True)
    return Provision(root / "network", root / "roles", rpc or chain.anvil.url, names, root / "database" / "password")


def settings(root: Path, name: str) -> dict[str, Any]:
    return tomllib.loads((root / "roles" / name / "settings.toml").read_text())


async def test_provision_makes_a_network_whose_roles_hold_their_own_secrets_only(tmp_path: Path, local: LocalChain) -> None:
    done = await provision(place(tmp_path, local, NAMES), say)
    assert set(done["roles"]) == set(NAMES)
    assert AddressBook.load(tmp_path / "network" / "contracts.json").chain_id == 31337
    assert set(read_lock(tmp_path / "network" / "models.lock")) == set(done["models"]) == {"all-MiniLM-L6-v2", "tiny-llama"}
    passwords = {name: (tmp_path / "roles" / name / "keys" / "key.password").read_text().strip() for name in NAMES}
    assert len(set(passwords.values())) == len(NAMES)
    database = (tmp_path / "database" / "password").read_text().strip()
    for name in NAMES:
        folder = tmp_path / "roles" / name
        secrets = [file for file in folder.rglob("*") if file.is_file() and file.name != "settings.toml"]
        assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in secrets)
        told = (folder / "settings.toml").read_text()
        assert not any(password in told for password in (*passwords.values(), database))
        assert (folder / "pgpass").exists() is is_scheduler(name)
        key = keystore.load(folder / "keys" / "key.json", passwords[name])
        assert f"0x{key.address.hex()}" == done["roles"][name].lower()
    assert not any(
        password in file.read_text() for file in (tmp_path / "network").glob("*.*") for password in (*passwords.values(), database)
    )


async def test_provision_settings_are_what_each_role_takes(tmp_path: Path, local: LocalChain) -> None:
    await provision(place(tmp_path, local, NAMES), say)
    roles = tmp_path / "roles"
    scheduler = load(SchedulerSettings, file=roles / "scheduler" / "settings.toml", env={})
    provider = load(ProviderSettings, file=roles / "provider-3" / "settings.toml", env={})
    client = load(ClientSettings, file=roles / "client" / "settings.toml", env={})
    assert scheduler.database_url == "postgresql+psycopg://gpumarket@database/scheduler"
    assert (scheduler.listen, scheduler.advertise, scheduler.observe_listen) == ("0.0.0.0:7000", "scheduler:7000", "0.0.0.0:9100")
    assert provider.advertise == "provider-3:7000"
    assert provider.p2p_bootstrap[0].startswith("/dns4/scheduler/tcp/4001/p2p/12D3Koo")
    assert client.check_probability == 1.0 and client.lock_file == Path("/network/models.lock")


async def test_provision_again_keeps_every_key_and_adds_what_is_new(tmp_path: Path, local: LocalChain) -> None:
    first = await provision(place(tmp_path, local, ("scheduler", "client")), say)
    meeting = (tmp_path / "network" / "meeting_point").read_text()
    more = ("scheduler-2", "provider-1", "cheater-silence")
    added = await provision(place(tmp_path, local, more), say)
    again = await provision(place(tmp_path, local, ("scheduler", "client")), say)
    assert again["roles"] == first["roles"] and again["contracts"] == added["contracts"] == first["contracts"]
    second = settings(tmp_path, "scheduler-2")["scheduler"]
    assert second["database"].endswith("/scheduler_2") and second["p2p_bootstrap"] == [meeting.strip()]
    assert settings(tmp_path, "cheater-silence")["provider"]["checks"] is False
    connected = await connect(ChainSettings(rpc_url=local.anvil.url, address_book=tmp_path / "network" / "contracts.json"))
    try:
        for address in (*first["roles"].values(), *added["roles"].values()):
            who = connected.w3.to_checksum_address(address)
            assert await connected.w3.eth.get_balance(who) > 0 and await connected.token.functions.balanceOf(who).call() > 0
    finally:
        await connected.close()


async def test_provision_without_a_chain_says_so(tmp_path: Path, local: LocalChain) -> None:
    with pytest.raises(Unreachable):
        await provision(place(tmp_path, local, ("scheduler",), rpc="http://127.0.0.1:1"), say)


@pytest.mark.parametrize("name", ["provder-1", "provider-x", "cheater-kindness", "", "../client", "schedulers"])
def test_plan_of_a_name_that_stands_for_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no role is called"):
        plan_of(["scheduler", name])


def test_plan_has_every_cheat() -> None:
    plan = plan_of([f"cheater-{kind}" for kind in CHEATS])
    assert {provider.cheat for provider in plan.providers} == set(CHEATS)

"""A damaged journal is named by `doctor`, and `doctor rescue` shows what money is in it, without touching it (F10); versions (F12)."""

from __future__ import annotations

import importlib
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from journal_kill.facts import Fact
from node_fixtures import SCHEDULER
from reliability import record
from scheduler_world import SCHEDULER as HUB_KEY

from gpumarket.cli.main import run
from gpumarket.core.daemon import StateFolder
from gpumarket.core.errors import JournalError
from gpumarket.core.units import Hash
from gpumarket.scheduler import migrations
from gpumarket.settlement.rescue import rescue
from gpumarket.settlement.vouchers import verify_voucher

ROLES = ("provider", "scheduler", "client")


async def left_by(role: str, folder: Path) -> tuple[Path, list[Fact]]:
    """A role's database after some trading."""
    scenario, said = importlib.import_module(f"journal_kill.{role}"), list[Fact]()
    os.mkdir(folder, 0o700)
    await scenario.work(folder, said.append)
    return folder / scenario.FILE, said


def spoil(database: Path, page: int) -> None:
    data = bytearray(database.read_bytes())
    data[4096 * page : 4096 * (page + 1)] = b"\xa5" * 4096
    database.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


async def test_rescue_shows_a_providers_vouchers_with_their_signatures(tmp_path: Path) -> None:
    database, said = await left_by("provider", tmp_path / "provider")
    before = contents(database.parent)
    (found,) = rescue(database.parent)
    assert (found.flaw, found.unread, found.in_use) == ("", [], False)
    (voucher,) = found.tables["vouchers"]
    newest = max(fact["vouchered"] for fact in said if "vouchered" in fact)
    assert int(voucher["cumulative"]) == newest
    scenario = importlib.import_module("journal_kill.provider")
    signature = bytes.fromhex(voucher["signature"][2:])
    verify_voucher(scenario.CHANNELS, Hash(bytes.fromhex(voucher["channel"][2:])), newest, signature, SCHEDULER.address)
    assert contents(database.parent) == before


async def test_rescue_shows_a_schedulers_channels_and_guards(tmp_path: Path) -> None:
    database, said = await left_by("scheduler", tmp_path / "scheduler")
    (found,) = rescue(database.parent)
    (guard,), (spoke,), (hub,) = (found.tables[name] for name in ("voucher_guard", "spokes", "client_channels"))
    newest = max(int(fact["at"].split()[1]) for fact in said if fact["kind"] == "signed" and fact["what"] == "voucher")
    assert int(guard["signed_at_most"]) == newest == int(spoke["vouchered"])
    assert int(hub["voucher"]) > 0 and hub["signature"].startswith("0x")
    assert HUB_KEY.address.hex() not in json.dumps(hub["signature"])


@pytest.mark.parametrize("role", ROLES)
async def test_rescue_of_a_damaged_journal_tells_the_flaw_and_reads_on(role: str, tmp_path: Path) -> None:
    database, _ = await left_by(role, tmp_path / role)
    spoil(database, 4)
    before = contents(database.parent)
    (found,) = rescue(database.parent)
    assert "pages differ" in found.flaw
    assert found.tables or found.unread
    assert contents(database.parent) == before


async def test_rescue_of_a_journal_that_is_gone_says_so(tmp_path: Path) -> None:
    database, _ = await left_by("client", tmp_path / "client")
    database.unlink()
    (found,) = rescue(database.parent)
    assert "is gone" in found.flaw
    assert not database.exists()


async def test_doctor_names_a_damaged_journal_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    database, _ = await left_by("client", tmp_path / "client")
    monkeypatch.setenv("GPUMARKET_CLIENT_STATE", str(database.parent))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()

    def finding() -> dict[str, Any]:
        run(["doctor", "-o", "json"])
        found = [f for f in json.loads(capsys.readouterr().out) if f["subject"] == "journal"]
        assert len(found) == 1
        return dict(found[0])

    assert finding()["state"] == "ok"
    with StateFolder(database.parent):
        assert "in use" in finding()["found"]
    spoil(database, 4)
    bad = finding()
    assert bad["state"] == "bad" and str(database) in bad["found"]
    assert f"gpumarket doctor rescue {database.parent}" in bad["next"]


async def test_doctor_rescue_prints_one_json_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database, _ = await left_by("provider", tmp_path / "provider")
    spoil(database, 6)
    capsys.readouterr()
    assert run(["doctor", "rescue", str(database.parent), "-o", "json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["file"] == str(database) and found["flaw"]


def test_doctor_rescue_without_a_journal_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "rescue", str(tmp_path), "-o", "json"]) == 3
    assert "no journal" in json.loads(capsys.readouterr().out)["error"]["message"]


# --- versions --------------------------------------------------------------------------------------------------------------------


async def test_ledger_of_a_newer_version_is_refused_by_name(tmp_path: Path) -> None:
    database, _ = await left_by("scheduler", tmp_path / "scheduler")
    database.with_name(database.name + ".seal").unlink()
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(JournalError, match="9999") as caught:
        migrations.upgrade(f"sqlite:///{database}")
    assert "newer" in caught.value.hint
    with sqlite3.connect(database) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",), "and left as it is"
    connection.close()
    record("F12", 1, "scheduler's ledger of a newer version: refused by its name, left as it is", "refused by name")


@pytest.mark.parametrize("role", ["provider", "client"])
@pytest.mark.parametrize("version", [0, 2])
async def test_journal_of_another_version_is_refused_by_number(role: str, version: int, tmp_path: Path) -> None:
    database, said = await left_by(role, tmp_path / role)
    database.with_name(database.name + ".seal").unlink()
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE journal_version SET version = ?", (version,))
    connection.close()
    before = database.read_bytes()
    with pytest.raises(JournalError, match=f"version {version}, this program wants 1") as caught:
        await importlib.import_module(f"journal_kill.{role}").verify(database.parent, said)
    assert caught.value.hint
    assert database.read_bytes() == before
    record("F12", 1, f"{role}'s journal of version {version}: refused by its number, left as it is", "refused by name")

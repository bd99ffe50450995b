"""`gpumarket guard --role scheduler`: a scheduler's key on another machine signs above what it signed before, and keeps its closes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from journal_kill.scheduler import HUB, SPOKE, live, opened
from scheduler_jobs import NOW, PROVIDER
from scheduler_world import CHANNELS, SCHEDULER, TOKEN
from sqlalchemy import update

from gpumarket.cli.main import run
from gpumarket.contracts.deploy import AddressBook
from gpumarket.core import keystore
from gpumarket.core.errors import BadSignature, JournalError
from gpumarket.core.units import Address, Hash, Money, hex0x
from gpumarket.scheduler import guarding, tables
from gpumarket.scheduler.settings import SchedulerSettings
from gpumarket.settlement import guard_file
from gpumarket.settlement.channel import ChainToppedUp, Pay, handle
from gpumarket.settlement.guard_file import Guarded, GuardedChannel, Scope
from gpumarket.settlement.vouchers import verify_voucher

SCOPE = Scope(31_337, CHANNELS.contract, SCHEDULER.address, "scheduler")
Shell = Callable[..., Any]
Databases = Callable[[str], str]


@pytest.fixture
def shell(tmp_path: Path, databases: Databases, capsys: pytest.CaptureFixture[str]) -> Shell:
    """The command line of a machine (a folder) that holds the scheduler's key."""

    def call(machine: str, *words: str, code: int = 0) -> Any:
        folder = tmp_path / machine
        if not folder.exists():
            folder.mkdir(mode=0o700)
            (folder / "password").touch(mode=0o600)
            (folder / "password").write_text("the password")
            keystore.create(folder / "key.json", "the password", SCHEDULER.secret)
            other, hashes = "0x" + "33" * 20, {name: "0x" + "44" * 32 for name in ("token", "registry", "channels", "disputes")}
            AddressBook(31_337, other, other, hex0x(CHANNELS.contract), other, 0, hashes).save(folder / "contracts.json")
            places: dict[str, object] = {"state": folder, "key_file": folder / "key.json", "password_file": folder / "password"}
            places["database"] = databases(machine)
            lines = "".join(f'{name} = "{place}"\n' for name, place in places.items())
            (folder / "config.toml").write_text(f'[scheduler]\n{lines}[chain]\naddress_book = "{folder / "contracts.json"}"\n')
        assert run(["guard", *words, "--role", "scheduler", "--config", str(folder / "config.toml"), "-o", "json"]) == code
        out = capsys.readouterr()
        return json.loads(out.out)

    return call


def settings(url: str, folder: Path) -> SchedulerSettings:
    return SchedulerSettings(state=folder, database=url)


async def lived(url: str, *, closes: bool = False) -> tuple[int, bytes, int]:
    """A ledger after a few jobs: newest voucher on its spoke, and what its client used."""
    ledger, journal = await opened(url)
    await live(ledger, lambda _: None, 0)
    if closes:
        ledger.mark_close_signed(HUB)
        await ledger.commit()
    voucher, used = ledger.voucher(SPOKE), ledger.hubs[HUB].state.used
    await ledger.close()
    await journal.close()
    return (*voucher, used)


async def exported(url: str, folder: Path) -> Guarded:
    async with guarding.journal_of(settings(url, folder)) as journal:
        return journal.read(guarding.guarded)


async def take_over(url: str, folder: Path, theirs: Guarded) -> guarding.Imported:
    async with guarding.journal_of(settings(url, folder)) as journal:
        return await journal.transact(lambda c: guarding.take_over(c, theirs))


def test_guard_of_a_scheduler_moves_with_its_key_by_the_command_line(shell: Shell, tmp_path: Path) -> None:
    file = str(tmp_path / "guard.json")
    assert shell("one", "export", file)["channels"] == 0
    text = guard_file.export(SCOPE, Guarded([GuardedChannel(SPOKE, PROVIDER, Money(7), Money(0))]), NOW, SCHEDULER)
    Path(file).write_text(text)
    assert shell("two", "import", file) == {"key": hex0x(SCHEDULER.address), "added": 1, "raised": 0, "unchanged": 0}
    assert shell("two", "import", file)["unchanged"] == 1
    client = guard_file.export(replace(SCOPE, role="client"), Guarded([]), NOW, SCHEDULER)
    Path(file).write_text(client)
    assert "role" in shell("two", "import", file, code=4)["error"]["message"]


async def test_scheduler_with_an_imported_guard_signs_above_it_and_never_below(tmp_path: Path, databases: Databases) -> None:
    old, new = databases("old"), databases("new")
    cumulative, signature, _ = await lived(old)
    assert await take_over(new, tmp_path / "new", await exported(old, tmp_path / "old")) == guarding.Imported(1, 0, 0)
    ledger, journal = await opened(new)
    try:
        assert ledger.voucher(SPOKE) == (cumulative, signature), "the same bytes, not another voucher"
        ledger.put_spoke(handle(ledger.spokes[SPOKE].state, ChainToppedUp(TOKEN, 10**10)))  # as the chain tells
        ledger.confirm(SPOKE)
        ledger.put_spoke(handle(ledger.spokes[SPOKE].state, Pay(5, 0)))
        await ledger.commit()
        paid, signed = ledger.voucher(SPOKE)
        assert paid == cumulative + 5
        verify_voucher(CHANNELS, SPOKE, paid, signed, SCHEDULER.address)
        await ledger.close()
    finally:
        await journal.close()


async def test_scheduler_takes_no_order_on_a_channel_whose_close_its_key_has_signed(tmp_path: Path, databases: Databases) -> None:
    old, new = databases("old"), databases("new")
    _, _, used = await lived(old, closes=True)
    theirs = await exported(old, tmp_path / "old")
    assert [close.channel for close in theirs.closes] == [HUB]
    text = guard_file.export(SCOPE, theirs, NOW, SCHEDULER)
    assert guard_file.read(text.encode(), SCOPE) == theirs
    await take_over(new, tmp_path / "new", theirs)
    ledger, journal = await opened(new)
    hub = ledger.hubs[HUB]
    assert hub.close_signed and hub.state.used == used, "asked again, it signs the same close"
    await ledger.close()
    await journal.close()


async def test_guard_import_raises_an_older_ledger_and_never_lowers(tmp_path: Path, database: str) -> None:
    cumulative, _, _ = await lived(database)
    for amount, done in ((cumulative + 9, (0, 1, 0)), (cumulative, (0, 0, 1)), (cumulative + 9, (0, 0, 1))):
        entry = GuardedChannel(SPOKE, PROVIDER, Money(amount), Money(0))
        assert await take_over(database, tmp_path, Guarded([entry])) == guarding.Imported(*done)
    ledger, journal = await opened(database)
    assert ledger.voucher(SPOKE)[0] == ledger.spokes[SPOKE].state.vouchered == cumulative + 9
    await ledger.close()
    await journal.close()


async def test_guard_import_that_does_not_fit_the_ledger_changes_nothing(tmp_path: Path, database: str) -> None:
    cumulative, _, _ = await lived(database)
    other = GuardedChannel(Hash(b"o" * 32), PROVIDER, Money(3), Money(0))
    stranger = GuardedChannel(SPOKE, Address(b"x" * 20), Money(cumulative + 1), Money(0))
    with pytest.raises(BadSignature, match="pays"):
        await take_over(database, tmp_path, Guarded([other, stranger]))
    async with guarding.journal_of(settings(database, tmp_path)) as journal:
        await journal.transact(lambda c: c.execute(update(tables.spokes).values(reserved=Money(TOKEN - cumulative))).close())
    with pytest.raises(JournalError, match="too old to go on with"):
        await take_over(database, tmp_path, Guarded([other, replace(stranger, payee=PROVIDER)]))
    assert [(c.channel, c.cumulative) for c in (await exported(database, tmp_path)).channels] == [(SPOKE, cumulative)]

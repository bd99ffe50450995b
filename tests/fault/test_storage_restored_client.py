"""A client or provider whose journal is an older copy: the client takes over what it signed before, or signs nothing (F11, I3)."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import sdk_models
from journal_kill import provider as provider_life
from journal_kill.facts import NOW, Fact, require_one_signature
from node_fixtures import CHANNEL, DOMAIN, PROVIDER
from reliability import record
from sdk_market import CHANNELS_DOMAIN, CLIENT, FakeMarket, FakeProvider, fake_market

from gpumarket.core.codec import voucher_proto
from gpumarket.core.errors import BadSignature, JournalError, StateLocked
from gpumarket.core.signing import LocalKey
from gpumarket.core.terms import Voucher, keccak256
from gpumarket.core.units import Hash, Money
from gpumarket.node.accounts import Accounts
from gpumarket.sdk import Client, ClientSettings
from gpumarket.settlement.vouchers import sign_voucher

TEXTS = ["w1 w2 w3", "w4 w5", "w6"]


@asynccontextmanager
async def client_of(market: FakeMarket) -> AsyncIterator[Client]:
    settings = ClientSettings(state=market.folder / "client", lock_file=market.folder / "models.lock", check_probability=0.0)
    async with Client(settings, key=CLIENT, chain=market.chain) as client:
        if not client.models():
            await client.add_model("mini", sdk_models.EMBED.digest)
        yield client


def back_up(market: FakeMarket) -> Path:
    return Path(shutil.copy2(market.folder / "client" / "journal.db", market.folder / "backup.db"))


def restore(market: FakeMarket, backup: Path) -> None:
    """As the refusal says: the old copy in place, the seal removed by hand."""
    for file in (market.folder / "client").glob("journal.db*"):
        file.unlink()
    shutil.copy2(backup, market.folder / "client" / "journal.db")


def vouchered(market: FakeMarket) -> tuple[Hash, int]:
    ((channel, cumulative),) = market.scheduler.vouchers.items()
    return Hash(channel), cumulative


async def bought_after_a_backup(market: FakeMarket, jobs_before: int) -> Path:
    """A backup after some jobs, and the voucher higher since then."""
    async with client_of(market) as client:
        for _ in range(jobs_before):
            await client.embed("mini", TEXTS)
        if not jobs_before:
            await client.desk.account.channel(client.desk.hub.address, 60)
    backup = back_up(market)
    async with client_of(market) as client:
        for _ in range(3):
            await client.embed("mini", TEXTS)
    return backup


@pytest.mark.parametrize("jobs_before", [0, 1])
async def test_restored_journal_takes_over_what_the_scheduler_proves(tmp_path: Path, jobs_before: int) -> None:
    """The scheduler asserts that no voucher comes below one that it holds."""
    async with fake_market(tmp_path, FakeProvider("a")) as market:
        backup = await bought_after_a_backup(market, jobs_before)
        channel, before = vouchered(market)
        restore(market, backup)
        async with client_of(market) as client:
            await client.embed("mini", TEXTS)
            state = client.desk.account.known(channel)
            assert state is not None
            assert state.voucher == vouchered(market)[1] >= before
        record("F11", 1, "client's journal restored from a backup: vouchers signed below an earlier one 0", "0 (I3)")


async def test_restored_journal_signs_nothing_on_a_bare_word(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market:
        backup = await bought_after_a_backup(market, 1)
        before, matched = vouchered(market), len(market.scheduler.matched)
        market.scheduler.newest.clear()
        restore(market, backup)
        async with client_of(market) as client:
            with pytest.raises(JournalError, match="older copy, or another process") as caught:
                await client.embed("mini", TEXTS)
            assert caught.value.hint
        assert vouchered(market) == before
        assert len(market.scheduler.matched) == matched, "no order left the client"


async def test_restored_journal_takes_over_what_the_chain_has_paid(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market:
        backup = await bought_after_a_backup(market, 1)
        channel, before = vouchered(market)
        market.scheduler.newest.clear()
        market.chain.channels[channel].claimed = before
        restore(market, backup)
        async with client_of(market) as client:
            await client.embed("mini", TEXTS)
        assert vouchered(market)[1] >= before


async def test_voucher_that_another_key_signed_is_refused_as_proof(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market:
        async with client_of(market) as client:
            await client.embed("mini", TEXTS)
        channel, before = vouchered(market)
        higher = Money(before * 2)
        forged = sign_voucher(LocalKey(keccak256(b"somebody")), CHANNELS_DOMAIN, channel, higher)
        market.scheduler.newest[channel] = voucher_proto(Voucher(channel, higher), forged)
        async with client_of(market) as client:
            with pytest.raises(BadSignature):
                await client.embed("mini", TEXTS)


async def test_second_client_on_one_state_folder_is_refused(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market, client_of(market):
        with pytest.raises(StateLocked):
            async with client_of(market):
                pass


async def test_restored_provider_learns_its_vouchers_again_and_signs_no_second_receipt(tmp_path: Path) -> None:
    """What it forgot it claims again, and gets the same answer; what it had signed is signed with the same content or not at all."""
    said: list[Fact] = []
    folder = tmp_path / "provider"
    folder.mkdir()
    await provider_life.work(folder, said.append)
    backup = shutil.copy2(folder / provider_life.FILE, tmp_path / "backup.db")
    journal, accounts = await provider_life.opened(folder)
    await provider_life.live(accounts, provider_life.World(said.append, list(said)), said.append, 1)
    known = accounts.vouchered(CHANNEL)
    await journal.close()
    for file in folder.iterdir():
        file.unlink()
    shutil.copy2(backup, folder / provider_life.FILE)
    journal, accounts = await provider_life.opened(folder)
    world = provider_life.World(said.append, list(said))
    assert accounts.vouchered(CHANNEL) < known
    newest: Any = world.newest()
    await provider_life.claims_of(accounts, world, "after").take_voucher(newest)
    assert accounts.vouchered(CHANNEL) == known, "the scheduler's heartbeat brings it"
    await provider_life.live(accounts, world, said.append, 2)
    # a panel's number that is forgotten with its salt is drawn anew; the contract takes one commitment of a member and no other
    require_one_signature([fact for fact in said if fact.get("what") != "commitment"])
    await journal.close()
    again = Accounts(journal)
    journal.open()
    await again.load(PROVIDER, DOMAIN, NOW)
    assert again.vouchered(CHANNEL) == world.vouchered
    await journal.close()

"""A payment key apart from its owner: it signs, and can neither open, top up nor close what holds the money."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sdk_models
from sdk_market import CLIENT, FakeMarket, FakeProvider, fake_market
from sqlalchemy import select

from gpumarket.core import keystore
from gpumarket.core.errors import ConfigError, OutOfFunds
from gpumarket.core.signing import LocalKey
from gpumarket.core.terms import keccak256
from gpumarket.sdk import Client, ClientSettings
from gpumarket.sdk.tables import INTENTS

OWNER = LocalKey(keccak256(b"a cold owner"))


def settings(folder: Path, **changes: Any) -> ClientSettings:
    cold = folder / "cold" / "key.json"
    if not cold.exists():
        keystore.create(cold, "a cold password", OWNER.secret)
    values: dict[str, Any] = {"state": folder / "client", "lock_file": folder / "models.lock", "owner_key_file": cold}
    values |= {"check_probability": 0.0}
    return ClientSettings(**(values | changes))


def client_of(market: FakeMarket, owner_key: LocalKey | None = None, key: LocalKey = CLIENT) -> Client:
    return Client(settings(market.folder), key=key, owner_key=owner_key, chain=market.chain)


async def test_payment_key_alone_buys_on_the_owners_channel_and_moves_nothing_else(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market:
        async with client_of(market) as client:
            await client.add_model("mini", sdk_models.EMBED.digest)
            with pytest.raises(OutOfFunds, match="only the owner") as caught:
                await client.embed("mini", ["w1"])
            assert caught.value.hint.startswith("gpumarket wallet deposit")
            assert market.chain.channels == {}
            assert client.desk.journal.read(lambda c: c.execute(select(INTENTS)).all()) == []
        async with client_of(market, OWNER) as client:
            account = await client.deposit("1")
            assert (account.address, account.owner) == (CLIENT.address, OWNER.address)
        async with client_of(market) as client:
            assert len(await client.embed("mini", ["w1"])) == 1
            for forbidden in (client.deposit("1"), client.close_channel()):
                with pytest.raises(OutOfFunds, match="only the owner"):
                    await forbidden
        assert len(market.chain.channels) == 1


async def test_owner_named_by_address_may_keep_its_file_elsewhere(tmp_path: Path) -> None:
    away = settings(tmp_path, owner="0x" + OWNER.address.hex(), owner_key_file=tmp_path / "unplugged" / "key.json")
    async with fake_market(tmp_path, FakeProvider("a")) as market:
        async with Client(away, key=CLIENT, owner_key=OWNER, chain=market.chain) as client:
            assert (await client.deposit("1")).owner == OWNER.address
        async with Client(away, key=CLIENT, chain=market.chain) as client:
            await client.add_model("mini", sdk_models.EMBED.digest)
            assert len(await client.embed("mini", ["w1"])) == 1
            with pytest.raises(OutOfFunds, match="only the owner"):
                await client.close_channel()


async def test_replaced_payment_key_does_not_use_the_old_ones_channel(tmp_path: Path) -> None:
    fresh = LocalKey(keccak256(b"a fresh payment key"))
    async with fake_market(tmp_path, FakeProvider("a")) as market:
        async with client_of(market, OWNER) as client:
            await client.deposit("1")
        async with client_of(market, key=fresh) as client:
            await client.add_model("mini", sdk_models.EMBED.digest)
            with pytest.raises(OutOfFunds, match="only the owner"):
                await client.embed("mini", ["w1"])


async def test_owner_key_that_the_settings_do_not_name_is_refused(tmp_path: Path) -> None:
    async with fake_market(tmp_path, FakeProvider("a")) as market:
        with pytest.raises(ConfigError, match="the settings name"):
            async with client_of(market, CLIENT):
                pass
        with pytest.raises(ConfigError, match="name no owner"):
            async with Client(settings(tmp_path, owner_key_file=None), key=CLIENT, owner_key=OWNER, chain=market.chain):
                pass

"""A daemon's key apart from the owner of its stake, on chain: the owner agrees and stakes, the daemon registers, thieves get none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reliability
from settlement_chain import LocalChain, account, chain_journal, local_chain, party

from gpumarket.cli.main import run
from gpumarket.core import keystore
from gpumarket.core.errors import ConfigError, OutOfFunds, TransactionFailed, WalletError
from gpumarket.core.signing import LocalKey
from gpumarket.core.units import Hash, Money, hex0x
from gpumarket.settlement.chain import Actions, ChainView, Follower, Sender
from gpumarket.settlement.chain.registration import Entry, ensure_registered

TOKEN = 10**18
OWNER, OPERATOR, STRANGER = account(5), account(6), account(7)
ENTRY = Entry(1, "12D3KooWowner", Hash(b"\7" * 32), "127.0.0.1:1", Money(10 * TOKEN), OWNER.address)


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalChain]:
    with local_chain(tmp_path) as running:
        yield running


class Cli:
    """`gpumarket stake` with the owner's keystore."""

    def __init__(self, local: LocalChain, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys, self.folder = capsys, folder
        self.secret = folder / "password"
        self.secret.touch(mode=0o600)
        self.secret.write_text("a cold password\n")
        for name, key in (("owner", OWNER), ("stranger", STRANGER)):
            keystore.create(folder / "keys" / f"{name}.json", "a cold password", key.secret)
        chain = f'[chain]\nrpc_url = "{local.anvil.url}"\naddress_book = "{local.book_file}"\nconfirmations = 0\n'
        (folder / "config.toml").write_text(f'[client]\nstate = "{folder / "client"}"\n{chain}')

    def __call__(self, *words: str, key: str = "owner", code: int = 0) -> Any:
        given = [] if words[0] == "show" else ["--key-file", str(self.folder / "keys" / f"{key}.json"), "--password-file", str(self.secret)]
        self.capsys.readouterr()
        found = run(["stake", *words, *given, "--config", str(self.folder / "config.toml"), "-o", "json"])
        out = self.capsys.readouterr().out
        assert found == code, out
        return json.loads(out)


def registered(local: LocalChain, folder: Path, entry: Entry = ENTRY, key: LocalKey = OPERATOR) -> None:
    """As a daemon's start does."""

    async def start() -> None:
        chain = await local.connect()
        journal = chain_journal(folder / "operator.db")
        view = ChainView()
        actions = Actions(chain, Sender(chain, key, journal))
        try:
            await ensure_registered(actions, Follower(chain, view), view, entry, faucet=True)
        finally:
            await actions.sender.close()
            await journal.close()
            await chain.close()

    asyncio.run(start())


def fund(local: LocalChain, folder: Path, key: LocalKey) -> None:
    async def take() -> None:
        chain = await local.connect()
        journal = chain_journal(folder / f"faucet-{key.address.hex()}.db")
        actions = await party(chain, key, journal)
        await actions.sender.close()
        await journal.close()
        await chain.close()

    asyncio.run(take())


def test_stake_of_a_cold_owner_from_agreement_to_withdrawal(local: LocalChain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli, operator = Cli(local, tmp_path, capsys), hex0x(OPERATOR.address)
    fund(local, tmp_path, OWNER)
    with pytest.raises(WalletError, match="has not agreed") as refused:
        registered(local, tmp_path)
    assert refused.value.hint.endswith(f"gpumarket stake approve {operator}")
    assert "start the daemon once" in cli("add", operator, "10", code=3)["error"]["hint"]
    cli("approve", operator)
    with pytest.raises(OutOfFunds, match="registered, and 10") as missing:
        registered(local, tmp_path)
    assert f"gpumarket stake add {operator} 10" in missing.value.hint
    assert cli("add", operator, "10")["stake"] == 10 * TOKEN
    registered(local, tmp_path)
    registered(local, tmp_path)
    shown = cli("show", operator)
    assert (shown["owner"], shown["stake"], shown["roles"]) == (hex0x(OWNER.address), 10 * TOKEN, 1)
    error = cli("unbond", operator, "10", key="stranger", code=3)["error"]
    assert "the owner of" in error["message"]
    assert cli("unbond", operator, "4")["unbonding"] == 4 * TOKEN
    assert cli("withdraw", operator, code=6)["error"]["code"] == "transaction_failed"
    local.anvil.rpc("evm_increaseTime", 10_000)
    local.mine()
    assert cli("withdraw", operator)["unbonding"] == 0


def test_registration_under_another_owner_than_the_registrys_is_refused(
    local: LocalChain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registered(local, tmp_path, Entry(1, "12D3KooWowner", Hash(b"\7" * 32), "127.0.0.1:1", Money(TOKEN)))
    with pytest.raises(ConfigError, match="for good"):
        registered(local, tmp_path)


def test_stolen_operator_key_takes_no_stake_out(local: LocalChain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything that a thief can send: each way that would move the stake is refused by the contract."""
    cli, operator = Cli(local, tmp_path, capsys), hex0x(OPERATOR.address)
    fund(local, tmp_path, OWNER)
    cli("approve", operator)
    with pytest.raises(OutOfFunds):
        registered(local, tmp_path)
    cli("add", operator, "10")

    async def steal() -> list[str]:
        chain = await local.connect()
        journal = chain_journal(tmp_path / "thief.db")
        thief, refused = Actions(chain, Sender(chain, OPERATOR, journal)), []
        attempts: list[Callable[[], Awaitable[object]]] = [
            lambda: thief.begin_unbond(OPERATOR.address, 1),
            lambda: thief.withdraw_stake(OPERATOR.address),
            lambda: thief.register(1, "12D3KooWowner", Hash(b"\7" * 32), "127.0.0.1:1", STRANGER.address),
            lambda: thief.register(1, "12D3KooWowner", Hash(b"\7" * 32), "127.0.0.1:1", OPERATOR.address),
        ]
        for attempt in attempts:
            try:
                await attempt()
            except TransactionFailed as error:
                refused.append(error.message)
        await thief.deregister()
        await thief.sender.close()
        await journal.close()
        await chain.close()
        return refused

    refused = asyncio.run(steal())
    assert len(refused) == 4, refused
    shown = cli("show", operator)
    assert (shown["owner"], shown["stake"], shown["unbonding"]) == (hex0x(OWNER.address), 10 * TOKEN, 0)
    reliability.record("stolen operator key", 5, "0 base units of stake moved", "0")

"""A client whose scheduler is gone gets its deposit back by its own command alone: on a chain, with time moved by hand."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from reliability import record
from settlement_chain import CLOSE_WINDOW_SECONDS, LocalChain, account, chain_journal, party

from gpumarket.cli.main import run
from gpumarket.core import keystore
from gpumarket.core.ports import SystemClock, SystemRandom
from gpumarket.core.signing import LocalKey
from gpumarket.core.units import Hash, Money, hex0x, parse_hash, parse_money
from gpumarket.sdk import funding
from gpumarket.sdk.account import Account
from gpumarket.sdk.offline import journal_of
from gpumarket.sdk.settings import ClientSettings
from gpumarket.settlement.vouchers import sign_voucher

SCHEDULER, STRANGER = account(7), account(8)
DEPOSIT, PROMISED = parse_money("5"), parse_money("1")


@dataclass
class Wallet:
    """A client's folder and its command line; `owner` is who pays, where that is not the payment key."""

    local: LocalChain
    folder: Path
    capsys: pytest.CaptureFixture[str]
    key: LocalKey
    owner: LocalKey | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        password = self.folder / "password"
        password.touch(mode=0o600)
        password.write_text("a password of a test\n")
        for name, key in (("key", self.key), ("owner", self.owner)):
            if key is not None:
                keystore.create(self.folder / name / "key.json", "a password of a test", key.secret)
        values: dict[str, Any] = {"state": self.folder / "state", "key_file": self.folder / "key" / "key.json", "password_file": password}
        if self.owner is not None:
            values |= {"owner_key_file": self.folder / "owner" / "key.json", "owner_password_file": password}
        self.settings = ClientSettings(**values, deposit="5", spend_limit="")
        lines = "\n".join(f'{name} = "{value}"' for name, value in values.items())
        chain = f'[chain]\nrpc_url = "{self.local.anvil.url}"\naddress_book = "{self.local.book_file}"\nconfirmations = 0\n'
        (self.folder / "config.toml").write_text(f"[client]\n{lines}\n{chain}")

    def __call__(self, *words: str, code: int = 0) -> Any:
        found = run([*words, "-o", "json", "--config", str(self.folder / "config.toml")])
        out = self.capsys.readouterr().out
        assert found == code, out
        return json.loads(out)

    @property
    def payer(self) -> LocalKey:
        return self.owner or self.key

    def balance(self) -> int:
        async def ask() -> int:
            chain = await self.local.connect()
            try:
                return int(await chain.token.functions.balanceOf(chain.w3.to_checksum_address(hex0x(self.payer.address))).call())
            finally:
                await chain.close()

        return asyncio.run(ask())

    def buy(self) -> Hash:
        """Open a channel and promise something on it, as a job would."""
        return asyncio.run(self._buy())

    async def _buy(self) -> Hash:
        async with journal_of(self.settings) as journal:
            paying = funding.owner_journal(self.settings.state, self.owner.address) if self.owner is not None else journal
            paid = funding.funding_of(self.settings, self.key, self.owner)
            chain = await funding.connect(self.local.settings(), self.key.address, paid, self.payer, paying)
            try:
                if not await chain.balance():
                    await chain.faucet()
                books = Account(journal, chain, self.key, self.settings, SystemClock(), SystemRandom(), funding=paid)
                channel = await books.channel(SCHEDULER.address, 60)
                assert await books.cover(channel, PROMISED, lambda _: None) is not None
                return channel.id
            finally:
                await chain.close()
                if paying is not journal:
                    await paying.close()


def redeem_by_the_scheduler(local: LocalChain, folder: Path, channel: Hash, signer: LocalKey, amount: int) -> None:
    async def redeem() -> None:
        chain, journal = await local.connect(), chain_journal(folder / "scheduler.db")
        try:
            actions = await party(chain, SCHEDULER, journal)
            await actions.redeem(channel, amount, sign_voucher(signer, chain.channels_domain, channel, Money(amount)))
            await actions.sender.close()
        finally:
            await journal.close()
            await chain.close()

    asyncio.run(redeem())


def pass_the_window(local: LocalChain) -> None:
    local.anvil.rpc("evm_setNextBlockTimestamp", local.now() + CLOSE_WINDOW_SECONDS + 1)
    local.mine()


@pytest.mark.parametrize("separate", [False, True], ids=["one-key", "owner-key"])
def test_client_whose_scheduler_is_gone_gets_its_deposit_back(
    local: LocalChain, tmp_path: Path, capsys: pytest.CaptureFixture[str], separate: bool
) -> None:
    """Nobody is registered, nobody answers. The voucher that is out is the scheduler's to redeem within the window, and nothing more."""
    payment, owner = account(1 if separate else 2), account(3) if separate else None
    wallet = Wallet(local, tmp_path / "client", capsys, payment, owner)
    channel, before = wallet.buy(), wallet.balance()
    (asked,) = wallet("wallet", "close-channel", "--alone")
    assert (parse_hash(asked["channel"]), asked["state"], asked["refunded"]) == (channel, "requested", 0)
    assert 0 < asked["closes_at"] - local.now() <= CLOSE_WINDOW_SECONDS
    (waits,) = wallet("wallet", "close-channel", "--alone")
    assert (waits["state"], waits["closes_at"]) == ("waiting", asked["closes_at"])
    redeem_by_the_scheduler(local, tmp_path, channel, payment, PROMISED)
    pass_the_window(local)
    (done,) = wallet("wallet", "close-channel", "--alone")
    assert (done["state"], done["refunded"]) == ("closed", DEPOSIT - PROMISED)
    assert wallet.balance() == before + DEPOSIT - PROMISED
    assert "no open channel" in wallet("wallet", "close-channel", "--alone", code=3)["error"]["message"]
    record("exit without the scheduler", 1, "all but the voucher that it holds is back after the close window", "exit never blocked")


def test_client_leaving_alone_without_its_payment_key_is_left_by_channel(
    local: LocalChain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The payment key's machine is lost, journal and all: the owner's key and the channel's id suffice."""
    lost = Wallet(local, tmp_path / "lost", capsys, account(1), account(4))
    channel = lost.buy()
    new = Wallet(local, tmp_path / "new", capsys, account(5), account(4))
    error = new("wallet", "close-channel", "--alone", code=3)["error"]
    assert hex0x(channel) in error["hint"]
    (asked,) = new("wallet", "close-channel", "--alone", "--channel", hex0x(channel))
    assert asked["state"] == "requested"
    pass_the_window(local)
    (done,) = new("wallet", "close-channel", "--alone", "--channel", hex0x(channel))
    assert done["refunded"] == DEPOSIT
    stranger = Wallet(local, tmp_path / "stranger", capsys, STRANGER)
    assert "not one that" in stranger("wallet", "close-channel", "--alone", "--channel", hex0x(channel), code=3)["error"]["message"]
    assert "--alone" in stranger("wallet", "close-channel", "--channel", hex0x(channel), code=3)["error"]["message"]

"""`gpumarket wallet` and `guard` offline: keys are never shown, never replaced, never used without their guard."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sdk_market import CLIENT
from sdk_terms import NOW, a_hash, address

from gpumarket.cli.main import run
from gpumarket.contracts.deploy import AddressBook
from gpumarket.core import keystore
from gpumarket.core.errors import JournalError
from gpumarket.core.ports import SystemClock
from gpumarket.core.signing import LocalKey
from gpumarket.core.terms import keccak256
from gpumarket.core.units import Address, Money, hex0x
from gpumarket.sdk import guarding, spending
from gpumarket.sdk.offline import journal_of
from gpumarket.sdk.settings import ClientSettings
from gpumarket.settlement import guard, guard_file
from gpumarket.settlement.guard_file import Guarded, GuardedChannel, Scope

CONTRACT = Address(b"\x22" * 20)
TOKEN = 10**18


@dataclass
class Desk:
    """A client's folder and its command line."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    def __post_init__(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.password = self.secret("password", "the first password")
        self.book(31_337)
        self.configure()

    def configure(self, **client: str) -> None:
        values = {"state": self.folder / "state", "key_file": self.key_file, "password_file": self.password, **client}
        lines = [f'{name} = "{value}"' for name, value in values.items()]
        chain = f'[chain]\naddress_book = "{self.folder / "contracts.json"}"\n'
        (self.folder / "config.toml").write_text("[client]\n" + "\n".join(lines) + "\n" + chain)

    def book(self, chain_id: int, channels: Address = CONTRACT) -> None:
        other = "0x" + "33" * 20
        hashes = {name: "0x" + "44" * 32 for name in ("token", "registry", "channels", "disputes")}
        AddressBook(chain_id, other, other, hex0x(channels), other, 0, hashes).save(self.folder / "contracts.json")

    def secret(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(text + "\n")
        return path

    @property
    def key_file(self) -> Path:
        return self.folder / "keys" / "key.json"

    @property
    def settings(self) -> ClientSettings:
        return ClientSettings(state=self.folder / "state", key_file=self.key_file, password_file=self.password)

    def __call__(self, *words: str, code: int = 0) -> Any:
        found = run([*words, "-o", "json", "--config", str(self.folder / "config.toml")])
        out = self.capsys.readouterr().out
        assert found == code, out
        return json.loads(out)


@pytest.fixture(autouse=True)
def cheap_derivation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The floor instead of 128 MiB: several keys are made here."""
    monkeypatch.setattr(keystore, "SCRYPT_N_CHOSEN", keystore.SCRYPT_N)


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path / "one", capsys)


def test_wallet_create_then_show_names_both_keys_and_opens_none(desk: Desk) -> None:
    made = desk("wallet", "create", "--password-file", str(desk.password))
    shown = desk("wallet", "show")
    assert shown["payment_key"] == shown["owner"] == made["address"]
    assert not shown["separate_keys"]
    assert desk.key_file.stat().st_mode & 0o777 == 0o600
    cold = desk("wallet", "create", "--key-file", str(desk.folder / "cold" / "key.json"), "--password-file", str(desk.password))
    desk.configure(owner_key_file=cold["key_file"], spend_limit="3")
    shown = desk("wallet", "show")
    assert (shown["payment_key"], shown["owner"], shown["separate_keys"]) == (made["address"], cold["address"], True)
    assert (shown["day_limit"], shown["day_left"]) == (3 * TOKEN, 3 * TOKEN)


def test_wallet_create_over_a_key_is_refused_before_a_password_is_asked(desk: Desk) -> None:
    desk("wallet", "create", "--password-file", str(desk.password))
    before = desk.key_file.read_bytes()
    error = desk("wallet", "create", code=4)["error"]
    assert "never overwritten" in error["message"]
    assert desk.key_file.read_bytes() == before


def test_wallet_export_and_import_carry_the_key_encrypted_only(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keystore.create(desk.key_file, "the first password", CLIENT.secret)
    other = desk.secret("new password", "another password")
    exported = desk("wallet", "export", str(desk.folder / "out.json"), "--new-password-file", str(other))
    raw = (desk.folder / "out.json").read_text().lower()
    assert CLIENT.secret.hex() not in raw
    assert (desk.folder / "out.json").stat().st_mode & 0o777 == 0o600
    there = Desk(tmp_path / "two", capsys)
    took = there(
        "wallet", "import", str(desk.folder / "out.json"), "--password-file", str(other), "--new-password-file", str(there.password)
    )
    assert took["address"] == exported["address"] == hex0x(CLIENT.address)
    assert keystore.load(there.key_file, "the first password").secret == CLIENT.secret
    again = there("wallet", "import", str(desk.folder / "out.json"), "--password-file", str(other), code=4)
    assert "never overwritten" in again["error"]["message"]
    assert desk("wallet", "export", str(desk.folder / "out.json"), code=4)["error"]["code"] == "key"


def test_wallet_import_of_a_weak_keystore_or_a_wrong_password_is_refused(desk: Desk) -> None:
    from eth_account import Account

    weak = desk.folder / "weak.json"
    weak.write_text(json.dumps(Account.encrypt(CLIENT.secret, "the first password", kdf="scrypt", iterations=1 << 12)))
    error = desk("wallet", "import", str(weak), "--password-file", str(desk.password), code=4)["error"]
    assert "weak" in error["message"]
    keystore.create(desk.folder / "other.json", "another password", CLIENT.secret)
    error = desk("wallet", "import", str(desk.folder / "other.json"), "--password-file", str(desk.password), code=4)["error"]
    assert error["code"] == "wrong_password"
    assert not desk.key_file.exists()


def test_wallet_password_file_that_others_read_is_refused(desk: Desk) -> None:
    desk.password.chmod(0o640)
    error = desk("wallet", "create", "--password-file", str(desk.password), code=4)["error"]
    assert error["code"] == "key_file_exposed"
    assert error["hint"] == f"chmod 600 {desk.password}"


def test_wallet_limit_is_kept_and_shown(desk: Desk) -> None:
    assert desk("wallet", "limit")["day_limit"] is None
    assert desk("wallet", "limit", "2.5")["day_limit"] == 5 * TOKEN // 2
    assert desk("wallet", "limit")["day_limit"] == 5 * TOKEN // 2
    desk.configure(spend_limit="1")
    assert desk("wallet", "limit")["day_limit"] == TOKEN
    assert desk("wallet", "limit", "--none")["day_limit"] == TOKEN
    for words in (("2", "--none"), ("cheap",)):
        assert desk("wallet", "limit", *words, code=3)["error"]["code"] == "config"
    assert desk("wallet", "limit", "-1", code=2)["error"]["code"] == "usage"


# --- guard ---------------------------------------------------------------------------------------------------------------------


def entry(name: str, cumulative: int, billed: int = 0) -> GuardedChannel:
    return GuardedChannel(a_hash(name), address("scheduler"), Money(cumulative), Money(billed))


async def put(desk: Desk, *entries: GuardedChannel) -> None:
    async with journal_of(desk.settings) as journal:
        await journal.transact(lambda c: guarding.take_in(c, list(entries), NOW))


async def guards(desk: Desk) -> dict[bytes, int]:
    async with journal_of(desk.settings) as journal:
        return {entry.channel: entry.cumulative for entry in journal.read(guarding.guarded_channels)}


@pytest.fixture
def keyed(desk: Desk) -> Desk:
    keystore.create(desk.key_file, "the first password", CLIENT.secret)
    return desk


def exported(desk: Desk, *entries: GuardedChannel) -> Path:
    """A guard export by the desk's own key."""
    file = desk.folder / "guard.json"
    file.write_text(guard_file.export(Scope(31_337, CONTRACT, CLIENT.address), Guarded(entries), NOW, CLIENT))
    return file


def test_guard_export_then_import_elsewhere_keeps_every_amount(keyed: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(put(keyed, entry("a", 5, 3), entry("b", 0)))
    file = keyed.folder / "guard.json"
    assert keyed("guard", "export", str(file))["channels"] == 2
    there = Desk(tmp_path / "two", capsys)
    keystore.create(there.key_file, "the first password", CLIENT.secret)
    assert there("guard", "import", str(file)) == {"key": hex0x(CLIENT.address), "added": 2, "raised": 0, "unchanged": 0}
    assert asyncio.run(guards(there)) == asyncio.run(guards(keyed)) == {a_hash("a"): 5, a_hash("b"): 0}
    assert there("guard", "import", str(file))["unchanged"] == 2


async def spent(desk: Desk, amount: int) -> None:
    async with journal_of(desk.settings) as journal:
        await journal.transact(lambda c: spending.spend(c, SystemClock().now(), Money(amount), None))


def test_guard_import_brings_the_days_spending_and_its_limit(keyed: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keyed("wallet", "limit", "3")
    asyncio.run(spent(keyed, 2 * TOKEN))
    file = keyed.folder / "guard.json"
    keyed("guard", "export", str(file))
    there = Desk(tmp_path / "two", capsys)
    keystore.create(there.key_file, "the first password", CLIENT.secret)
    for _ in range(2):  # a second time changes nothing
        there("guard", "import", str(file))
        told = there("wallet", "limit")
        assert (told["day_limit"], told["day_left"]) == (3 * TOKEN, TOKEN)
    there("wallet", "limit", "1")
    there("guard", "import", str(file))
    assert there("wallet", "limit")["day_limit"] == TOKEN, "nothing here becomes less strict"
    bend(file, spent=[])
    assert there("guard", "import", str(file), code=4)["error"]["code"] == "bad_signature"


def test_guard_import_raises_and_never_lowers(keyed: Desk) -> None:
    asyncio.run(put(keyed, entry("low", 5), entry("high", 9), entry("same", 7)))
    done = keyed("guard", "import", str(exported(keyed, entry("low", 8), entry("high", 2), entry("same", 7))))
    assert done["raised"] == 1
    assert asyncio.run(guards(keyed)) == {a_hash("low"): 8, a_hash("high"): 9, a_hash("same"): 7}


async def test_guard_imported_amounts_are_not_signed_a_second_time(desk: Desk) -> None:
    await put(desk, entry("a", 5))
    async with journal_of(desk.settings) as journal:
        for amount in (4, 5):
            with pytest.raises(JournalError, match="signed before"):
                await journal.transact(lambda c, amount=amount: guard.advance(c, a_hash("a"), amount))  # type: ignore[misc]
        with pytest.raises(JournalError, match="no guard"):
            await journal.transact(lambda c: guard.advance(c, a_hash("unknown"), 1))


def bend(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"chain_id": 1}, "key"),
        ({"contract": "0x" + "55" * 20}, "key"),
        ({"signer": hex0x(LocalKey(keccak256(b"another")).address)}, "key"),
        ({"exported_at": NOW + 1}, "bad_signature"),
        ({"channels": []}, "bad_signature"),
        ({"channels": [{"channel": "0x" + "66" * 32, "payee": "0x" + "55" * 20, "cumulative": 9, "billed": 0}]}, "bad_signature"),
        ({"channels": [{"channel": "0x" + "66" * 32, "payee": "0x" + "55" * 20, "cumulative": -1, "billed": 0}]}, "key"),
        ({"channels": [{"channel": "0x" + "66" * 32, "payee": "0x" + "55" * 20, "cumulative": True, "billed": 0}]}, "key"),
        ({"channels": "all"}, "key"),
        ({"role": "scheduler"}, "key"),
        ({"spent": [[NOW, -1]]}, "key"),
        ({"spent": [[NOW, 2**96]]}, "key"),
        ({"limit": 1}, "bad_signature"),
        ({"closes": [{}]}, "key"),
        ({"format": "eip-3076"}, "key"),
        ({"version": 2}, "key"),
        ({"signature": "0x00"}, "bad_signature"),
        ({"signature": 7}, "key"),
        ({"note": "more"}, "bad_signature"),
    ],
    ids=str,
)
def test_guard_import_of_another_or_changed_file_is_refused(keyed: Desk, changes: dict[str, Any], code: str) -> None:
    asyncio.run(put(keyed, entry("a", 5)))
    file = exported(keyed, entry("a", 8))
    bend(file, **changes)
    assert keyed("guard", "import", str(file), code=4)["error"]["code"] == code
    assert asyncio.run(guards(keyed)) == {a_hash("a"): 5}


def test_guard_import_on_another_chain_or_contract_is_refused(keyed: Desk) -> None:
    file = exported(keyed, entry("a", 8))
    keyed.book(1)
    assert "chain" in keyed("guard", "import", str(file), code=4)["error"]["message"]
    keyed.book(31_337, Address(b"\x23" * 20))
    assert "contract" in keyed("guard", "import", str(file), code=4)["error"]["message"]


def test_guard_import_for_a_channel_that_pays_somebody_else_is_refused(keyed: Desk) -> None:
    asyncio.run(put(keyed, entry("a", 5)))
    wrong = GuardedChannel(a_hash("a"), address("somebody else"), Money(8), Money(0))
    assert keyed("guard", "import", str(exported(keyed, entry("b", 3), wrong)), code=4)["error"]["code"] == "bad_signature"
    assert asyncio.run(guards(keyed)) == {a_hash("a"): 5}


@pytest.mark.parametrize("raw", ["", "[]", "{}", "[" * 10_000, '{"signature": "0x"}', "\0"])
def test_guard_import_of_what_is_no_export_is_refused(keyed: Desk, raw: str) -> None:
    file = keyed.folder / "guard.json"
    file.write_text(raw)
    assert keyed("guard", "import", str(file), code=4)["error"]["code"] == "key"

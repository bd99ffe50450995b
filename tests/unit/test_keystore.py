"""Wallet keys on disk."""

import json
import os
from pathlib import Path

import pytest

from gpumarket.core import keystore
from gpumarket.core.errors import ConfigError, KeyFileExposed, WalletError, WrongPassword
from gpumarket.core.units import parse_address


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys" / "wallet.json"
    keystore.create(path, "correct horse", bytes(31) + b"\7")
    return path


def test_keystore_round_trip_keeps_the_key_and_is_private(key_file: Path) -> None:
    key = keystore.load(key_file, "correct horse")
    assert key.secret == bytes(31) + b"\7"
    assert keystore.address_in(key_file) == key.address
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert key.secret.hex() not in repr(key)


def test_keystore_wrong_password_is_refused(key_file: Path) -> None:
    with pytest.raises(WrongPassword):
        keystore.load(key_file, "wrong")


def test_keystore_existing_file_is_never_overwritten(key_file: Path) -> None:
    before = key_file.read_bytes()
    with pytest.raises(WalletError, match="never overwritten"):
        keystore.create(key_file, "other")
    assert key_file.read_bytes() == before


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_keystore_readable_by_others_is_refused_with_the_cure(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    with pytest.raises(KeyFileExposed) as caught:
        keystore.load(key_file, "correct horse")
    assert f"chmod 600 {key_file}" in caught.value.hint


def test_keystore_symlink_is_refused(key_file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    os.symlink(key_file, link)
    with pytest.raises(KeyFileExposed):
        keystore.load(link, "correct horse")


def test_keystore_in_a_folder_that_others_write_is_refused(key_file: Path) -> None:
    key_file.parent.chmod(0o777)
    with pytest.raises(KeyFileExposed, match="folder"):
        keystore.load(key_file, "correct horse")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"crypto": {"kdf": "scrypt", "kdfparams": {}}}'])
def test_keystore_broken_file_is_refused(key_file: Path, text: str) -> None:
    key_file.write_text(text)
    with pytest.raises(WalletError):
        keystore.load(key_file, "correct horse")


def test_keystore_weak_derivation_is_refused(key_file: Path) -> None:
    document = json.loads(key_file.read_text())
    document["crypto"]["kdfparams"]["n"] = 1024
    key_file.write_text(json.dumps(document))
    with pytest.raises(WalletError, match="weak"):
        keystore.load(key_file, "correct horse")


def test_test_key_is_refused_on_a_real_chain() -> None:
    known = parse_address("0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266")
    keystore.refuse_test_key(known, 31_337)
    with pytest.raises(WalletError, match="everyone has"):
        keystore.refuse_test_key(known, 1)


def test_password_file_empty_or_exposed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("")
    path.chmod(0o600)
    with pytest.raises(ConfigError):
        keystore.read_password(path)
    path.write_text("s3cret\n")
    assert keystore.read_password(path) == "s3cret"
    path.chmod(0o644)
    with pytest.raises(KeyFileExposed):
        keystore.read_password(path)

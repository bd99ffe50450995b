"""Wallet keys on disk: who may read them, what opens them, and what is refused before a password is tried."""

import json
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reliability

from gpumarket.core import keystore
from gpumarket.core.errors import ConfigError, KeyFileExposed, WalletError, WrongPassword
from gpumarket.core.units import parse_address

OTHER_USER = 12_345


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


def exposures() -> dict[str, tuple[Callable[[Path], Path], str]]:
    """What exposes a key file: how it is made, and the cure that the error must print."""

    def mode(bits: int) -> Callable[[Path], Path]:
        def change(file: Path) -> Path:
            file.chmod(bits)
            return file

        return change

    def folder(bits: int) -> Callable[[Path], Path]:
        def change(file: Path) -> Path:
            file.parent.chmod(bits)
            return file

        return change

    def owner(file: Path) -> Path:
        os.chown(file, OTHER_USER, -1)
        return file

    def folder_owner(file: Path) -> Path:
        os.chown(file.parent, OTHER_USER, -1)
        return file

    def above(file: Path) -> Path:
        file.parent.parent.chmod(0o777)
        return file

    def link(file: Path) -> Path:
        other = file.with_name("link.json")
        other.symlink_to(file)
        return other

    def device(file: Path) -> Path:
        pipe = file.with_name("pipe")
        os.mkfifo(pipe, 0o600)
        return pipe

    found: dict[str, tuple[Callable[[Path], Path], str]] = {
        f"mode {bits:04o}": (mode(bits), "chmod 600 {file}") for bits in (0o644, 0o640, 0o604, 0o660, 0o606, 0o601, 0o610, 0o666, 0o777)
    }
    found |= {f"folder {bits:04o}": (folder(bits), "chmod go-w {folder}") for bits in (0o777, 0o770, 0o707, 0o722, 0o702)}
    found["folder above"] = (above, "chmod o-w {above}")
    found["symbolic link"] = (link, "name the file itself: {file}")
    found["pipe"] = (device, "plain files")
    if os.geteuid() == 0:
        found["owner"] = (owner, "chown 0 {file}")
        found["folder owner"] = (folder_owner, "chown 0 {folder}")
    return found


@pytest.mark.parametrize("kind", exposures())
def test_keystore_that_others_can_use_is_refused_with_the_exact_cure(key_file: Path, kind: str) -> None:
    make, cure = exposures()[kind]
    keystore.load(key_file, "correct horse")
    exposed = make(key_file)
    with pytest.raises(KeyFileExposed) as caught:
        keystore.load(exposed, "correct horse")
    wanted = cure.format(file=key_file, folder=key_file.parent, above=key_file.parent.parent)
    assert wanted in caught.value.hint
    if wanted.startswith("chmod"):
        subprocess.run(shlex.split(caught.value.hint), check=True)
        keystore.load(exposed, "correct horse")


def test_keystore_exposures_all_refused_is_recorded(tmp_path: Path) -> None:
    started = 0
    for number, (make, _) in enumerate(exposures().values()):
        file = tmp_path / f"{number}" / "keys" / "wallet.json"
        keystore.create(file, "correct horse")
        exposed = make(file)
        try:
            keystore.load(exposed, "correct horse")
            started += 1
        except KeyFileExposed:
            continue
    reliability.record("F54", len(exposures()), f"{started} keys opened", "0")
    assert started == 0


def test_keystore_in_a_sticky_folder_is_taken(key_file: Path) -> None:
    key_file.parent.chmod(0o1777)
    assert keystore.load(key_file, "correct horse")


def test_keystore_folders_are_made_private_all_the_way(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        keystore.create(tmp_path / "a" / "b" / "wallet.json", "correct horse")
    finally:
        os.umask(before)
    assert [oct((tmp_path / where).stat().st_mode & 0o777) for where in ("a", "a/b", "a/b/wallet.json")] == ["0o700", "0o700", "0o600"]


def test_keystore_that_cannot_be_written_whole_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpumarket.core.private_files.os.fsync", broken)
    with pytest.raises(OSError, match="No space"):
        keystore.create(tmp_path / "keys" / "wallet.json", "correct horse")
    assert list((tmp_path / "keys").iterdir()) == []


def test_keystore_link_to_nowhere_is_never_followed_nor_replaced(tmp_path: Path) -> None:
    link = tmp_path / "wallet.json"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WalletError, match="never overwritten"):
        keystore.create(link, "correct horse")
    assert not (tmp_path / "elsewhere").exists()


def test_keystore_short_password_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WalletError, match="8 characters"):
        keystore.create(tmp_path / "wallet.json", "1234567")
    assert not (tmp_path / "wallet.json").exists()


def test_keystore_wrong_password_waits_longer_each_time_and_says_the_same(key_file: Path) -> None:
    pauses: list[float] = []
    messages = set()
    for guess in ("a", "b", "", "correct horsf", "ä", "\0"):
        with pytest.raises(WrongPassword) as caught:
            keystore.load(key_file, guess, sleep=pauses.append)
        messages.add((caught.value.message, caught.value.hint))
        assert caught.value.__cause__ is None
    document = json.loads(key_file.read_text())
    document["crypto"]["mac"] = "00" * 32
    key_file.write_text(json.dumps(document))
    with pytest.raises(WrongPassword) as caught:
        keystore.load(key_file, "correct horse", sleep=pauses.append)
    messages.add((caught.value.message, caught.value.hint))
    assert len(messages) == 1
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]


def test_keystore_right_password_ends_the_waiting(key_file: Path) -> None:
    pauses: list[float] = []
    for guess in ("wrong", "wrong", "correct horse", "wrong"):
        try:
            keystore.load(key_file, guess, sleep=pauses.append)
        except WrongPassword:
            continue
    assert pauses == [0.25, 0.5, 0.25]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"crypto": {"kdf": "scrypt", "kdfparams": {}}}'])
def test_keystore_broken_file_is_refused(key_file: Path, text: str) -> None:
    key_file.write_text(text)
    with pytest.raises(WalletError):
        keystore.load(key_file, "correct horse")


def mutated(document: dict[str, Any], path: str, value: Any) -> str:
    *folders, last = path.split(".")
    place = document
    for name in folders:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(document)


BROKEN: list[tuple[str, Any]] = [
    ("version", 1),
    ("version", None),
    ("crypto", None),
    ("crypto", []),
    ("crypto.cipher", "aes-128-cbc"),
    ("crypto.cipherparams.iv", "00"),
    ("crypto.ciphertext", "00" * 31),
    ("crypto.ciphertext", 7),
    ("crypto.mac", ""),
    ("crypto.mac", None),
    ("crypto.kdf", "none"),
    ("crypto.kdf", None),
    ("crypto.kdfparams", {}),
    ("crypto.kdfparams.salt", "00" * 8),
    ("crypto.kdfparams.dklen", 16),
]
WEAK: list[tuple[str, Any]] = [
    ("crypto.kdfparams.n", 1024),
    ("crypto.kdfparams.n", 0),
    ("crypto.kdfparams.n", -16384),
    ("crypto.kdfparams.n", 16385),
    ("crypto.kdfparams.r", 1),
    ("crypto.kdfparams.p", 0),
    ("crypto.kdf", "pbkdf2"),
]
DEAR: list[tuple[str, Any]] = [("crypto.kdfparams.n", 1 << 24), ("crypto.kdfparams.r", 1 << 20), ("crypto.kdfparams.p", 1 << 20)]


@pytest.mark.parametrize(("path", "value"), BROKEN + WEAK + DEAR, ids=str)
def test_keystore_mutated_is_refused_before_its_password_is_tried(
    key_file: Path, path: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eth_account import Account

    monkeypatch.setattr(Account, "decrypt", lambda *_: pytest.fail("the password was tried"))
    key_file.write_text(mutated(json.loads(key_file.read_text()), path, value))
    with pytest.raises(WalletError) as caught:
        keystore.load(key_file, "correct horse")
    assert caught.value.hint


@pytest.mark.parametrize(("count", "taken"), [(599_999, False), (600_000, True)])
def test_keystore_pbkdf2_is_taken_from_its_floor_on(tmp_path: Path, count: int, taken: bool) -> None:
    from eth_account import Account

    path = tmp_path / "wallet.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(Account.encrypt(bytes(31) + b"\7", "correct horse", kdf="pbkdf2", iterations=count)))
    if taken:
        assert keystore.load(path, "correct horse").secret == bytes(31) + b"\7"
    else:
        with pytest.raises(WalletError, match="weak"):
            keystore.load(path, "correct horse")


def test_keystore_truncated_at_every_byte_never_opens(key_file: Path) -> None:
    whole = key_file.read_bytes()
    opened = 0
    for length in range(len(whole)):
        key_file.write_bytes(whole[:length])
        try:
            keystore.load(key_file, "correct horse")
            opened += 1
        except WalletError:
            continue
    reliability.record("F55", len(whole) + len(BROKEN) + len(WEAK) + len(DEAR), f"{opened} keystores opened", "0")
    assert opened == 0


def test_keystore_that_names_another_address_is_refused(key_file: Path) -> None:
    key_file.write_text(mutated(json.loads(key_file.read_text()), "address", "0x" + "11" * 20))
    with pytest.raises(WalletError, match="another address"):
        keystore.load(key_file, "correct horse")


def test_process_with_a_key_is_neither_dumpable_nor_leaves_a_core(key_file: Path) -> None:
    code = """if True:
        import resource, sys
        from pathlib import Path
        from gpumarket.core import concealment, keystore
        before = concealment.is_concealed()
        keystore.load(Path(sys.argv[1]), "correct horse")
        print(before, concealment.is_concealed(), resource.getrlimit(resource.RLIMIT_CORE)[0])"""
    done = subprocess.run([sys.executable, "-c", code, str(key_file)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "True", "0"]


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


def test_password_comes_from_the_systemd_credential_first(tmp_path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs a password"):
        keystore.unlock(key_file, None)
    folder = tmp_path / "credentials"
    folder.mkdir(mode=0o700)
    (folder / keystore.CREDENTIAL).write_text("correct horse\n")
    (folder / keystore.CREDENTIAL).chmod(0o440)  # what an ACL for the service's user looks like
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    assert keystore.unlock(key_file, tmp_path / "no such file").secret == bytes(31) + b"\7"
    (folder / keystore.CREDENTIAL).chmod(0o444)
    with pytest.raises(KeyFileExposed, match="credential"):
        keystore.unlock(key_file, None)


def test_password_file_through_a_link_is_refused(tmp_path: Path) -> None:
    real = tmp_path / "password"
    real.touch(mode=0o600)
    real.write_text("s3cret\n")
    link = tmp_path / "link"
    link.symlink_to(real)
    assert stat.S_ISLNK(link.lstat().st_mode)
    with pytest.raises(KeyFileExposed, match="symbolic link"):
        keystore.read_password(link)

"""Wallet keys on disk: Web3 keystore v3, mode 0600 in a folder that only its owner writes (`private_files`).

Passwords come from a prompt, a file, or a systemd credential; never from argv or a variable's value. A keystore whose key derivation is
weaker than the floor, or dear enough to be an attack on us, is refused before its password is tried. Every wrong guess waits longer than
the one before. While a key is loaded the process is concealed. The public test keys of local chains open on a local chain only
(`refuse_test_key`).
"""

from __future__ import annotations

import json
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpumarket.core import hostile_json, private_files
from gpumarket.core.concealment import conceal
from gpumarket.core.errors import ConfigError, KeyFileExposed, WalletError, WrongPassword
from gpumarket.core.signing import LocalKey
from gpumarket.core.units import Address, parse_address

LOCAL_CHAIN_ID = 31_337
SCRYPT_N = 1 << 14
"""Work factor of keystores whose password is random, and the floor that is accepted: 16 MiB, about 50 ms (RFC 7914, interactive use)."""
SCRYPT_N_CHOSEN = 1 << 17
"""Work factor where a person chose the password: 128 MiB (OWASP, password storage)."""
SCRYPT_BYTES_MAX = 1 << 30
"""A keystore that wants more memory than this (128 * n * r) is no keystore but an attack; geth's own take 256 MiB."""
SCRYPT_P_MAX = 16
PBKDF2_MIN, PBKDF2_MAX = 600_000, 20_000_000
"""Iterations of PBKDF2-HMAC-SHA256 that are accepted: OWASP's floor, and about ten seconds."""
PASSWORD_LENGTH_MIN = 8
"""Shortest password of a new keystore (NIST SP 800-63B)."""
CREDENTIAL = "gpumarket-password"
"""Name of the systemd credential (LoadCredential=) that holds the password, below $CREDENTIALS_DIRECTORY."""
WRONG_PAUSE_SECONDS, WRONG_PAUSE_SECONDS_MAX = 0.25, 30.0

_TEST_ADDRESSES = frozenset(
    parse_address(a)
    for a in (
        "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266",
        "0x70997970C51812dc3A010C7d01b50e0d17dc79C8",
        "0x3C44CdDdB6a900fa2b585dd299e03d12FA4293BC",
        "0x90F79bf6EB2c4f870365E785982E1f101E93b906",
        "0x15d34AAf54267DB7D7c367839AAf71A00a2C6A65",
        "0x9965507D1a55bcC2695C58ba16FB37d819B0A4dc",
        "0x976EA74026E726554dB657fA54763abd0C3a0aa9",
        "0x14dC79964da2C08b23698B3D3cc7Ca32193d9955",
        "0x23618e81E3f5cdF7f54C3d65f7FBc0aBf5B21E8f",
        "0xa0Ee7A142d267C1f36714E4a8F75612F20a79720",
    )
)
"""The ten development accounts that anvil and hardhat print at start: everyone has their keys."""
_failures: dict[Path, int] = {}
_failures_lock = threading.Lock()


def create(path: Path, password: str, secret: bytes | None = None, *, n: int = SCRYPT_N) -> LocalKey:
    """Write a new keystore. Raises WalletError when the file exists (a key is never overwritten) or the password is too short."""
    from eth_account import Account

    private_files.refuse_existing(path)
    if len(password) < PASSWORD_LENGTH_MIN:
        raise WalletError(f"a password has at least {PASSWORD_LENGTH_MIN} characters", hint="take a few words that nobody would guess")
    key = LocalKey(secret or os.urandom(32))
    conceal()
    document = Account.encrypt(key.secret, password, kdf="scrypt", iterations=n)
    private_files.create(path, json.dumps(document).encode())
    return key


def load(path: Path, password: str, *, sleep: Callable[[float], None] = time.sleep) -> LocalKey:
    """Open a keystore. Raises WalletError (missing, broken, weak), KeyFileExposed or, after a pause that doubles, WrongPassword."""
    return open_document(
        path, _document(path, private_files.read(path, missing_hint="make a key: gpumarket wallet create")), password, sleep
    )


def open_document(path: Path, document: Mapping[str, Any], password: str, sleep: Callable[[float], None] = time.sleep) -> LocalKey:
    """The key in a keystore that was read already; `path` names it in errors. Raises as `load`."""
    from eth_account import Account

    conceal()
    try:
        key = LocalKey(bytes(Account.decrypt(dict(document), password)))
    except ValueError:
        _pause(path, sleep)
        raise WrongPassword(f"the password does not open {path}", hint="check the password, or the password file") from None
    with _failures_lock:
        _failures.pop(path, None)
    if document.get("address") and parse_address(str(document["address"])) != key.address:
        raise WalletError(f"{path} names another address than that of its key", hint="restore it from its backup")
    return key


def read_document(path: Path) -> dict[str, Any]:
    """A keystore from elsewhere (an import), checked but not opened; its mode is its owner's affair. Raises WalletError."""
    try:
        with path.open("rb") as file:
            raw = file.read(private_files.SIZE_MAX + 1)
    except OSError as error:
        raise WalletError(f"cannot read {path}: {error.strerror}") from error
    return _document(path, raw)


def address_in(path: Path) -> Address:
    """The address that a keystore says it holds, without opening it. Raises WalletError."""
    try:
        return parse_address(json.loads(path.read_text())["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WalletError(f"{path} is not a keystore with an address", hint="make one: gpumarket wallet create") from error


def unlock(key_file: Path, password_file: Path | None, password: str | None = None) -> LocalKey:
    """Open a keystore with the password given, else the systemd credential, else the password file. Raises as `load`, and ConfigError."""
    return load(key_file, password if password is not None else find_password(key_file, password_file))


def find_password(key_file: Path, password_file: Path | None) -> str:
    """The password from the systemd credential, else from the file. Raises ConfigError where there is neither."""
    found = credential()
    if found is not None:
        return found
    if password_file is None:
        raise ConfigError(
            f"the key {key_file} needs a password",
            hint=f"name a file with --password-file, give the systemd credential {CREDENTIAL}, or answer the prompt on a terminal",
        )
    return read_password(password_file)


def read_password(path: Path) -> str:
    """The first line of a password file that only its owner may read."""
    return _first_line(path, private_files.read(path, missing_hint="write the password into it, then chmod 600"))


def credential() -> str | None:
    """The password that systemd handed over (systemd.exec(5), LoadCredential=), or None where it gave none.

    systemd keeps such files in memory, owned by root or the service's user and opened to it by an ACL, so only other users' bits count.
    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    path = Path(folder) / CREDENTIAL if folder else None
    if path is None or not path.exists():
        return None
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode) or info.st_mode & 0o007 or info.st_uid not in (0, os.geteuid()):
        raise KeyFileExposed(
            f"the credential {path} can be used by others (mode {stat.S_IMODE(info.st_mode):04o})", hint=f"chmod 400 {path}"
        )
    return _first_line(path, path.read_bytes())


def refuse_test_key(address: Address, chain_id: int) -> None:
    """Raises WalletError for a publicly known key on a chain where money is real."""
    if chain_id != LOCAL_CHAIN_ID and address in _TEST_ADDRESSES:
        raise WalletError(
            f"0x{address.hex()} is a development account whose key everyone has; it is refused on chain {chain_id}",
            hint="make a key of your own: gpumarket wallet create",
        )


# --- the document --------------------------------------------------------------------------------------------------------------


def _document(path: Path, raw: bytes) -> dict[str, Any]:
    """A version 3 keystore with a derivation between floor and ceiling. Raises WalletError."""
    try:
        document = hostile_json.loads(raw)
        crypto = document["crypto"]
        well_formed = document["version"] == 3 and crypto["cipher"] == "aes-128-ctr"
        for text, size in ((crypto["cipherparams"]["iv"], 16), (crypto["ciphertext"], 32), (crypto["mac"], 32)):
            well_formed = well_formed and re.fullmatch(rf"(0x)?[0-9a-fA-F]{{{2 * size}}}", text) is not None
        weakness = _weakness(str(crypto["kdf"]), crypto["kdfparams"]) if well_formed else ""
    except (ValueError, KeyError, TypeError) as error:
        raise WalletError(f"{path} is not a version 3 keystore", hint="restore it from its backup") from error
    if not well_formed:
        raise WalletError(f"{path} is not a version 3 keystore", hint="restore it from its backup")
    if weakness:
        raise WalletError(
            f"{path} has a key derivation that is refused: {weakness}",
            hint="encrypt the key anew with the wallet that made it, then: gpumarket wallet import FILE",
        )
    return dict(document)


def _weakness(kdf: str, parameters: Mapping[str, Any]) -> str:
    """What is wrong with a key derivation, empty when nothing is. Raises KeyError, TypeError or ValueError for one that is none."""
    if re.fullmatch(r"(0x)?([0-9a-fA-F]{2}){16,64}", parameters["salt"]) is None:
        return "its salt has fewer than 16 bytes"
    if int(parameters["dklen"]) != 32:
        return "it derives another number of bytes than 32"
    if kdf == "scrypt":
        n, r, p = (int(parameters[name]) for name in ("n", "r", "p"))
        if n & (n - 1) or n < SCRYPT_N or r < 8 or p < 1:
            return f"scrypt is weak below n {SCRYPT_N}, r 8, p 1; it has n {n}, r {r}, p {p}"
        if p > SCRYPT_P_MAX or 128 * n * r > SCRYPT_BYTES_MAX:
            return f"scrypt with n {n}, r {r}, p {p} takes too much"
        return ""
    if kdf == "pbkdf2" and parameters["prf"] == "hmac-sha256":
        count = int(parameters["c"])
        if count < PBKDF2_MIN:
            return f"PBKDF2 is weak below {PBKDF2_MIN} iterations; it has {count}"
        return f"PBKDF2 with {count} iterations takes too long" if count > PBKDF2_MAX else ""
    return f"{kdf!r} is weak or not known here"


def _first_line(path: Path, raw: bytes) -> str:
    try:
        lines = raw.decode().splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"the password file {path} is not text") from None
    if not lines or not lines[0]:
        raise ConfigError(f"the password file {path} is empty")
    return lines[0]


def _pause(path: Path, sleep: Callable[[float], None]) -> None:
    with _failures_lock:
        count = _failures[path] = _failures.get(path, 0) + 1
    sleep(min(WRONG_PAUSE_SECONDS_MAX, WRONG_PAUSE_SECONDS * 2 ** min(count - 1, 16)))

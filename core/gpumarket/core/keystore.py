"""Wallet keys on disk: Web3 keystore v3 (scrypt), mode 0600 in a folder that only its owner writes. Passwords come from files or a prompt,
never from argv or a variable. The public test keys of local chains open on a local chain only (`refuse_test_key`).
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from gpumarket.core.errors import ConfigError, KeyFileExposed, WalletError, WrongPassword
from gpumarket.core.signing import LocalKey
from gpumarket.core.units import Address, parse_address

LOCAL_CHAIN_ID = 31_337
SCRYPT_N = 1 << 14
"""Work factor of new keystores: 16 MiB and about 50 ms, the floor that is accepted on load too (OWASP's is 2^17 for a web login; a
keystore's password is the second factor to the file)."""

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


def create(path: Path, password: str, secret: bytes | None = None) -> LocalKey:
    """Write a new keystore. Raises WalletError when the file exists: a key is never overwritten."""
    from eth_account import Account

    key = LocalKey(secret or os.urandom(32))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    document = json.dumps(Account.encrypt(key.secret, password, kdf="scrypt", iterations=SCRYPT_N))
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise WalletError(f"{path} exists; a key is never overwritten", hint="give another --key file, or move this one away") from None
    with os.fdopen(handle, "w") as file:
        file.write(document)
        file.flush()
        os.fsync(file.fileno())
    return key


def load(path: Path, password: str) -> LocalKey:
    """Open a keystore. Raises WalletError (missing, broken, weak), KeyFileExposed or WrongPassword."""
    from eth_account import Account

    _check_private(path)
    try:
        document = json.loads(path.read_text())
        kdf = document["crypto"]["kdf"]
        weak = kdf == "scrypt" and int(document["crypto"]["kdfparams"]["n"]) < SCRYPT_N
    except (ValueError, KeyError, TypeError) as error:
        raise WalletError(f"{path} is not a version 3 keystore", hint="restore it from its backup") from error
    if kdf != "scrypt" or weak:
        raise WalletError(
            f"{path} is protected by a weak key derivation ({kdf})", hint="import the key into a new keystore: gpumarket wallet create"
        )
    try:
        return LocalKey(bytes(Account.decrypt(document, password)))
    except ValueError as error:
        raise WrongPassword(f"the password does not open {path}", hint="check the password file") from error


def address_in(path: Path) -> Address:
    """The address that a keystore says it holds, without opening it. Raises WalletError."""
    try:
        return parse_address(json.loads(path.read_text())["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WalletError(f"{path} is not a keystore with an address", hint="make one: gpumarket wallet create") from error


def read_password(path: Path) -> str:
    """The first line of a password file that only its owner may read."""
    _check_private(path)
    lines = path.read_text().splitlines()
    if not lines or not lines[0]:
        raise ConfigError(f"the password file {path} is empty")
    return lines[0]


def refuse_test_key(address: Address, chain_id: int) -> None:
    """Raises WalletError for a publicly known key on a chain where money is real."""
    if chain_id != LOCAL_CHAIN_ID and address in _TEST_ADDRESSES:
        raise WalletError(
            f"0x{address.hex()} is a development account whose key everyone has; it is refused on chain {chain_id}",
            hint="make a key of your own: gpumarket wallet create",
        )


def _check_private(path: Path) -> None:
    try:
        info = path.lstat()
    except FileNotFoundError:
        raise WalletError(f"{path} does not exist", hint="make a key: gpumarket wallet create") from None
    if not stat.S_ISREG(info.st_mode):
        raise KeyFileExposed(f"{path} is not a regular file")
    if info.st_mode & 0o077:
        raise KeyFileExposed(f"{path} can be used by others (mode {stat.S_IMODE(info.st_mode):04o})", hint=f"chmod 600 {path}")
    if info.st_uid != os.geteuid():
        raise KeyFileExposed(f"{path} belongs to another user", hint=f"chown {os.geteuid()} {path}")
    folder = path.parent.stat()
    if folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX:
        raise KeyFileExposed(f"others can write to the folder {path.parent}", hint=f"chmod 700 {path.parent}")

"""Keys of a testnet: a fresh wallet per role with a password file, and the p2p identity of the node that the others join through.

Invariant: keys are made once per folder and never leave it; the only well-known key used is the first development account of anvil, which
deploys and hands out test money on chain 31337 and nowhere else.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gpumarket.core import keystore
from gpumarket.core.signing import LocalKey
from gpumarket.p2p.identity import load_or_create_seed

DEPLOYER_SECRET = bytes.fromhex("ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80")
"""Anvil's development account 0: public knowledge."""

P2P_IDENTITY = "p2p.key"
"""Name of the p2p identity file in a daemon's state folder."""

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_ED25519_PEER_PREFIX = bytes.fromhex("002408011220")
"""Identity multihash (0x00, 36 bytes) of the protobuf PublicKey {type: Ed25519, data: 32 bytes} (libp2p peer id specification)."""


def wallet(folder: Path, name: str) -> tuple[LocalKey, Path, Path]:
    """The wallet of a role, made on first use: (key, keystore file, password file)."""
    key_file, password_file = folder / f"{name}.json", folder / f"{name}.password"
    if key_file.exists():
        return keystore.load(key_file, keystore.read_password(password_file)), key_file, password_file
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    password = secrets.token_urlsafe(24)
    handle = os.open(password_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(password + "\n")
    return keystore.create(key_file, password), key_file, password_file


def peer_id(identity_file: Path) -> str:
    """The libp2p peer id of the identity in a file, made on first use: known before the daemon starts, so all can start side by side."""
    seed = load_or_create_seed(identity_file, secrets.token_bytes(32))
    public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    return base58(_ED25519_PEER_PREFIX + public)


def base58(data: bytes) -> str:
    """Bitcoin's base58 (no checksum)."""
    number, digits = int.from_bytes(data, "big"), ""
    while number:
        number, rest = divmod(number, 58)
        digits = _BASE58[rest] + digits
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + digits

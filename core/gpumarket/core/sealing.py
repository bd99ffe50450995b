"""Bytes that one party alone can open: HPKE (RFC 9180), base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305.

The construction is `cryptography`'s own; nothing of it is assembled here. A sealing key is made for one purpose and forgotten after it:
what is sealed may lie on a public chain for ever, and a wallet key that leaks years later must not open it (the wallet key is not used).
`context` is authenticated but not sent: a sealed text that was made for another purpose, or another receiver, does not open.
Never: a secret key or an opened text in an error.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from gpumarket.core.errors import ProtocolError

KEY_BYTES = 32
"""A public and a secret key alike (RFC 7748)."""
OVERHEAD_BYTES = 48
"""Encapsulated key and authentication tag: how much longer a sealed text is."""
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


def public_key(secret: bytes) -> bytes:
    """The public half of a secret key: 32 bytes from a source of randomness."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def seal(plain: bytes, receiver: bytes, context: bytes) -> bytes:
    """`plain` for the holder of `receiver` (a public key) alone. Raises ProtocolError for a key that is none."""
    try:
        return bytes(_SUITE.encrypt(plain, X25519PublicKey.from_public_bytes(receiver), info=context))
    except ValueError as error:  # another length, or a point of small order
        raise ProtocolError("a sealing key that is no X25519 public key") from error


def unseal(sealed: bytes, secret: bytes, context: bytes) -> bytes:
    """What `seal` was given. Raises ProtocolError for anything that was not sealed to this key in this context, or was changed since."""
    try:
        return bytes(_SUITE.decrypt(sealed, X25519PrivateKey.from_private_bytes(secret), info=context))
    except (InvalidTag, ValueError) as error:
        raise ProtocolError("a sealed text that does not open: it is for another key or purpose, or was changed") from error

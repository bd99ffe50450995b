"""Sealed texts open for their receiver and purpose only."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumarket.core.errors import ProtocolError
from gpumarket.core.sealing import KEY_BYTES, OVERHEAD_BYTES, public_key, seal, unseal

SECRET = hashlib.sha256(b"member").digest()
OTHER = hashlib.sha256(b"another member").digest()
CONTEXT = b"dispute 7, member 0xaa"


@given(st.binary(max_size=2_000))
def test_seal_any_text_opens_to_what_it_was(plain: bytes) -> None:
    sealed = seal(plain, public_key(SECRET), CONTEXT)
    assert len(sealed) == len(plain) + OVERHEAD_BYTES
    assert unseal(sealed, SECRET, CONTEXT) == plain


def test_seal_same_text_twice_gives_different_bytes() -> None:
    assert seal(b"prompt", public_key(SECRET), CONTEXT) != seal(b"prompt", public_key(SECRET), CONTEXT)


@pytest.mark.parametrize(("secret", "context"), [(OTHER, CONTEXT), (SECRET, b"dispute 8, member 0xaa")])
def test_unseal_other_key_or_context_refused(secret: bytes, context: bytes) -> None:
    sealed = seal(b"prompt", public_key(SECRET), CONTEXT)
    with pytest.raises(ProtocolError, match="does not open"):
        unseal(sealed, secret, context)


def test_unseal_any_changed_byte_refused() -> None:
    sealed = seal(b"prompt", public_key(SECRET), CONTEXT)
    for index in range(len(sealed)):
        changed = bytearray(sealed)
        changed[index] ^= 1
        with pytest.raises(ProtocolError):
            unseal(bytes(changed), SECRET, CONTEXT)


@pytest.mark.parametrize("sealed", [b"", b"\0" * 31, b"\0" * (OVERHEAD_BYTES - 1), b"\0" * OVERHEAD_BYTES])
def test_unseal_text_too_short_or_null_refused(sealed: bytes) -> None:
    with pytest.raises(ProtocolError):
        unseal(sealed, SECRET, CONTEXT)


@pytest.mark.parametrize("key", [b"", b"\1" * (KEY_BYTES - 1), b"\0" * KEY_BYTES])
def test_seal_key_of_wrong_length_or_small_order_refused(key: bytes) -> None:
    with pytest.raises(ProtocolError, match="X25519"):
        seal(b"prompt", key, CONTEXT)

"""Evidence on chain: one member reads it, whatever else is posted, and nobody else does."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumarket.core.errors import ProtocolError
from gpumarket.core.sealing import public_key
from gpumarket.core.terms import keccak256
from gpumarket.core.units import Address, Hash
from gpumarket.settlement.sealed_evidence import PART_BYTES, PARTS_MAX, open_posted, posted_to, sealed_parts
from gpumarket.v1 import provider_pb2 as pb

ME, OTHER = Address(b"\x01" * 20), Address(b"\x02" * 20)
ID = Hash(keccak256(b"lease"))
SECRET, OLD = hashlib.sha256(b"new").digest(), hashlib.sha256(b"old").digest()
KEY = public_key(SECRET)


@pytest.mark.parametrize("size", [0, 1, PART_BYTES - 48, PART_BYTES, 3 * PART_BYTES + 7])
def test_posted_evidence_of_any_length_opens_for_its_member_alone(size: int) -> None:
    evidence = hashlib.shake_128(b"evidence").digest(size)
    parts = sealed_parts(evidence, ID, ME, KEY)
    assert all(len(part) <= PART_BYTES + 64 for part in parts)
    assert open_posted(parts, ID, ME, [OLD, SECRET]) == evidence
    assert open_posted(reversed(parts), ID, ME, [SECRET]) == evidence
    assert open_posted(parts, ID, ME, [OLD]) is None
    assert open_posted(parts, ID, OTHER, [SECRET]) is None
    assert open_posted(parts, Hash(keccak256(b"another")), ME, [SECRET]) is None
    assert posted_to(parts) == {ME}


def test_posted_evidence_with_a_part_missing_is_none_until_it_comes() -> None:
    parts = sealed_parts(b"x" * (2 * PART_BYTES), ID, ME, KEY)
    assert open_posted(parts[1:], ID, ME, [SECRET]) is None
    assert posted_to(parts[1:]) == frozenset()
    assert open_posted([*parts[1:], parts[0]], ID, ME, [SECRET]) == b"x" * (2 * PART_BYTES)


def test_posted_evidence_posted_again_replaces_what_was_wrong() -> None:
    wrong = pb.SealedEvidence(member=ME, part=0, parts=1, sealed=b"nonsense").SerializeToString()
    assert open_posted([wrong], ID, ME, [SECRET]) is None
    assert open_posted([wrong, *sealed_parts(b"evidence", ID, ME, KEY)], ID, ME, [SECRET]) == b"evidence"


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_posted_bytes_of_strangers_are_nothing_and_break_nothing(posted: list[bytes]) -> None:
    assert open_posted(posted, ID, ME, [SECRET]) is None
    sealed = sealed_parts(b"evidence", ID, ME, KEY)
    assert open_posted([*posted, *sealed], ID, ME, [SECRET]) == b"evidence"


@pytest.mark.parametrize(("part", "parts"), [(1, 1), (0, 0), (0, PARTS_MAX + 1), (2**32 - 1, 2**32 - 1)])
def test_posted_part_numbers_that_make_no_sense_are_ignored(part: int, parts: int) -> None:
    raw = pb.SealedEvidence(member=ME, part=part, parts=parts, sealed=b"x").SerializeToString()
    assert open_posted([raw], ID, ME, [SECRET]) is None
    assert posted_to([raw]) == frozenset()


def test_sealed_evidence_too_long_for_the_chain_or_for_no_key_refused() -> None:
    with pytest.raises(ProtocolError, match="cannot be posted"):
        sealed_parts(b"\0" * (PART_BYTES * PARTS_MAX), ID, ME, KEY)
    with pytest.raises(ProtocolError, match="X25519"):
        sealed_parts(b"evidence", ID, ME, bytes(32))

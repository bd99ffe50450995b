"""Evidence on a public chain that one panel member can read: sealed (core.sealing), cut into parts that fit a transaction, joined again.

What is posted is written by a challenger who may be hostile: `open_posted` takes whatever is there and gives evidence or nothing.
Never: evidence, or a part of it, in an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gpumarket.core.codec import parse
from gpumarket.core.errors import ProtocolError
from gpumarket.core.sealing import seal, unseal
from gpumarket.core.units import Address, Hash
from gpumarket.v1 import provider_pb2 as pb

PART_BYTES = 96 * 1024
"""Nodes drop transactions of more than 128 KiB (go-ethereum's txMaxSize)."""
PARTS_MAX = 64


def sealed_parts(evidence: bytes, dispute: Hash, member: Address, key: bytes) -> list[bytes]:
    """What to post for one member, a transaction each. Raises ProtocolError for a key that is none, or evidence too long for the chain."""
    sealed = seal(evidence, key, _context(dispute, member))
    pieces = [sealed[start : start + PART_BYTES] for start in range(0, len(sealed), PART_BYTES)]
    if len(pieces) > PARTS_MAX:
        raise ProtocolError(f"evidence of {len(evidence)} bytes cannot be posted; the limit is {PART_BYTES * PARTS_MAX}")
    return [
        pb.SealedEvidence(member=member, part=part, parts=len(pieces), sealed=piece).SerializeToString()
        for part, piece in enumerate(pieces)
    ]


def open_posted(posted: Iterable[bytes], dispute: Hash, member: Address, secrets: Sequence[bytes]) -> bytes | None:
    """The evidence in what was posted (oldest first) that opens for this member with one of its secrets; None when there is none."""
    parts: dict[tuple[int, int], bytes] = {}
    for raw in posted:
        piece = _piece(raw, member)
        if piece is not None:
            parts[piece.parts, piece.part] = piece.sealed
    for count in {parts_ for parts_, _ in parts}:
        pieces = [parts.get((count, part)) for part in range(count)]
        whole = b"".join(piece for piece in pieces if piece is not None)
        if None not in pieces:
            for secret in secrets:
                try:
                    return unseal(whole, secret, _context(dispute, member))
                except ProtocolError:  # sealed to another of our keys, or nothing at all
                    continue
    return None


def posted_to(posted: Iterable[bytes]) -> frozenset[Address]:
    """Members for whom every part was posted."""
    parts: dict[tuple[bytes, int], set[int]] = {}
    for raw in posted:
        piece = _piece(raw, None)
        if piece is not None:
            parts.setdefault((piece.member, piece.parts), set()).add(piece.part)
    return frozenset(Address(member) for (member, count), found in parts.items() if len(found) == count)


def _piece(raw: bytes, member: Address | None) -> pb.SealedEvidence | None:
    try:
        piece = parse(pb.SealedEvidence, raw)
    except ProtocolError:  # a stranger's bytes
        return None
    ours = member is None or piece.member == member
    return piece if ours and len(piece.member) == 20 and piece.part < piece.parts <= PARTS_MAX else None


def _context(dispute: Hash, member: Address) -> bytes:
    return b"gpumarket evidence" + dispute + member

"""Framing between the daemon and its p2p process."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumarket.core.errors import ProtocolError
from gpumarket.p2p.wire import FRAME_BYTES_MAX, FrameDecoder, encode_frame
from gpumarket.v1 import p2p_pb2 as pb


def offers(*payloads: bytes) -> pb.OfferPage:
    return pb.OfferPage(signed_offers=payloads)


@given(st.lists(st.binary(max_size=300), max_size=5), st.lists(st.integers(1, 50), min_size=1))
def test_frames_cut_anywhere_come_out_whole(payloads: list[bytes], cuts: list[int]) -> None:
    messages = [offers(payload) for payload in payloads]
    stream, decoder, found, at = b"".join(map(encode_frame, messages)), FrameDecoder(), [], 0
    while at < len(stream):
        step = cuts[at % len(cuts)]
        found += [pb.OfferPage.FromString(frame) for frame in decoder.feed(stream[at : at + step])]
        at += step
    assert found == messages


def test_frame_above_the_limit_is_not_encoded() -> None:
    with pytest.raises(ProtocolError, match="above the limit"):
        encode_frame(offers(b"x" * FRAME_BYTES_MAX))


def test_frame_length_above_the_limit_is_refused_before_its_bytes_come() -> None:
    with pytest.raises(ProtocolError, match="limit"):
        list(FrameDecoder().feed(b"\x81\x80\x80\x01"))


def test_frame_length_that_never_ends_is_refused() -> None:
    with pytest.raises(ProtocolError, match="uvarint"):
        list(FrameDecoder().feed(b"\xff" * 5))


def test_empty_message_is_a_frame_of_its_own() -> None:
    assert list(FrameDecoder().feed(encode_frame(pb.HostDone()))) == [b""]

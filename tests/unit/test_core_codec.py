"""Terms on the wire: what goes in comes out, and what does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpumarket.core import codec, terms
from gpumarket.core.errors import BadSignature, Busy, ProtocolError
from gpumarket.core.signing import LocalKey, market_domain
from gpumarket.core.terms import Ack, JobSpec, Lease, ManifestFile, ModelManifest, Outcome, Receipt, Task, Voucher, keccak256
from gpumarket.core.units import Address, Hash, Money, parse_hash
from gpumarket.settlement.verification import EMBED_FP32, TEXT_BF16
from gpumarket.v1 import market_pb2 as mpb
from gpumarket.v1 import terms_pb2 as pb

DOMAIN = market_domain(31337, Address(b"\x11" * 20))
ALICE, BOB = LocalKey(b"\1" * 32), LocalKey(b"\2" * 32)
VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "typed_data.json").read_text())["vectors"]
ON_WIRE = ("JobSpec", "Lease", "Ack", "Receipt", "Voucher")
NOW = 1_800_000_000


def h(text: str) -> Hash:
    return keccak256(text.encode())


class FakeClock:
    def __init__(self) -> None:
        self.seconds = NOW

    def now(self) -> int:
        return self.seconds

    def monotonic(self) -> float:
        return float(self.seconds)


def sample(name: str) -> terms.Term:
    vector = next(v for v in VECTORS if v["term"] == name and v["case"] == "plain")
    cls: Any = getattr(terms, name)
    enums = dict(cls.ENUMS)
    values: list[Any] = []
    for (field, word), text in zip(cls.WORDS, vector["message"].values(), strict=True):
        if word.solidity in ("bytes32", "address"):
            values.append(bytes.fromhex(text[2:]))
        elif word.solidity == "bool":
            values.append(text)
        else:
            values.append(enums.get(field, int)(int(text)))
    made: terms.Term = cls(*values)
    return made


def spec_of(signer: LocalKey, constraints: bytes = b"") -> JobSpec:
    return JobSpec(
        signer.address, BOB.address, h("id"), Task.EMBED, h("m"), h("r"), 5, 5, Money(7), keccak256(constraints), EMBED_FP32.digest, NOW
    )


@pytest.mark.parametrize("name", ON_WIRE)
def test_codec_term_round_trip_is_equal(name: str) -> None:
    term = sample(name)
    message = codec.to_proto(term, getattr(pb, name)())
    back = codec.from_proto(type(term), codec.parse(getattr(pb, name), message.SerializeToString()))
    assert back == term
    assert back.struct_hash == term.struct_hash


@pytest.mark.parametrize("name", ON_WIRE)
def test_codec_every_missing_bytes_field_is_refused_by_name(name: str) -> None:
    term = sample(name)
    for field, word in term.WORDS:
        if word.solidity in ("bytes32", "address"):
            message = codec.to_proto(term, getattr(pb, name)())
            message.ClearField(field)
            with pytest.raises(ProtocolError, match=field):
                codec.from_proto(type(term), message)


def test_codec_unknown_task_and_outcome_are_refused() -> None:
    lease = codec.to_proto(sample("Lease"), pb.Lease())
    lease.task = 0  # type: ignore[assignment]
    with pytest.raises(ProtocolError, match="Lease"):
        codec.from_proto(Lease, lease)
    receipt = codec.to_proto(sample("Receipt"), pb.Receipt())
    receipt.outcome = 99  # type: ignore[assignment]
    with pytest.raises(ProtocolError, match="Receipt"):
        codec.from_proto(Receipt, receipt)


@pytest.mark.parametrize("raw", [b"\0", b"\0\1", b"\1" * 13])
def test_codec_money_not_canonical_is_refused(raw: bytes) -> None:
    message = codec.to_proto(Voucher(h("c"), Money(5)), pb.Voucher())
    message.cumulative = raw
    with pytest.raises(ProtocolError, match="Voucher"):
        codec.from_proto(Voucher, message)


def test_codec_bytes_that_are_no_message_are_refused() -> None:
    with pytest.raises(ProtocolError, match="Lease"):
        codec.parse(pb.Lease, b"\xff\xff\xff")


def test_codec_order_opens_for_its_client_only() -> None:
    constraints = pb.Constraints(region="DE").SerializeToString()
    spec = spec_of(ALICE, constraints)
    order = codec.signed_order(ALICE, DOMAIN, spec, constraints)
    assert codec.open_order(DOMAIN, order) == (spec, pb.Constraints(region="DE"))
    with pytest.raises(BadSignature, match="order"):
        codec.open_order(DOMAIN, codec.signed_order(BOB, DOMAIN, spec, constraints))


def test_codec_order_with_other_constraints_is_refused() -> None:
    order = codec.signed_order(ALICE, DOMAIN, spec_of(ALICE, b""), b"")
    order.constraints = pb.Constraints(region="FR").SerializeToString()
    with pytest.raises(ProtocolError, match="constraints"):
        codec.open_order(DOMAIN, order)


def test_codec_lease_receipt_and_ack_open_for_their_signer_only() -> None:
    ack, receipt = Ack(h("l"), 3, h("o"), True, False), sample("Receipt")
    assert isinstance(receipt, Receipt) and receipt.outcome in Outcome
    assert codec.open_ack(DOMAIN, codec.signed_ack(ALICE, DOMAIN, ack), ALICE.address) == ack
    assert codec.open_receipt(DOMAIN, codec.signed_receipt(BOB, DOMAIN, receipt), BOB.address) == receipt
    with pytest.raises(BadSignature, match="the ack"):
        codec.open_ack(DOMAIN, codec.signed_ack(ALICE, DOMAIN, ack), BOB.address)
    with pytest.raises(BadSignature, match="the receipt"):
        codec.open_receipt(DOMAIN, codec.signed_receipt(BOB, DOMAIN, receipt), ALICE.address)
    lease = sample("Lease")
    assert isinstance(lease, Lease)
    with pytest.raises(BadSignature, match="the lease"):  # signed by somebody, not by its scheduler
        codec.open_lease(DOMAIN, codec.signed_lease(ALICE, DOMAIN, lease))


# --- offers --------------------------------------------------------------------------------------------------------------------


def body(**changes: Any) -> pb.OfferBody:
    values: dict[str, Any] = {"provider": ALICE.address, "tls_key_hash": h("tls"), "sequence": 4, "expires_at": NOW}
    return pb.OfferBody(**(values | changes))


def test_offer_opens_as_it_was_signed() -> None:
    assert codec.open_offer(DOMAIN, codec.signed_offer(ALICE, DOMAIN, body())) == body()


def test_offer_of_another_provider_is_refused() -> None:
    with pytest.raises(BadSignature, match="offer"):
        codec.open_offer(DOMAIN, codec.signed_offer(BOB, DOMAIN, body()))


def test_offer_with_a_changed_byte_is_refused() -> None:
    signed = codec.signed_offer(ALICE, DOMAIN, body())
    signed.body = body(sequence=5).SerializeToString(deterministic=True)
    with pytest.raises(BadSignature):
        codec.open_offer(DOMAIN, signed)


@pytest.mark.parametrize("changes", [{"provider": b""}, {"tls_key_hash": b"\1" * 31}])
def test_offer_without_identity_is_refused(changes: dict[str, bytes]) -> None:
    with pytest.raises(ProtocolError, match="address or TLS"):
        codec.open_offer(DOMAIN, codec.signed_offer(ALICE, DOMAIN, body(**changes)))


def test_offer_above_the_size_limit_is_refused_before_anything_is_parsed() -> None:
    with pytest.raises(ProtocolError, match="limit"):
        codec.open_offer(DOMAIN, pb.SignedOffer(body=b"\xff" * (codec.OFFER_BYTES_MAX + 1)))


# --- calls ---------------------------------------------------------------------------------------------------------------------


def call(nonce: str = "n", method: str = "Market/GetJob", issued_at: int = NOW, audience: Address = BOB.address) -> pb.SignedCall:
    return codec.signed_call(ALICE, DOMAIN, method, mpb.JobRequest(job=h("j")), audience, issued_at, h(nonce))


def test_call_guard_opens_a_fresh_call_once() -> None:
    guard = codec.CallGuard(DOMAIN, BOB.address, FakeClock())
    assert guard.open("Market/GetJob", call(), mpb.JobRequest) == (ALICE.address, mpb.JobRequest(job=h("j")))
    with pytest.raises(BadSignature, match="made before"):
        guard.open("Market/GetJob", call(), mpb.JobRequest)
    guard.open("Market/GetJob", call("other"), mpb.JobRequest)


@pytest.mark.parametrize("shift", [-61, 61])
def test_call_guard_refuses_a_call_off_the_clock(shift: int) -> None:
    guard = codec.CallGuard(DOMAIN, BOB.address, FakeClock())
    with pytest.raises(BadSignature, match="issued"):
        guard.open("Market/GetJob", call(issued_at=NOW + shift), mpb.JobRequest)


@pytest.mark.parametrize("made", [call(method="Market/Claim"), call(audience=ALICE.address)])
def test_call_guard_refuses_another_method_or_audience(made: pb.SignedCall) -> None:
    with pytest.raises(BadSignature, match="not signed"):
        codec.CallGuard(DOMAIN, BOB.address, FakeClock()).open("Market/GetJob", made, mpb.JobRequest)


def test_call_guard_refuses_a_changed_body_or_caller() -> None:
    guard = codec.CallGuard(DOMAIN, BOB.address, FakeClock())
    forged = call()
    forged.body = mpb.JobRequest(job=h("other")).SerializeToString()
    with pytest.raises(BadSignature):
        guard.open("Market/GetJob", forged, mpb.JobRequest)
    forged = call()
    forged.caller = BOB.address
    with pytest.raises(BadSignature):
        guard.open("Market/GetJob", forged, mpb.JobRequest)


def test_call_guard_forged_call_does_not_burn_the_nonce() -> None:
    guard = codec.CallGuard(DOMAIN, BOB.address, FakeClock())
    forged = call()
    forged.signature = b"\1" * 65
    with pytest.raises(BadSignature):
        guard.open("Market/GetJob", forged, mpb.JobRequest)
    guard.open("Market/GetJob", call(), mpb.JobRequest)


def test_call_guard_remembers_a_nonce_as_long_as_it_could_be_replayed() -> None:
    clock = FakeClock()
    guard = codec.CallGuard(DOMAIN, BOB.address, clock, limit=2)
    early = call(issued_at=NOW + 60)  # good until NOW + 120
    guard.open("Market/GetJob", early, mpb.JobRequest)
    clock.seconds = NOW + 119
    guard.open("Market/GetJob", call("b", issued_at=NOW + 119), mpb.JobRequest)
    with pytest.raises(Busy):  # the memory is full and nothing in it is old enough: refused, not forgotten
        guard.open("Market/GetJob", call("c", issued_at=NOW + 119), mpb.JobRequest)
    with pytest.raises(BadSignature):
        guard.open("Market/GetJob", early, mpb.JobRequest)
    clock.seconds = NOW + 121
    guard.open("Market/GetJob", call("c", issued_at=NOW + 121), mpb.JobRequest)


def test_call_guard_filled_by_strangers_still_opens_calls_of_known_callers() -> None:
    guard = codec.CallGuard(DOMAIN, BOB.address, FakeClock(), limit=3, known=lambda caller: caller == ALICE.address)

    def strange(number: int) -> pb.SignedCall:
        return codec.signed_call(LocalKey(bytes([number]) * 32), DOMAIN, "Market/GetJob", mpb.JobRequest(), BOB.address, NOW, h("n"))

    for number in range(50, 53):
        guard.open("Market/GetJob", strange(number), mpb.JobRequest)
    with pytest.raises(Busy):
        guard.open("Market/GetJob", strange(53), mpb.JobRequest)
    guard.open("Market/GetJob", call(), mpb.JobRequest)
    with pytest.raises(BadSignature, match="made before"):
        guard.open("Market/GetJob", call(), mpb.JobRequest)


def test_call_guard_refuses_a_replay_in_the_last_second_of_its_call() -> None:
    clock = FakeClock()
    guard = codec.CallGuard(DOMAIN, BOB.address, clock, limit=1)
    ahead = call(issued_at=NOW + 60)
    guard.open("Market/GetJob", ahead, mpb.JobRequest)
    clock.seconds = NOW + 120
    with pytest.raises(BadSignature, match="made before"):
        guard.open("Market/GetJob", ahead, mpb.JobRequest)


def test_call_of_wrong_shape_is_refused() -> None:
    broken = call()
    broken.nonce = b"\1"
    with pytest.raises(ProtocolError, match="nonce"):
        codec.CallGuard(DOMAIN, BOB.address, FakeClock()).open("Market/GetJob", broken, mpb.JobRequest)


# --- manifests and profiles ----------------------------------------------------------------------------------------------------

MANIFEST = ModelManifest(
    "m", Task.EMBED, "float32", "none", "MIT", 256, (ManifestFile("a.json", h("a"), 3), ManifestFile("b/c", h("b"), 4))
)


def test_manifest_round_trip_keeps_its_digest() -> None:
    back = codec.manifest_from_proto(codec.manifest_to_proto(MANIFEST))
    assert back == MANIFEST
    assert back.digest == MANIFEST.digest


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", ""])
def test_manifest_with_a_bad_path_is_refused(path: str) -> None:
    message = codec.manifest_to_proto(MANIFEST)
    message.files[0].path = path
    with pytest.raises(ProtocolError, match="manifest"):
        codec.manifest_from_proto(message)


def test_manifest_digest_ignores_the_name_and_nothing_else() -> None:
    message = codec.manifest_to_proto(MANIFEST)
    message.name = "other"
    assert codec.manifest_from_proto(message).digest == MANIFEST.digest
    message.licence = "GPL-3.0"
    assert codec.manifest_from_proto(message).digest != MANIFEST.digest


def test_profile_goes_on_the_wire_with_every_field() -> None:
    message = codec.profile_to_proto(TEXT_BF16)
    assert {f: getattr(message, f) for f in ("dtype", "min_units", "gross_share_ppm")} == {
        "dtype": "bfloat16",
        "min_units": TEXT_BF16.min_units,
        "gross_share_ppm": TEXT_BF16.gross_share_ppm,
    }
    assert len(parse_hash("0x" + TEXT_BF16.digest.hex())) == 32

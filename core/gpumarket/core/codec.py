"""Terms to protobuf and back. Field names are equal on both sides; anything that does not fit its type raises ProtocolError."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from gpumarket.core.errors import BadSignature, Busy, ProtocolError
from gpumarket.core.ports import Clock
from gpumarket.core.signing import Domain, Signer, recover, sign, sign_call, verify
from gpumarket.core.terms import (
    Ack,
    Call,
    JobSpec,
    Lease,
    ManifestFile,
    ModelManifest,
    Offer,
    Receipt,
    Task,
    Term,
    VerificationProfile,
    Voucher,
    keccak256,
)
from gpumarket.core.units import Address, Hash, money_bytes, money_from_bytes
from gpumarket.v1 import terms_pb2 as pb

T = TypeVar("T", bound=Term)
M = TypeVar("M", bound=Message)
OFFER_BYTES_MAX = 64 * 1024
CALL_SKEW_SECONDS = 60


def to_proto(term: Term, message: M) -> M:
    """Fill `message` (of the term's name) from the term, and return it."""
    values = list(term.VALUES(term))
    for at in term.MONEY:
        values[at] = money_bytes(values[at])
    for (name, _), value in zip(term.WORDS, values, strict=True):
        setattr(message, name, value)
    return message


def from_proto(cls: type[T], message: Message) -> T:
    """The term that `message` holds. Raises ProtocolError naming the field that does not fit."""
    values = list(cls.VALUES(message))
    try:
        for at in cls.MONEY:
            values[at] = money_from_bytes(values[at])
        for at, kind in cls.ENUMS_AT:
            values[at] = kind(values[at])
        return cls(*values)
    except ValueError as error:
        raise ProtocolError(f"a {cls.__name__} came that is none: {error}") from error


def parse(cls: type[M], raw: bytes) -> M:
    """A message from bytes. Raises ProtocolError."""
    message = cls()
    try:
        message.ParseFromString(raw)
    except DecodeError as error:
        raise ProtocolError(f"bytes that are no {cls.__name__}") from error
    return message


# --- signed statements ---------------------------------------------------------------------------------------------------------


def signed_offer(signer: Signer, domain: Domain, body: pb.OfferBody) -> pb.SignedOffer:
    """Serialize and sign an advert. Its provider must be the signer."""
    raw = body.SerializeToString(deterministic=True)
    term = Offer(signer.address, keccak256(raw), body.sequence, body.expires_at)
    return pb.SignedOffer(body=raw, signature=sign(signer, domain, term))


def open_offer(domain: Domain, signed: pb.SignedOffer) -> pb.OfferBody:
    """The advert inside, after its size and signature. Raises ProtocolError or BadSignature. Expiry is the caller's to judge."""
    if len(signed.body) > OFFER_BYTES_MAX:
        raise ProtocolError(f"an offer of {len(signed.body)} bytes; the limit is {OFFER_BYTES_MAX}")
    body = parse(pb.OfferBody, signed.body)
    if len(body.provider) != 20 or len(body.tls_key_hash) != 32:
        raise ProtocolError("an offer without a provider address or TLS key hash")
    term = Offer(Address(body.provider), keccak256(signed.body), body.sequence, body.expires_at)
    verify(domain, term, signed.signature, Address(body.provider), "the offer")
    return body


def signed_order(signer: Signer, domain: Domain, spec: JobSpec, constraints: bytes) -> pb.JobOrder:
    """An order signed by its client."""
    return pb.JobOrder(spec=to_proto(spec, pb.JobSpec()), constraints=constraints, signature=sign(signer, domain, spec))


def open_order(domain: Domain, order: pb.JobOrder, *, check_signature: bool = True) -> tuple[JobSpec, pb.Constraints]:
    """The order's spec and constraints, after their hash and the client's signature."""
    spec = from_proto(JobSpec, order.spec)
    if keccak256(order.constraints) != spec.constraints_hash:
        raise ProtocolError("the order's constraints are not those that its spec names")
    if check_signature:
        verify(domain, spec, order.signature, spec.client, "the order")
    return spec, parse(pb.Constraints, order.constraints)


def signed_lease(signer: Signer, domain: Domain, lease: Lease) -> pb.SignedLease:
    return pb.SignedLease(lease=to_proto(lease, pb.Lease()), signature=sign(signer, domain, lease))


def open_lease(domain: Domain, signed: pb.SignedLease) -> Lease:
    """The lease, after its scheduler's signature."""
    lease = from_proto(Lease, signed.lease)
    verify(domain, lease, signed.signature, lease.scheduler, "the lease")
    return lease


def signed_ack(signer: Signer, domain: Domain, ack: Ack) -> pb.SignedAck:
    return pb.SignedAck(ack=to_proto(ack, pb.Ack()), signature=sign(signer, domain, ack))


def open_ack(domain: Domain, signed: pb.SignedAck, client: Address) -> Ack:
    """The ack, after the client's signature."""
    ack = from_proto(Ack, signed.ack)
    verify(domain, ack, signed.signature, client, "the ack")
    return ack


def signed_receipt(signer: Signer, domain: Domain, receipt: Receipt) -> pb.SignedReceipt:
    return pb.SignedReceipt(receipt=to_proto(receipt, pb.Receipt()), signature=sign(signer, domain, receipt))


def open_receipt(domain: Domain, signed: pb.SignedReceipt, provider: Address) -> Receipt:
    """The receipt, after the provider's signature."""
    receipt = from_proto(Receipt, signed.receipt)
    verify(domain, receipt, signed.signature, provider, "the receipt")
    return receipt


def open_voucher(domain: Domain, signed: pb.SignedVoucher) -> tuple[Voucher, Address]:
    """The voucher and who signed it, in the channels' domain."""
    voucher = from_proto(Voucher, signed.voucher)
    return voucher, recover(domain.digest(voucher.struct_hash), signed.signature)


def voucher_proto(voucher: Voucher, signature: bytes) -> pb.SignedVoucher:
    return pb.SignedVoucher(voucher=to_proto(voucher, pb.Voucher()), signature=signature)


def signed_call(signer: Signer, domain: Domain, method: str, body: Message, audience: Address, now: int, nonce: Hash) -> pb.SignedCall:
    """Wrap a request body. `method` is the full rpc name, e.g. "Market/Claim"."""
    raw = body.SerializeToString(deterministic=True)
    _, signature = sign_call(signer, domain, method, raw, audience, now, nonce)
    return pb.SignedCall(body=raw, caller=signer.address, issued_at=now, nonce=nonce, signature=signature)


class CallGuard:
    """Opens signed calls: the right method and audience, fresh, never seen. Remembers nonces only as long as they could be replayed.

    Keys cost nothing, so strangers share one memory of `limit` nonces, and whoever fills it shuts out strangers alone: a caller that
    `known` vouches for (it has stake, or a channel) has a memory of its own.
    """

    def __init__(
        self,
        domain: Domain,
        audience: Address,
        clock: Clock,
        *,
        limit: int = 100_000,
        known: Callable[[Address], bool] = lambda caller: False,
    ) -> None:
        self._domain, self._audience, self._clock, self._limit, self._known = domain, audience, clock, limit, known
        self._strangers = _Nonces(limit)
        self._own: dict[Address, _Nonces] = {}

    def open(self, method: str, call: pb.SignedCall, body: type[M]) -> tuple[Address, M]:
        """(caller, body). Raises BadSignature for a wrong, old or repeated call, ProtocolError for a body that is none."""
        now = self._clock.now()
        if abs(now - call.issued_at) > CALL_SKEW_SECONDS:
            raise BadSignature(
                f"a call issued {now - call.issued_at} s ago; at most {CALL_SKEW_SECONDS} s are taken",
                hint="set the clock (NTP)",
            )
        try:
            term = Call(
                keccak256(method.encode()),
                Address(call.caller),
                self._audience,
                keccak256(call.body),
                call.issued_at,
                Hash(call.nonce),
            )
        except ValueError as error:
            raise ProtocolError(f"a call that is none: {error}") from error
        if recover(self._domain.digest(term.struct_hash), call.signature) != call.caller:
            raise BadSignature(f"the call {method} is not signed by its caller for this receiver")
        caller = Address(call.caller)
        for memory in (self._strangers, self._own.get(caller, self._strangers)):  # it may have become known since, or unknown
            memory.refuse(call.caller + call.nonce)
        self._memory(caller, now).remember(call.caller + call.nonce, now)
        return caller, parse(body, call.body)

    def _memory(self, caller: Address, now: int) -> _Nonces:
        if not self._known(caller):
            return self._strangers
        memory = self._own.get(caller)
        if memory is None:
            self._own = {who: nonces for who, nonces in self._own.items() if nonces.alive(now)}
            memory = self._own[caller] = _Nonces(self._limit)
        return memory


class _Nonces:
    """Nonces in the order in which they came, each for as long as its call could be made again."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._until: dict[bytes, int] = {}

    def alive(self, now: int) -> bool:
        """Forget what can be replayed no more; whether anything is left."""
        while self._until and next(iter(self._until.values())) < now:
            del self._until[next(iter(self._until))]
        return bool(self._until)

    def refuse(self, nonce: bytes) -> None:
        """Raises BadSignature for one that is remembered."""
        if nonce in self._until:
            raise BadSignature("this call was made before; sign a new one")

    def remember(self, nonce: bytes, now: int) -> None:
        """Raises BadSignature for one that is remembered, Busy when there is no room for another."""
        self.alive(now)
        self.refuse(nonce)
        if len(self._until) >= self._limit:
            raise Busy("too many calls at once to tell new from repeated", retry_after_seconds=CALL_SKEW_SECONDS)
        self._until[nonce] = now + 2 * CALL_SKEW_SECONDS


# --- unsigned values -----------------------------------------------------------------------------------------------------------


def manifest_to_proto(manifest: ModelManifest) -> pb.ModelManifest:
    files = [pb.ManifestFile(path=f.path, sha256=f.sha256, size=f.size) for f in manifest.files]
    return pb.ModelManifest(
        name=manifest.name,
        task=pb.Task.ValueType(int(manifest.task)),
        dtype=manifest.dtype,
        quantization=manifest.quantization,
        licence=manifest.licence,
        max_input_tokens=manifest.max_input_tokens,
        files=files,
    )


def manifest_from_proto(message: pb.ModelManifest) -> ModelManifest:
    """Raises ProtocolError for a manifest that breaks its rules (paths, order, task)."""
    try:
        return ModelManifest(
            message.name,
            Task(message.task),
            message.dtype,
            message.quantization,
            message.licence,
            message.max_input_tokens,
            tuple(ManifestFile(f.path, Hash(f.sha256), f.size) for f in message.files),
        )
    except ValueError as error:
        raise ProtocolError(f"a manifest that is none: {error}") from error


def profile_to_proto(profile: VerificationProfile) -> pb.VerificationProfile:
    values = {name: getattr(profile, name) for name in profile.__slots__ if name != "task"}
    return pb.VerificationProfile(task=pb.Task.ValueType(int(profile.task)), **values)


def require_signer(expected: Address, found: Address, what: str) -> None:
    """Raises BadSignature unless the two addresses are one."""
    if expected != found:
        raise BadSignature(f"{what} is by 0x{found.hex()}, not by 0x{expected.hex()}")

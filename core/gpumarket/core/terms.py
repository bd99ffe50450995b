"""The statements of the market: frozen values, validated when made, each with its EIP-712 type (`gpumarket.core.typed_data`).

Nothing here does I/O or reads a clock.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpumarket.core.typed_data import Term, Uint32, Uint64, keccak256, term
from gpumarket.core.units import ZERO_HASH, Address, Hash, Money

__all__ = [
    "Ack", "Call", "Close", "Delegation", "JobSpec", "Lease", "ManifestFile", "ModelManifest", "Offer", "Outcome", "Profile", "Receipt",
    "Task", "Term", "VerificationProfile", "Voucher", "keccak256", "merkle_root", "opens_request", "output_chain", "request_hash",
    "sampling_seed", "term", "token_item",
]  # fmt: skip


class Task(enum.IntEnum):
    """What a job asks for. The wire carries token ids; a chat is a GENERATE whose prompt the client rendered."""

    GENERATE = 1
    EMBED = 3
    INFER = 4
    CHECK = 5


class Outcome(enum.IntEnum):
    """How an attempt ended, in its provider's words."""

    COMPLETED = 1
    CANCELLED = 2
    REFUSED = 3
    FAILED = 4
    EXPIRED = 5


@term
class Offer(Term):
    """Envelope of an advert; `content_hash` is keccak256 of the serialized OfferBody."""

    provider: Address
    content_hash: Hash
    sequence: Uint64
    expires_at: Uint64


@term
class JobSpec(Term):
    """What the client wants and the most it pays (fields: proto/gpumarket/v1/terms.proto)."""

    client: Address
    scheduler: Address
    job_id: Hash
    task: Task
    model: Hash
    request_hash: Hash
    prompt_units: Uint32
    max_output_units: Uint32
    max_amount: Money
    constraints_hash: Hash
    profile: Hash
    deadline: Uint64

    def check(self) -> None:
        if self.prompt_units < 1:
            raise ValueError("JobSpec.prompt_units must be at least 1")

    @property
    def key(self) -> Hash:
        """The job's name everywhere: keccak256(client | scheduler | job_id)."""
        return keccak256(self.client + self.scheduler + self.job_id)


@term
class Lease(Term):
    """The scheduler's term sheet for one attempt."""

    job: Hash
    spec: Hash
    attempt: Uint32
    client: Address
    scheduler: Address
    provider: Address
    model: Hash
    task: Task
    prompt_price_per_mtok: Money
    output_price_per_mtok: Money
    maximum: Money
    fee_ppm: Uint32
    client_channel: Hash
    provider_channel: Hash
    profile: Hash
    window_units: Uint32
    prefix_units: Uint32
    prefix_hash: Hash
    issued_at: Uint64
    deadline: Uint64

    def check(self) -> None:
        if self.attempt < 1:
            raise ValueError("Lease.attempt counts from 1")
        if self.window_units < 1:
            raise ValueError("Lease.window_units must be at least 1")


@term
class Ack(Term):
    """The client's cumulative statement of what it holds of one attempt."""

    lease: Hash
    units: Uint32
    output_hash: Hash
    complete: bool
    will_check: bool

    def check(self) -> None:
        if self.will_check and not self.complete:
            raise ValueError("Ack.will_check is said with the last ack only")


@term
class Receipt(Term):
    """The provider's statement of what it did in one attempt."""

    lease: Hash
    nonce: Hash
    request_hash: Hash
    output_hash: Hash
    prefix_units: Uint32
    prefix_hash: Hash
    prompt_units: Uint32
    output_units: Uint32
    outcome: Outcome
    finished_at: Uint64


@term
class Voucher(Term):
    """Everything a channel has ever paid. Signed in the PaymentChannels domain."""

    channel: Hash
    cumulative: Money


@term
class Close(Term):
    """The payee's consent to close a channel at `cumulative`. Signed in the PaymentChannels domain."""

    channel: Hash
    cumulative: Money


@term
class Delegation(Term):
    """The client's leave for somebody else to challenge one lease in its place (Disputes)."""

    lease: Hash
    challenger: Address


@term
class Call(Term):
    """Authentication of a call that carries no signed term of its own."""

    method: Hash
    caller: Address
    audience: Address
    body_hash: Hash
    issued_at: Uint64
    nonce: Hash


@term
class Profile(Term):
    """VerificationProfile. `struct_hash` is its content address; strings enter as their keccak256."""

    task: Task
    dtype_hash: Hash
    runtime_hash: Hash
    provider_gpu_class_hash: Hash
    checker_gpu_class_hash: Hash
    max_abs_diff_nano: Uint64
    accept_mean_gap_micro: Uint64
    reject_mean_gap_micro: Uint64
    gross_gap_milli: Uint32
    gross_share_ppm: Uint32
    min_units: Uint32


@dataclass(frozen=True, slots=True)
class VerificationProfile:
    """How a result is judged (DESIGN of the fields: terms.proto). Content-addressed by `digest`."""

    task: Task
    dtype: str
    runtime: str = "torch"
    provider_gpu_class: str = "*"
    checker_gpu_class: str = "*"
    max_abs_diff_nano: int = 0
    accept_mean_gap_micro: int = 0
    reject_mean_gap_micro: int = 0
    gross_gap_milli: int = 0
    gross_share_ppm: int = 0
    min_units: int = 0

    def __post_init__(self) -> None:
        if self.accept_mean_gap_micro > self.reject_mean_gap_micro:
            raise ValueError("a profile accepts below accept_mean_gap_micro and rejects above reject_mean_gap_micro: they are reversed")

    @property
    def digest(self) -> Hash:
        """keccak256 of the typed-data struct."""
        return self.term.struct_hash

    @property
    def term(self) -> Profile:
        """The typed-data struct."""
        return Profile(
            self.task,
            keccak256(self.dtype.encode()),
            keccak256(self.runtime.encode()),
            keccak256(self.provider_gpu_class.encode()),
            keccak256(self.checker_gpu_class.encode()),
            self.max_abs_diff_nano,
            self.accept_mean_gap_micro,
            self.reject_mean_gap_micro,
            self.gross_gap_milli,
            self.gross_share_ppm,
            self.min_units,
        )


@dataclass(frozen=True, slots=True, order=True)
class ManifestFile:
    """One file of a model: relative path, sha256 of its content, size in bytes."""

    path: str
    sha256: Hash
    size: int

    def __post_init__(self) -> None:
        parts = self.path.split("/")
        if not self.path or any(p in ("", ".", "..") for p in parts) or "\\" in self.path or "\0" in self.path:
            raise ValueError(f"{self.path!r} is not a relative path inside a model")
        if len(self.sha256) != 32 or self.size < 0:
            raise ValueError(f"{self.path}: bad sha256 or size")


@dataclass(frozen=True, slots=True)
class ModelManifest:
    """What is sold. `files` sorted by path; `digest` names it everywhere."""

    name: str
    task: Task
    dtype: str
    quantization: str
    licence: str
    max_input_tokens: int
    files: tuple[ManifestFile, ...]

    def __post_init__(self) -> None:
        paths = [f.path for f in self.files]
        if not paths or paths != sorted(set(paths)):
            raise ValueError("a manifest lists at least one file, sorted by path, each once")

    @property
    def digest(self) -> Hash:
        """Merkle root over the files' (path, sha256, size) and a leaf of the other fields; the name is a label and is left out."""
        head = "\0".join((self.task.name, self.dtype, self.quantization, self.licence, str(self.max_input_tokens)))
        leaves = [head.encode()]
        leaves += [f.path.encode() + b"\0" + f.sha256 + f.size.to_bytes(8, "big") for f in self.files]
        return merkle_root(leaves)

    def file(self, path: str) -> ManifestFile:
        """The file at `path`. Raises KeyError."""
        for entry in self.files:
            if entry.path == path:
                return entry
        raise KeyError(path)


def merkle_root(leaves: Sequence[bytes]) -> Hash:
    """SHA-256 Merkle tree hash with domain-separated leaves and nodes (RFC 6962, section 2.1)."""
    if not leaves:
        raise ValueError("a Merkle tree needs a leaf")
    level = [hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves]
    return Hash(_merkle(level))


def _merkle(level: list[bytes]) -> bytes:
    if len(level) == 1:
        return level[0]
    split = 1 << (len(level) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + _merkle(level[:split]) + _merkle(level[split:])).digest()


# --- hashes that both sides of a job compute -----------------------------------------------------------------------------------


SALT_BYTES = 32


def request_hash(salt: bytes, request: bytes) -> Hash:
    """sha256(salt | request). The salt keeps short prompts from being guessed from their hash."""
    return Hash(hashlib.sha256(salt + request).digest())


def opens_request(salt: bytes, request: bytes, expected: Hash) -> bool:
    """Whether salt and request are what a request hash stands for.

    Salts have one length: else a client could move the border between the two, have one request served and show another to its judges.
    """
    return len(salt) == SALT_BYTES and request_hash(salt, request) == expected


def output_chain(items: Iterable[bytes], start: Hash = ZERO_HASH) -> Hash:
    """Chain hash of an output: h' = sha256(h | item). It can be continued from any prefix, so attempts join without the earlier bytes."""
    value: bytes = start
    for item in items:
        value = hashlib.sha256(value + item).digest()
    return Hash(value)


def token_item(token: int) -> bytes:
    """A generated token as an item of the output chain: uint32 little-endian."""
    return struct.pack("<I", token)


def sampling_seed(lease: Hash, nonce: Hash) -> Hash:
    """keccak256(lease | nonce): the nonce comes after the lease and before any token, so neither side can grind the seed."""
    return keccak256(lease + nonce)

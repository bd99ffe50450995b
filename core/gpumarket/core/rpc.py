"""gRPC as this market uses it: TLS pinned by key hash, errors that cross the wire as themselves, a deadline on every call.

There is no certificate authority. A server makes its own key once; the key's hash stands in its signed offer or in the registry. A client
fetches the certificate, compares the hash, and then trusts that certificate alone for the channel.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import os
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gpumarket.core import hostile_json
from gpumarket.core.errors import (
    BadSignature,
    Busy,
    ChainError,
    ConfigError,
    EngineFailed,
    GpumarketError,
    InvalidRequest,
    JournalError,
    NoProvider,
    ProtocolError,
    Unreachable,
    WalletError,
    by_code,
)
from gpumarket.core.hostile_text import one_line
from gpumarket.core.units import Hash

SERVER_NAME = "gpumarket"
MESSAGE_BYTES_MAX = 32 * 1024 * 1024
CALL_SECONDS = 10.0
HANDSHAKE_SECONDS = 5.0
"""Within which a server must have shown its certificate, name look-up and TCP included."""
_ERROR_KEY = "gpumarket-error"
MESSAGE_MAX, FILTERS_MAX = 2_000, 64
"""Of an error that a peer sent: characters of its message, entries of its filters' counts."""
_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]
SERVER_OPTIONS = [
    *_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_concurrent_streams", 1_024),
    ("grpc.so_reuseport", 0),
]
_OURS = (JournalError, EngineFailed, ConfigError, WalletError, ChainError)
_LINK = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL)
"""Statuses of a link or a transport. INTERNAL: gRPC's own word for a connection that breaks in mid-message; we never say it."""
_STATUS = {
    "busy": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "bad_signature": grpc.StatusCode.UNAUTHENTICATED,
    "protocol": grpc.StatusCode.INVALID_ARGUMENT,
    "no_provider": grpc.StatusCode.FAILED_PRECONDITION,
    "unknown_model": grpc.StatusCode.NOT_FOUND,
    "out_of_funds": grpc.StatusCode.FAILED_PRECONDITION,
}


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """A server's TLS key and certificate (PEM), and the hash that clients pin: sha256 of the SubjectPublicKeyInfo."""

    key_pem: bytes
    certificate_pem: bytes
    key_hash: Hash

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials([(self.key_pem, self.certificate_pem)])


def load_identity(folder: Path) -> ServerIdentity:
    """The TLS identity in `folder`, made on first use (P-256, key file mode 0600)."""
    key_path, certificate_path = folder / "tls.key", folder / "tls.crt"
    if not key_path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key_pem, certificate_pem = _make_certificate()
        _write_private(certificate_path, certificate_pem)
        _write_private(key_path, key_pem)
    certificate_pem = certificate_path.read_bytes()
    return ServerIdentity(key_path.read_bytes(), certificate_pem, _key_hash(x509.load_pem_x509_certificate(certificate_pem)))


@asynccontextmanager
async def pinned_channel(endpoint: str, key_hash: bytes) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to `endpoint` that trusts the key with `key_hash` and no other. Raises Unreachable or BadSignature."""
    channel = await open_channel(endpoint, key_hash)
    try:
        yield channel
    finally:
        await channel.close(None)


async def open_channel(endpoint: str, key_hash: bytes) -> grpc.aio.Channel:
    """As `pinned_channel`, for a channel that outlives a block. Reuse channels: opening one costs two handshakes."""
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            certificate = await _certificate(endpoint)
    except TimeoutError as error:
        said = f"{endpoint} does not answer: no TLS handshake within {HANDSHAKE_SECONDS:.0f} s"
        raise Unreachable(said, hint="check that it runs and that nothing else has its port") from error
    except (OSError, ValueError) as error:
        raise Unreachable(f"{endpoint} does not answer: {error}", hint="check that it runs and that the port is open") from error
    found = _key_hash(certificate)
    if found != key_hash:
        raise BadSignature(f"{endpoint} shows a TLS key with hash 0x{found.hex()}, pinned is 0x{bytes(key_hash).hex()}")
    options = [*_OPTIONS, ("grpc.ssl_target_name_override", SERVER_NAME)]
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    return grpc.aio.secure_channel(endpoint, grpc.ssl_channel_credentials(pem), options=options)


async def _certificate(endpoint: str) -> x509.Certificate:
    """What a server shows, unverified. Never in a thread: a handful of peers that drip their handshake would hold every one there is."""
    host, _, port = endpoint.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the caller compares the key's hash
    _, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context, server_hostname=SERVER_NAME)
    try:
        shown: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return x509.load_der_x509_certificate(shown)
    finally:
        writer.transport.abort()


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: GpumarketError) -> NoReturn:
    """End a call with an error of the tree; the caller gets it back from `from_rpc`."""
    error = for_peer(error)
    details = error.as_dict()
    if isinstance(error, NoProvider):
        details |= {"removed": error.removed, "considered": error.considered}
    if isinstance(error, Busy):
        details["retry_after_seconds"] = error.retry_after_seconds
    status = _STATUS.get(error.code, grpc.StatusCode.UNAVAILABLE if error.retryable else grpc.StatusCode.ABORTED)
    await context.abort(status, error.message, trailing_metadata=((_ERROR_KEY, json.dumps(details)),))
    raise AssertionError("context.abort returned")


def for_peer(error: GpumarketError) -> GpumarketError:
    """What a peer may hear: of an error that is ours alone its kind; its text may name files, databases or a chain's URL."""
    if not isinstance(error, _OURS):
        return error
    hint = "ask another one; the reason is in its operator's log"
    told = GpumarketError(f"an internal failure ({error.code}) on this side", hint=hint, retryable=error.retryable)
    told.code = error.code
    return told


@contextmanager
def hangup_is_unreachable(peer: str) -> Iterator[None]:
    """For a call on a shared channel that this side may close: gRPC then cancels the call, and whoever awaits it would end as if cancelled
    itself. Raises Unreachable for that; a cancellation of the task stays one."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Unreachable(f"the connection to {peer} was given up while it was asked", hint="try again") from None


def from_rpc(error: grpc.aio.AioRpcError, peer: str) -> GpumarketError:
    """The error that the peer sent, or Unreachable for what the transport says."""
    metadata: Any = error.trailing_metadata() or ()  # pairs; the stubs do not say so
    details = dict(metadata).get(_ERROR_KEY)
    if details is not None:
        try:
            return rebuild(hostile_json.loads(details))
        except (ValueError, TypeError, AttributeError) as broken:
            return ProtocolError(f"{peer} failed with an error that is none: {broken}")
    said = f"{error.code().name.lower()} ({one_line(error.details() or '')})"
    if error.code() in _LINK:
        return Unreachable(f"{peer} does not answer: {said}", hint="try again; it may be restarting")
    return GpumarketError(f"{peer} failed: {said}", retryable=False)


def rebuild(details: dict[str, Any]) -> GpumarketError:
    """An error from its wire form {code, message, hint, retryable, ...}. Codes of a newer peer come back as GpumarketError; a peer whose
    own ledger fails counts as one that cannot be reached."""
    cls = by_code().get(str(details.get("code")), GpumarketError)
    message, hint = one_line(str(details.get("message", "")), most=MESSAGE_MAX), one_line(str(details.get("hint", "")))
    if cls is NoProvider:
        counts = list(dict(details.get("removed", {})).items())[:FILTERS_MAX]
        removed = {one_line(str(k), most=50): int(v) for k, v in counts}
        return NoProvider(message, removed=removed, considered=int(details.get("considered", 0)), hint=hint)
    if cls is Busy:
        return Busy(message, retry_after_seconds=float(details.get("retry_after_seconds", 1.0)), hint=hint)
    if cls is JournalError:  # the peer's, not ours: it stops serving and may be back, and no daemon of ours ends with it
        return Unreachable(message, hint=hint)
    if cls is InvalidRequest:
        return InvalidRequest(message, hint=hint)
    if cls.__init__ is not GpumarketError.__init__:
        cls = GpumarketError
    return cls(message, hint=hint, retryable=bool(details.get("retryable", False)))


def _key_hash(certificate: x509.Certificate) -> Hash:
    der = certificate.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return Hash(hashlib.sha256(der).digest())


def _make_certificate() -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)])
    start = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)  # the pin is the identity; a clock that is off must not break TLS
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=36_500))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key_pem, certificate.public_bytes(serialization.Encoding.PEM)


def _write_private(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(path.suffix + ".new")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)

"""Which seed draws a text. Provider, client, checker, scheduler and panel all ask here, and nowhere else. Pure.

Invariant: a text without a seed of its client's is drawn from one that neither side could choose; a text with one has the same seed in
every attempt, whoever serves it, and is no ground for a dispute: its client could have searched for a seed that makes an honest provider
look wrong.
"""

from __future__ import annotations

from gpumarket.core.errors import NotDisputable
from gpumarket.core.terms import keccak256, sampling_seed
from gpumarket.core.units import Hash
from gpumarket.v1 import terms_pb2 as pb

CLIENT_SEED_MIN, CLIENT_SEED_MAX = -(2**63), 2**63 - 1
_LABEL = b"client-seed"


def drawing_seed(request: pb.GenerateRequest, lease: Hash, nonce: Hash) -> Hash:
    """32 bytes that draw the tokens of one attempt: keccak256("client-seed" | int64 big-endian) where the client brought a seed, else
    keccak256(lease | nonce) of the lease's struct hash and the provider's nonce."""
    if request.HasField("client_seed"):
        return keccak256(_LABEL + request.client_seed.to_bytes(8, "big", signed=True))
    return sampling_seed(lease, nonce)


def require_disputable(request: object) -> None:
    """Raises NotDisputable for a text that was drawn from its client's own seed. Other requests pass."""
    if isinstance(request, pb.GenerateRequest) and request.HasField("client_seed"):
        raise NotDisputable(
            "the client chose this text's seed (client_seed): such a result is checked and may go unpaid, but is not disputed",
            hint="leave the seed out where a provider must be held to account with its stake",
        )

"""One function decides what draws a text, and no other module makes a seed of its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumarket.core.errors import NotDisputable
from gpumarket.core.seeds import CLIENT_SEED_MAX, CLIENT_SEED_MIN, drawing_seed, require_disputable
from gpumarket.core.terms import keccak256
from gpumarket.core.units import Hash
from gpumarket.v1 import terms_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
LEASE, NONCE = Hash(b"\x01" * 32), Hash(b"\x02" * 32)
SEEDS = st.integers(CLIENT_SEED_MIN, CLIENT_SEED_MAX)


def test_seed_without_a_clients_is_of_lease_and_nonce() -> None:
    assert drawing_seed(pb.GenerateRequest(), LEASE, NONCE) == keccak256(LEASE + NONCE)


@given(SEEDS)
def test_seed_of_a_client_is_the_same_in_every_attempt(seed: int) -> None:
    request = pb.GenerateRequest(client_seed=seed)
    first = drawing_seed(request, LEASE, NONCE)
    assert first == drawing_seed(request, NONCE, LEASE) == keccak256(b"client-seed" + seed.to_bytes(8, "big", signed=True))


@given(SEEDS, SEEDS)
def test_seeds_of_clients_differ_as_their_numbers_do(one: int, other: int) -> None:
    made = {drawing_seed(pb.GenerateRequest(client_seed=s), LEASE, NONCE) for s in (one, other)}
    assert len(made) == len({one, other})


def test_seed_of_zero_is_a_seed() -> None:
    assert drawing_seed(pb.GenerateRequest(client_seed=0), LEASE, NONCE) != drawing_seed(pb.GenerateRequest(), LEASE, NONCE)


def test_request_with_a_clients_seed_is_no_ground_for_a_dispute() -> None:
    with pytest.raises(NotDisputable, match="client_seed"):
        require_disputable(pb.GenerateRequest(client_seed=0))
    for request in (pb.GenerateRequest(), pb.EmbedRequest(), pb.CheckRequest()):
        require_disputable(request)


def test_seed_is_made_of_lease_and_nonce_nowhere_else() -> None:
    """Whoever calls `sampling_seed` overlooks the client's seed."""
    found = []
    for file in ROOT.glob("*/gpumarket/**/*.py"):
        names = {n.id for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Name)}
        if "sampling_seed" in names:
            found.append(file.relative_to(ROOT).as_posix())
    assert found == ["core/gpumarket/core/seeds.py"]


def test_request_without_the_new_fields_has_the_bytes_that_it_always_had() -> None:
    """Written by hand from the protobuf wire format: what is hashed must not change."""
    request = pb.GenerateRequest(prompt=[5, 6, 300], max_tokens=64, stop_tokens=[1], temperature_milli=700, top_p_ppm=1_000_000)
    assert request.SerializeToString(deterministic=True).hex() == "0a040506ac0210401a010120bc0528c0843d"
    request.client_seed, request.top_logprobs = -1, 0
    assert request.SerializeToString(deterministic=True).hex() == "0a040506ac0210401a010120bc0528c0843d" + "3001" + "3800"

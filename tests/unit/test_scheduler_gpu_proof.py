"""The GPU proof: an honest product passes, and each way of saving the work is refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from gpumarket.core.errors import BadProof, ProtocolError
from gpumarket.core.terms import merkle_root
from gpumarket.settlement import gpu_proof

SEED, VECTOR = hashlib.sha256(b"seed").digest(), hashlib.sha256(b"vector").digest()
N, REPEATS, ASKED = 128, 4, (0, 77, 127)


def prove(rows: np.ndarray, product: np.ndarray | None = None) -> tuple[bytes, bytes, list[gpu_proof.Row]]:
    root, tree = gpu_proof.commit(rows)
    answered = gpu_proof.answer(rows if product is None else product, VECTOR)
    return root, answered, gpu_proof.open_rows(rows, tree, ASKED)


def check(root: bytes, answered: bytes, opened: list[gpu_proof.Row], seed: bytes = SEED) -> None:
    gpu_proof.check(seed, N, REPEATS, root, VECTOR, ASKED, answered, opened)


@pytest.fixture(scope="module")
def honest() -> np.ndarray:
    return gpu_proof.product(SEED, N, REPEATS)


def test_proof_honest_product_passes(honest: np.ndarray) -> None:
    check(*prove(honest))


def test_proof_root_equals_merkle_root_of_terms(honest: np.ndarray) -> None:
    root, _ = gpu_proof.commit(honest)
    assert root == merkle_root([row.tobytes() for row in honest])


def test_proof_of_another_seed_is_refused(honest: np.ndarray) -> None:
    with pytest.raises(BadProof, match="off by"):
        check(*prove(honest), seed=VECTOR)


def test_proof_with_made_up_rows_and_right_product_is_refused(honest: np.ndarray) -> None:
    junk = np.ones_like(honest)
    with pytest.raises(BadProof, match="row 0 gives"):
        check(*prove(junk, product=honest))


def test_proof_in_half_precision_is_refused(honest: np.ndarray) -> None:
    with pytest.raises(BadProof, match="off by"):
        check(*prove(honest.astype(np.float16).astype(np.float32)))


def test_proof_with_a_link_left_out_is_refused() -> None:
    with pytest.raises(BadProof, match="off by"):
        check(*prove(gpu_proof.product(SEED, N, REPEATS - 1)))


def test_proof_with_not_a_number_is_refused(honest: np.ndarray) -> None:
    root, _, opened = prove(honest)
    with pytest.raises(BadProof):
        check(root, np.full(N, np.nan).tobytes(), opened)


def test_proof_with_row_changed_after_commitment_is_refused(honest: np.ndarray) -> None:
    root, answered, opened = prove(honest)
    opened[1] = replace(opened[1], values=(honest[77] * np.float32(1.0001)).tobytes())
    with pytest.raises(BadProof, match="not the one committed"):
        check(root, answered, opened)


def test_proof_opening_other_rows_is_refused(honest: np.ndarray) -> None:
    root, tree = gpu_proof.commit(honest)
    with pytest.raises(BadProof, match="other rows"):
        check(root, gpu_proof.answer(honest, VECTOR), gpu_proof.open_rows(honest, tree, (1, 77, 127)))


def test_proof_truncated_product_or_path_is_refused(honest: np.ndarray) -> None:
    root, answered, opened = prove(honest)
    with pytest.raises(BadProof, match="bytes"):
        check(root, answered[:-1], opened)
    with pytest.raises(BadProof, match="with its path"):
        check(root, answered, [replace(opened[0], path=opened[0].path[:-1]), *opened[1:]])


def test_signs_differ_by_link_so_a_chain_cannot_be_squared() -> None:
    first, second = gpu_proof.signs(SEED, N, 1), gpu_proof.signs(SEED, N, 2)
    assert set(np.unique(first)) == {-1.0, 1.0}
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(("n", "repeats"), [(0, 1), (63, 1), (96, 1), (32_768, 1), (64, 0), (64, 5_000)])
def test_challenge_outside_limits_is_refused(n: int, repeats: int) -> None:
    with pytest.raises(ProtocolError):
        gpu_proof.require_size(n, repeats)

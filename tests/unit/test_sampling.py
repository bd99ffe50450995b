"""The draw is the same on both sides of the market, and the gap tells a wrong token from an honest near-tie."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gpumarket.core.errors import ProtocolError
from gpumarket.node.engine import noise, sampling
from gpumarket.node.engine.base import Sampling
from gpumarket.node.engine.pick import pick_gaps, pick_tokens, top_candidates

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "sampling.json").read_text())
SEED = bytes(range(32))


def vector_logits() -> NDArray[np.float32]:
    return ((np.arange(4001) * 7919 % 997) / 64).astype(np.float32)


def rows(count: int, vocabulary: int, spread: float = 2.0, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=(count, vocabulary)) * spread).astype(np.float32)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_published_vectors_match(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    """Known answers of Random123 1.14 (kat_vectors)."""
    assert noise.philox4x32(counter, key) == expected
    a, b, c, d = (np.array([word], dtype=np.int64) for word in counter)
    assert tuple(int(word[0]) for word in noise.philox4x32((a, b, c, d), key)) == expected
    e, f, g, h = (torch.tensor([word], dtype=torch.int64) for word in counter)
    assert tuple(int(word[0]) for word in noise.philox4x32((e, f, g, h), key)) == expected


def test_noise_vectors_numpy_and_torch_agree() -> None:
    for row in VECTORS["noise"]:
        words = noise.seed_words(bytes.fromhex(row["seed"]))
        assert noise.noise_index(words, row["position"], np.array(row["tokens"])).tolist() == row["index"]
        assert noise.noise_index(words, row["position"], torch.tensor(row["tokens"])).tolist() == row["index"]


def test_gumbel_table_checksum_matches_and_entries_are_correctly_rounded() -> None:
    table = noise.gumbel_table()
    assert hashlib.sha256(table.astype("<f4").tobytes()).hexdigest() == VECTORS["gumbel_table_sha256"]
    with localcontext() as context:
        context.prec = 40
        for i in (0, 1, 385_749, 524_288, 1_048_575):
            exact = -(-(Decimal(2 * i + 1) / Decimal(2**21)).ln()).ln()
            ulp = abs(float(np.nextafter(table[i], np.float32(np.inf))) - float(table[i]))
            assert abs(Decimal(float(table[i])) - exact) <= Decimal(ulp) / 2
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 0


def test_noise_other_seed_position_or_token_is_independent() -> None:
    tokens = np.arange(20_000, dtype=np.int64)[None]
    base = noise.gumbel_noise([SEED], np.array([5]), tokens)[0]
    assert abs(base.mean() - 0.5772) < 0.03  # Euler's constant, the mean of a standard Gumbel
    assert abs(base.var() - np.pi**2 / 6) < 0.1
    for seed, position, shift in ((bytes(32), 5, 0), (SEED, 6, 0), (SEED, 5, 1)):
        other = noise.gumbel_noise([seed], np.array([position]), tokens + shift)[0]
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.03


def test_seed_of_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        noise.seed_words(b"short")


def test_draw_vectors_match() -> None:
    for row in VECTORS["draws"]:
        params = Sampling(row["temperature_milli"], row["top_p_ppm"], bytes.fromhex(VECTORS["draw_seed"]))
        assert sampling.draw(vector_logits(), row["position"], params) == row["token"]


@pytest.mark.parametrize("vocabulary", [4, 256, 257, 4001])
def test_candidates_with_ties_torch_equals_numpy(vocabulary: int) -> None:
    coarse = (np.round(rows(40, vocabulary) * 4) / 4).astype(np.float32)
    ids, values = sampling.candidates(coarse)
    torch_ids, torch_values = top_candidates(torch.from_numpy(coarse))
    assert (ids == torch_ids).all() and (values == torch_values).all()
    for row, chosen in zip(coarse, ids, strict=True):
        best = sorted(range(vocabulary), key=lambda i: (-row[i], i))[: min(256, vocabulary)]
        assert chosen.tolist() == sorted(best)


def test_draw_torch_rows_of_mixed_parameters_equal_single_rows() -> None:
    logits = rows(6, 1000)
    samplings = [Sampling(t, p, SEED) for t, p in ((0, 1_000_000), (1000, 1_000_000), (500, 900_000), (1500, 100_000), (0, 1), (1000, 1))]
    positions = [3, 4, 5, 6, 7, 8]
    singles = [sampling.draw(row, i, s) for row, i, s in zip(logits, positions, samplings, strict=True)]
    assert pick_tokens(torch.from_numpy(logits), positions, samplings) == singles


def test_draw_greedy_tie_takes_lowest_id_and_ignores_noise() -> None:
    row = np.zeros(1000, dtype=np.float32)
    row[[700, 300]] = 5.0
    drawn = {sampling.draw(row, i, Sampling(0, 1_000_000, bytes([i]) * 32)) for i in range(20)}
    assert drawn == {300}
    assert pick_tokens(torch.from_numpy(row[None]), [0], [Sampling(0, 1, SEED)]) == [300]


def test_draw_frequencies_follow_the_softmax() -> None:
    row = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03])).astype(np.float32)
    drawn = [sampling.draw(row, i, Sampling(1000, 1_000_000, SEED)) for i in range(4000)]
    assert np.abs(np.bincount(drawn, minlength=5) / 4000 - np.exp(row)).max() < 0.03


def test_draw_nucleus_keeps_the_shortest_prefix_that_reaches_top_p() -> None:
    row = np.log(np.array([0.07, 0.5, 0.15, 0.25, 0.03])).astype(np.float32)
    drawn = {sampling.draw(row, i, Sampling(1000, 700_000, SEED)) for i in range(500)}
    assert drawn == {1, 3}
    assert {sampling.draw(row, i, Sampling(1000, 1, SEED)) for i in range(100)} == {1}


@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1_000_000), (1000, 1_000_000), (700, 900_000), (2000, 500_000)])
def test_gap_of_honest_token_is_zero_and_small_under_rounding(temperature: int, top_p: int) -> None:
    logits = rows(300, 2000)
    samplings = [Sampling(temperature, top_p, bytes([i % 5]) * 32) for i in range(300)]
    positions = list(range(300))
    tokens = pick_tokens(torch.from_numpy(logits), positions, samplings)
    assert (pick_gaps(torch.from_numpy(logits), tokens, positions, samplings) == 0).all()
    other_rounding = torch.from_numpy(logits).bfloat16()  # relative error of 1/256, larger than an honest machine's
    gaps = pick_gaps(other_rounding, tokens, positions, samplings)
    assert gaps.max() < 0.1 and gaps.mean() < 0.002


def test_gap_near_edge_of_flat_candidates_is_small() -> None:
    logits = rows(500, 2000, spread=0.2)  # an untrained model: rank 256 lies among near-equals
    samplings = [Sampling(1000, 950_000, SEED)] * 500
    positions = list(range(500))
    tokens = pick_tokens(torch.from_numpy(logits), positions, samplings)
    nudged = torch.from_numpy(logits + rows(500, 2000, spread=0.002, seed=1))
    assert pick_gaps(nudged, tokens, positions, samplings).max() < 0.03


@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1_000_000), (1000, 1_000_000), (700, 900_000)])
def test_gap_of_foreign_token_is_large(temperature: int, top_p: int) -> None:
    logits = rows(200, 2000)
    params = Sampling(temperature, top_p, SEED)
    gaps = [sampling.score_gap(row, (i * 37) % 2000, i, params) for i, row in enumerate(logits)]
    assert np.mean(np.array(gaps) > 0.1) > 0.9 and np.mean(gaps) > 1.5
    assert max(gaps) == sampling.GAP_CLIP


def test_gap_of_token_drawn_with_another_seed_is_seen() -> None:
    logits = rows(200, 2000)
    honest, ground = Sampling(1000, 1_000_000, SEED), Sampling(1000, 1_000_000, bytes(32))
    gaps = [sampling.score_gap(row, sampling.draw(row, i, ground), i, honest) for i, row in enumerate(logits)]
    assert np.mean(np.array(gaps) > 0.1) > 0.5


def test_gap_greedy_is_the_logit_difference() -> None:
    row = np.array([1.0, 3.0, 2.5], dtype=np.float32)
    assert sampling.score_gap(row, 2, 0, Sampling(0, 1_000_000, SEED)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature_milli": -1}, {"temperature_milli": 2001}, {"top_p_ppm": 0}, {"top_p_ppm": 1_000_001}, {"seed": b"x"}],
)
def test_sampling_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        replace(Sampling(0, 1, SEED), **wrong)

"""Verdicts: the measured honest range is accepted, the measured cheats are not, and evidence that does not hold is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random as Seeded
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumarket.core import codec
from gpumarket.core.errors import BadReceipt, BadSignature, ConfigError, ProtocolError
from gpumarket.core.signing import LocalKey, market_domain
from gpumarket.core.tensor_requests import Tensor, TensorRequest
from gpumarket.core.tensor_requests import to_proto as tensors_to_proto
from gpumarket.core.tensors import TensorSpec, encode_item
from gpumarket.core.terms import JobSpec, Lease, Outcome, Receipt, Task, keccak256, output_chain, request_hash, sampling_seed, token_item
from gpumarket.core.units import ZERO_HASH, Address, Hash, Money
from gpumarket.settlement.verification import (
    EMBED_BF16,
    EMBED_FP32,
    INFER_FP16,
    INFER_FP32,
    PROFILES,
    TEXT_BF16,
    PooledTest,
    Verdict,
    check_of,
    decide_embed,
    decide_tensors,
    decide_text,
    draw_check,
    draw_checker,
    draw_subset,
    drawn_by,
    judge,
    open_evidence,
    profile_by_digest,
    profile_for,
)
from gpumarket.v1 import market_pb2 as mpb
from gpumarket.v1 import terms_pb2 as pb

DOMAIN = market_domain(31337, Address(b"\x11" * 20))
CLIENT, SCHEDULER, PROVIDER, FIRST, SECOND = (LocalKey(bytes([i]) * 32) for i in range(1, 6))
SALT = keccak256(b"salt")


class SeededRandom:
    """core.ports.Random from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = Seeded(seed)

    def token(self, size: int) -> bytes:
        return self._random.randbytes(size)


def row(*values: float) -> bytes:
    return np.array(values, dtype="<f4").tobytes()


def rows(seed: int, count: int = 6, size: int = 16, noise: float = 0.0) -> list[bytes]:
    base = np.random.default_rng(seed).normal(size=(count, size)).astype("<f4")
    if noise:
        base = (base + np.random.default_rng(99).uniform(-noise, noise, base.shape)).astype("<f4")
    return [r.tobytes() for r in base]


# --- profiles ------------------------------------------------------------------------------------------------------------------


def test_profiles_are_addressed_by_content() -> None:
    assert len(PROFILES) == 6
    assert all(profile.digest == digest for digest, profile in PROFILES.items())
    assert replace(EMBED_FP32, max_abs_diff_nano=10_001).digest not in PROFILES
    assert profile_for(Task.EMBED, "float32") is EMBED_FP32
    assert profile_by_digest(TEXT_BF16.digest) is TEXT_BF16


def test_profile_unknown_is_refused_with_what_is_known() -> None:
    with pytest.raises(ConfigError, match="int4") as caught:
        profile_for(Task.EMBED, "int4")
    assert "EMBED in float32" in caught.value.hint
    with pytest.raises(ConfigError, match="not known"):
        profile_by_digest(ZERO_HASH)


# --- embeddings ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "noise", "verdict"),
    [
        (EMBED_FP32, 0, Verdict.ACCEPTED),
        (EMBED_FP32, 1.3e-7, Verdict.ACCEPTED),  # the largest honest difference measured
        (EMBED_FP32, 1.5e-4, Verdict.REJECTED),  # the smallest of a cheat: fp16 or 0.001 noise in one layer
        (EMBED_FP32, 1.1e-3, Verdict.REJECTED),  # bf16 sold as fp32
        (EMBED_BF16, 2.3e-3, Verdict.ACCEPTED),
        (EMBED_BF16, 1.3e-2, Verdict.REJECTED),  # int8
    ],
)
def test_embed_measured_differences_fall_on_the_right_side(profile: Any, noise: float, verdict: Verdict) -> None:
    ours = np.full((2, 384), 0.05, dtype="<f4")
    theirs = ours.copy()
    theirs[1, 7] += np.float32(noise)
    decision = decide_embed(profile, [r.tobytes() for r in ours], [r.tobytes() for r in theirs])
    assert decision.verdict is verdict
    assert decision.statistic == pytest.approx(noise, abs=1e-8)


@pytest.mark.parametrize(
    ("delivered", "recomputed"),
    [
        ([], []),
        ([row(1)], []),
        ([row(1), row(2)], [row(1)]),
        ([row(1, 2)], [row(1)]),
        ([b""], [b""]),
        ([b"\0" * 3], [b"\0" * 3]),
        ([row(float("nan"))], [row(1)]),
        ([row(1)], [row(float("nan"))]),
        ([row(float("nan"))], [row(float("nan"))]),
        ([row(float("inf"))], [row(float("inf"))]),
        ([row(3e38)], [row(-3e38)]),
    ],
)
def test_embed_shapes_and_values_that_are_none_are_rejected_with_a_reason(delivered: list[bytes], recomputed: list[bytes]) -> None:
    decision = decide_embed(EMBED_FP32, delivered, recomputed)
    assert decision.verdict is Verdict.REJECTED and decision.reason


def test_embed_swapped_rows_are_rejected() -> None:
    ours = rows(1)
    assert decide_embed(EMBED_FP32, ours, ours).accepted
    assert not decide_embed(EMBED_FP32, ours[::-1], ours).accepted


# --- text ----------------------------------------------------------------------------------------------------------------------


def gaps(units: int, *values: float) -> bytes:
    """`values` at the front, zeros after them."""
    out = np.zeros(units, dtype="<f4")
    out[: len(values)] = values
    return out.tobytes()


@pytest.mark.parametrize(
    ("given_gaps", "verdict"),
    [
        (gaps(129), Verdict.ACCEPTED),
        (gaps(129, 0.071), Verdict.ACCEPTED),  # largest honest gap
        (gaps(129, 0.071, 0.008), Verdict.ACCEPTED),  # 6.1e-4: the largest honest mean
        (gaps(129, 0.09, 0.05), Verdict.GREY),  # 1.1e-3
        (gaps(129, *([0.05] * 6)), Verdict.REJECTED),  # 2.3e-3: fp8's least
        (gaps(129, *([0.5] * 27)), Verdict.REJECTED),  # int4's least: 21 % gross
        (gaps(129, float("inf")), Verdict.REJECTED),  # a token that could not be drawn: 2/129
    ],
)
def test_text_measured_gaps_fall_on_the_right_side(given_gaps: bytes, verdict: Verdict) -> None:
    assert decide_text(TEXT_BF16, given_gaps).verdict is verdict


def test_text_gross_share_rejects_whatever_the_mean_band() -> None:
    lenient = replace(TEXT_BF16, reject_mean_gap_micro=2_000_000)
    assert decide_text(lenient, gaps(100, *([0.11] * 15))).verdict is Verdict.GREY
    assert decide_text(lenient, gaps(100, *([0.11] * 16))).verdict is Verdict.REJECTED


def test_text_short_answer_is_grey_at_worst() -> None:
    short = np.full(TEXT_BF16.min_units - 1, 1.5, dtype="<f4").tobytes()
    decision = decide_text(TEXT_BF16, short)
    assert decision.verdict is Verdict.GREY and "too short" in decision.reason
    assert decide_text(TEXT_BF16, short + row(1.5)).verdict is Verdict.REJECTED


@pytest.mark.parametrize("bad", [b"", b"\0" * 5, row(float("nan")), row(-0.1), np.zeros((2, 2), dtype="<f4")])
def test_text_gaps_that_are_none_are_rejected_with_a_reason(bad: Any) -> None:
    decision = decide_text(TEXT_BF16, bad)
    assert decision.verdict is Verdict.REJECTED and "gap" in decision.reason


# --- pooled --------------------------------------------------------------------------------------------------------------------


def test_pooled_honest_means_never_reject_in_a_thousand_jobs() -> None:
    random = np.random.default_rng(7)
    test = PooledTest(TEXT_BF16)
    for mean in np.minimum(random.exponential(1.2e-4, 1000), 6.1e-4):
        test = test.observe(float(mean), 129)
        assert test.verdict is not Verdict.REJECTED


def test_pooled_int8_is_caught_within_ten_jobs() -> None:
    test, jobs = PooledTest(TEXT_BF16), 0
    while test.verdict is not Verdict.REJECTED:
        test, jobs = test.observe(6.9e-4, 129), jobs + 1
        assert jobs <= 10


def test_pooled_one_job_never_rejects() -> None:
    assert PooledTest(TEXT_BF16).observe(2.0, 129).verdict is Verdict.ACCEPTED
    assert PooledTest(TEXT_BF16).observe(2.0, 10).score == 0.0


def test_pooled_short_answers_add_up_to_what_one_long_answer_says() -> None:
    long = PooledTest(TEXT_BF16).observe(7e-4, 256)
    short = PooledTest(TEXT_BF16)
    for _ in range(16):
        short = short.observe(7e-4, 16)
    assert short.score == pytest.approx(long.score)
    assert (short.units, long.units) == (0, 0)


def test_pooled_honest_past_is_no_credit() -> None:
    test = PooledTest(TEXT_BF16)
    for _ in range(500):
        test = test.observe(0.0, 129)
    assert test.score == 0.0


@pytest.mark.parametrize(("mean", "units"), [(float("nan"), 129), (1.0, 0)])
def test_pooled_nothing_to_observe_changes_nothing(mean: float, units: int) -> None:
    assert PooledTest(TEXT_BF16).observe(mean, units) == PooledTest(TEXT_BF16)


# --- draws ---------------------------------------------------------------------------------------------------------------------


def test_draw_check_follows_the_probability() -> None:
    random = SeededRandom(1)
    assert not any(draw_check(0.0, random) for _ in range(200))
    assert all(draw_check(1.0, random) for _ in range(200))
    assert 400 < sum(draw_check(0.25, random) for _ in range(2000)) < 600
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="probability"):
            draw_check(wrong, random)


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers())
def test_draw_subset_is_ascending_without_repeats_and_not_empty(count: int, share: float, seed: int) -> None:
    drawn = draw_subset(count, share, SeededRandom(seed))
    assert list(drawn) == sorted(set(drawn))
    assert 1 <= len(drawn) <= count and drawn[0] >= 0 and drawn[-1] < count
    assert len(drawn) >= count * share


def test_draw_subset_reaches_every_item_evenly() -> None:
    random = SeededRandom(2)
    hits = Counter(i for _ in range(3000) for i in draw_subset(5, 0.4, random))
    assert set(hits) == set(range(5))
    assert max(hits.values()) < 1.2 * min(hits.values())


@pytest.mark.parametrize(("count", "share"), [(0, 0.5), (3, 0.0), (3, 1.5)])
def test_draw_subset_of_nothing_is_refused(count: int, share: float) -> None:
    with pytest.raises(ValueError, match="draw"):
        draw_subset(count, share, SeededRandom(1))


def test_draw_checker_by_stake_without_the_excluded_owner() -> None:
    a, b, c, owner = (Address(bytes([i]) * 20) for i in range(1, 5))
    random = SeededRandom(3)
    candidates = [(a, a, 10**24), (b, b, 3 * 10**24), (c, owner, 10**27)]
    drawn = Counter(draw_checker(candidates, {owner}, random) for _ in range(2000))
    assert set(drawn) == {a, b}
    assert 2.5 < drawn[b] / drawn[a] < 3.6
    assert draw_checker([(a, owner, 1)], {owner}, random) is None
    assert draw_checker([(a, a, 0)], set(), random) is None
    assert draw_checker([], set(), random) is None


# --- evidence ------------------------------------------------------------------------------------------------------------------


class Job:
    """A finished job, signed by everybody, as it would be opened."""

    def __init__(
        self,
        provider: LocalKey,
        task: Task,
        request: Any,
        output: list[bytes],
        units: int,
        profile: Any = EMBED_FP32,
        *,
        prefix: int = 0,
        prefix_units: int = 0,
        scheduler: LocalKey = SCHEDULER,
    ) -> None:
        raw = request.SerializeToString(deterministic=True)
        self.request, self.output, self.provider, self.scheduler = raw, output, provider, scheduler
        self.spec = JobSpec(
            CLIENT.address, scheduler.address, keccak256(provider.secret + raw), task, keccak256(b"model"), request_hash(SALT, raw),
            max(1, units), units, Money(10**18), keccak256(b""), profile.digest, 2_000_000_000,
        )  # fmt: skip
        prefix_hash = output_chain(output[:prefix])
        self.lease = Lease(
            self.spec.key, self.spec.struct_hash, 1, CLIENT.address, scheduler.address, provider.address, self.spec.model, task,
            Money(1), Money(1), Money(10**18), 0, ZERO_HASH, ZERO_HASH, profile.digest, 32, prefix_units, prefix_hash, 1, 2_000_000_000,
        )  # fmt: skip
        self.receipt = Receipt(
            self.lease.struct_hash, keccak256(b"nonce"), self.spec.request_hash, output_chain(output), prefix_units, prefix_hash,
            self.spec.prompt_units, units - prefix_units, Outcome.COMPLETED, 5,
        )  # fmt: skip

    @property
    def seed(self) -> Hash:
        return sampling_seed(self.lease.struct_hash, self.receipt.nonce)

    def opening(self, **changes: Any) -> mpb.Opening:
        parts: dict[str, Any] = {
            "lease": codec.signed_lease(self.scheduler, DOMAIN, self.lease),
            "order": codec.signed_order(CLIENT, DOMAIN, self.spec, b""),
            "receipt": codec.signed_receipt(self.provider, DOMAIN, self.receipt),
            "request": self.request,
            "salt": SALT,
            "output": self.output,
        }
        return mpb.Opening(**(parts | changes))


INPUTS = pb.EmbedRequest(inputs=[pb.TokenList(ids=range(i + 1)) for i in range(6)])
DRAWN = (1, 4)


def embed_job(delivered: list[bytes], provider: LocalKey = PROVIDER, **kwargs: Any) -> Job:
    return Job(provider, Task.EMBED, INPUTS, delivered, 21, **kwargs)


def embed_check(computed: list[bytes], checker: LocalKey, drawn: tuple[int, ...] = DRAWN, **kwargs: Any) -> Job:
    subset = pb.CheckRequest(embed=pb.EmbedRequest(inputs=[INPUTS.inputs[i] for i in drawn]))
    units = sum(len(INPUTS.inputs[i].ids) for i in drawn)
    return Job(checker, Task.CHECK, subset, [computed[i] for i in drawn], units, **kwargs)


def verdict(subject: Job, *checks: Job, drawn: tuple[int, ...] = DRAWN, profile: Any = EMBED_FP32, owner_of: Any = None) -> Verdict:
    opened = [open_evidence(DOMAIN, job.opening()) for job in (subject, *checks)]
    return judge(profile, opened[0], opened[1:], drawn, owner_of or (lambda address: address)).verdict


RIGHT, WRONG, OTHER_WRONG = rows(1), rows(1, noise=1e-3), rows(2)


def test_judge_two_agreeing_checks_reject() -> None:
    assert verdict(embed_job(WRONG), embed_check(RIGHT, FIRST), embed_check(RIGHT, SECOND)) is Verdict.REJECTED


def test_judge_one_check_only_makes_grey() -> None:
    assert verdict(embed_job(WRONG), embed_check(RIGHT, FIRST)) is Verdict.GREY


def test_judge_one_check_on_the_providers_side_acquits() -> None:
    assert verdict(embed_job(RIGHT), embed_check(WRONG, FIRST), embed_check(RIGHT, SECOND)) is Verdict.ACCEPTED


def test_judge_checks_that_contradict_each_other_do_not_reject() -> None:
    assert verdict(embed_job(WRONG), embed_check(RIGHT, FIRST), embed_check(OTHER_WRONG, SECOND)) is Verdict.GREY


def test_judge_lying_checker_is_rejected_by_the_second_check_and_the_job_itself() -> None:
    liar, honest = embed_check(WRONG, FIRST), embed_check(RIGHT, SECOND)
    assert verdict(liar, honest, embed_job(RIGHT)) is Verdict.REJECTED
    assert verdict(honest, liar, embed_job(RIGHT)) is Verdict.ACCEPTED


def test_judge_rows_outside_the_draw_do_not_matter() -> None:
    mixed = [WRONG[i] if i not in DRAWN else RIGHT[i] for i in range(6)]
    assert verdict(embed_job(mixed), embed_check(RIGHT, FIRST), embed_check(RIGHT, SECOND)) is Verdict.ACCEPTED


def test_judge_evidence_that_does_not_bear_on_the_subject_is_refused() -> None:
    subject, first = embed_job(WRONG), embed_check(RIGHT, FIRST)
    refused: list[tuple[str, Any]] = [
        ("owners", lambda: verdict(subject, first, embed_check(RIGHT, FIRST))),
        ("owners", lambda: verdict(subject, first, embed_check(RIGHT, SECOND), owner_of=lambda a: Address(bytes(20)))),
        ("owners", lambda: verdict(subject, embed_check(RIGHT, PROVIDER))),
        ("needs the check", lambda: verdict(subject)),
        ("drawn", lambda: verdict(subject, first, drawn=(0, 4))),
        ("ascending", lambda: verdict(subject, first, drawn=(4, 1))),
        ("ascending", lambda: verdict(subject, first, drawn=(1, 9))),
        ("ascending", lambda: verdict(subject, first, drawn=())),
        ("scheduler", lambda: verdict(subject, embed_check(RIGHT, FIRST, scheduler=CLIENT))),
        ("no CHECK job", lambda: verdict(subject, embed_job(RIGHT, FIRST))),
        ("profile", lambda: verdict(subject, first, profile=EMBED_BF16)),
    ]
    for why, act in refused:
        with pytest.raises(ProtocolError, match=why):
            act()


def test_judge_blames_only_what_the_attempt_itself_delivered() -> None:
    """Rows 0 and 1 (3 tokens) came from an earlier attempt; a check of row 1 says nothing about this one."""
    later = embed_job(WRONG, prefix=2, prefix_units=3)
    with pytest.raises(ProtocolError, match="this attempt"):
        verdict(later, embed_check(RIGHT, FIRST))
    drawn = (2, 4)
    checks = (embed_check(RIGHT, FIRST, drawn), embed_check(RIGHT, SECOND, drawn))
    assert verdict(later, *checks, drawn=drawn) is Verdict.REJECTED


# --- evidence of text ----------------------------------------------------------------------------------------------------------

PROMPT = pb.GenerateRequest(prompt=range(9), max_tokens=200, temperature_milli=1000, top_p_ppm=1_000_000)
TOKENS = [token_item(t) for t in range(100, 229)]


def text_job(prefix: int = 0) -> Job:
    return Job(PROVIDER, Task.GENERATE, PROMPT, TOKENS, len(TOKENS), TEXT_BF16, prefix=prefix, prefix_units=prefix)


def text_check(subject: Job, found: bytes, checker: LocalKey, seed: bytes | None = None, **request: Any) -> Job:
    last = pb.SeedSegment(start=subject.lease.prefix_units, seed=subject.seed if seed is None else seed)
    first = [pb.SeedSegment(start=0, seed=keccak256(b"earlier"))] if subject.lease.prefix_units else []
    parts: dict[str, Any] = {"generate": PROMPT, "output": [int.from_bytes(t, "little") for t in TOKENS], "segments": [*first, last]}
    made = pb.CheckRequest(**(parts | request))
    return Job(checker, Task.CHECK, made, [found], len(made.generate.prompt) + len(made.output), TEXT_BF16)


BAD, GOOD = gaps(129, *([1.0] * 40)), gaps(129)


def test_judge_text_two_replays_reject_and_one_acquits() -> None:
    job = text_job()
    bad, also_bad, good = text_check(job, BAD, FIRST), text_check(job, BAD, SECOND), text_check(job, GOOD, SECOND)
    assert verdict(job, bad, also_bad, drawn=(), profile=TEXT_BF16) is Verdict.REJECTED
    assert verdict(job, bad, drawn=(), profile=TEXT_BF16) is Verdict.GREY
    assert verdict(job, bad, good, drawn=(), profile=TEXT_BF16) is Verdict.ACCEPTED
    assert verdict(bad, good, job, drawn=(), profile=TEXT_BF16) is Verdict.REJECTED  # the lying checker
    assert verdict(good, bad, job, drawn=(), profile=TEXT_BF16) is Verdict.ACCEPTED


def test_judge_text_by_another_answer_instead_of_a_check_is_refused() -> None:
    other = Job(FIRST, Task.GENERATE, PROMPT, TOKENS, len(TOKENS), TEXT_BF16)
    with pytest.raises(ProtocolError, match="no CHECK job"):
        verdict(text_job(), other, profile=TEXT_BF16)


def test_judge_text_blames_only_the_attempts_own_tokens() -> None:
    later = text_job(prefix=60)
    bad_before = gaps(129, *([1.0] * 40))  # all bad tokens are the earlier attempt's
    bad_after = gaps(129, *([0.0] * 60), *([1.0] * 40))
    assert verdict(later, text_check(later, bad_before, FIRST), drawn=(), profile=TEXT_BF16) is Verdict.ACCEPTED
    both = (text_check(later, bad_after, FIRST), text_check(later, bad_after, SECOND))
    assert verdict(later, *both, drawn=(), profile=TEXT_BF16) is Verdict.REJECTED


def test_judge_text_wrong_number_of_gaps_is_a_mismatch_of_the_checker() -> None:
    job = text_job()
    assert verdict(job, text_check(job, gaps(128), FIRST), text_check(job, GOOD, SECOND), drawn=(), profile=TEXT_BF16) is Verdict.ACCEPTED


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"seed": keccak256(b"ground")}, "seed"),
        ({"output": range(129)}, "output"),
        ({"generate": pb.GenerateRequest(prompt=range(8), max_tokens=200)}, "request"),
        ({"segments": []}, "seed"),
    ],
)
def test_judge_text_check_of_another_replay_is_refused(changes: dict[str, Any], why: str) -> None:
    job = text_job()
    with pytest.raises(ProtocolError, match=why):
        verdict(job, text_check(job, BAD, FIRST, **changes), drawn=(), profile=TEXT_BF16)


# --- openings ------------------------------------------------------------------------------------------------------------------


def test_opening_with_any_part_exchanged_is_refused() -> None:
    job, other = embed_job(RIGHT), embed_job(RIGHT, FIRST)
    for part, error in (("lease", BadSignature), ("order", ProtocolError), ("receipt", BadSignature)):
        with pytest.raises(error):
            open_evidence(DOMAIN, job.opening(**{part: getattr(other.opening(), part)}))
    with pytest.raises(ProtocolError, match="request"):
        open_evidence(DOMAIN, job.opening(salt=keccak256(b"other")))
    with pytest.raises(ProtocolError, match="request"):
        open_evidence(DOMAIN, job.opening(request=job.request + b"\0"))
    together = SALT + job.request
    for cut in (31, 33):  # the same string, another border: not what was served
        with pytest.raises(ProtocolError, match="request"):
            open_evidence(DOMAIN, job.opening(salt=together[:cut], request=together[cut:]))
    with pytest.raises(BadReceipt, match="output"):
        open_evidence(DOMAIN, job.opening(output=WRONG))


@pytest.mark.parametrize(
    "change",
    [
        {"output_units": 22},
        {"output_units": 20},
        {"prefix_units": 1},
        {"prefix_hash": keccak256(b"p")},
        {"request_hash": keccak256(b"r")},
    ],
)
def test_opening_receipt_that_states_what_is_not_so_is_refused(change: dict[str, Any]) -> None:
    job = embed_job(RIGHT)
    job.receipt = replace(job.receipt, **change)
    with pytest.raises(BadReceipt):
        open_evidence(DOMAIN, job.opening())


def test_opening_with_more_rows_than_inputs_is_refused() -> None:
    with pytest.raises(BadReceipt):
        open_evidence(DOMAIN, embed_job([*RIGHT, row(1)]).opening())


def test_opening_prefix_that_ends_inside_an_input_is_refused() -> None:
    with pytest.raises(ProtocolError, match="inside an input"):
        open_evidence(DOMAIN, embed_job(RIGHT, prefix=1, prefix_units=2).opening())


def test_opening_lease_of_another_order_is_refused() -> None:
    job = embed_job(RIGHT)
    job.lease = replace(job.lease, model=keccak256(b"other model"))
    job.receipt = replace(job.receipt, lease=job.lease.struct_hash)
    with pytest.raises(ProtocolError, match="order"):
        open_evidence(DOMAIN, job.opening())


# --- tensors -------------------------------------------------------------------------------------------------------------------

TENSORS = TensorRequest(
    (Tensor("x", "UINT8", (6, 2), bytes([1, 2, 3, 4, 1, 2, 5, 6, 7, 8, 1, 2])),),
    (TensorSpec("y", "FP32", (-1, 2)), TensorSpec("n", "INT64", (-1,))),
    6,
)


def answers(change: float = 0.0, at: int = 1, label: int = 0) -> list[bytes]:
    """Six items; the one at `at` is changed."""
    rows = [(change, label) if i == at else (0, 0) for i in range(6)]
    return [encode_item([np.array([i, i + more], np.float32), np.array(i + other)]) for i, (more, other) in enumerate(rows)]


def tensor_job(output: list[bytes], provider: LocalKey = PROVIDER, **kwargs: Any) -> Job:
    return Job(provider, Task.INFER, tensors_to_proto(TENSORS), output, len(output), INFER_FP32, **kwargs)


def tensor_check(output: list[bytes], checker: LocalKey, drawn: tuple[int, ...] = DRAWN) -> Job:
    check = check_of(tensors_to_proto(TENSORS), drawn)
    return Job(checker, Task.CHECK, check, [output[i] for i in drawn], len(drawn), INFER_FP32)


def item(value: float, kind: Any = np.float32) -> list[bytes]:
    return [encode_item([np.array(value, kind)])]


@pytest.mark.parametrize(
    ("profile", "ours", "theirs", "verdict"),
    [
        (INFER_FP32, item(0.5), item(0.5 + 1.5e-6), Verdict.ACCEPTED),  # the largest honest difference measured: other kernels, 2 threads
        (INFER_FP32, item(0.5), item(0.5 + 2e-3), Verdict.REJECTED),  # the largest of 600 rows of fp16 weights
        (INFER_FP32, item(5e4), item(5e4 + 1), Verdict.ACCEPTED),  # relative above 1
        (INFER_FP32, item(5e4), item(5e4 + 4), Verdict.REJECTED),
        (INFER_FP16, item(0.5, np.float16), item(0.51, np.float16), Verdict.ACCEPTED),
        (INFER_FP16, item(0.5, np.float16), item(0.6, np.float16), Verdict.REJECTED),
        (INFER_FP32, item(7, np.int64), item(7, np.int64), Verdict.ACCEPTED),
        (INFER_FP32, item(7, np.int64), item(8, np.int64), Verdict.REJECTED),
        (INFER_FP32, item(2**63 - 1, np.int64), item(2**63 - 2, np.int64), Verdict.REJECTED),  # equal as floats
        (INFER_FP32, item(1, np.bool_), item(0, np.bool_), Verdict.REJECTED),
        (INFER_FP32, item(float("nan")), item(float("nan")), Verdict.ACCEPTED),
        (INFER_FP32, item(float("nan")), item(0), Verdict.REJECTED),
        (INFER_FP32, item(float("inf")), item(float("inf")), Verdict.ACCEPTED),
        (INFER_FP32, item(float("inf")), item(float("-inf")), Verdict.REJECTED),
        (INFER_FP32, item(float("inf")), item(3e38), Verdict.REJECTED),
        (INFER_FP32, item(1), item(1, np.float64), Verdict.REJECTED),
        (INFER_FP32, item(1), [encode_item([np.zeros((1,), np.float32)])], Verdict.REJECTED),
        (INFER_FP32, item(1), [item(1)[0] * 2], Verdict.REJECTED),
        (INFER_FP32, item(1), [b"\xff"], Verdict.REJECTED),
        (INFER_FP32, item(1), [], Verdict.REJECTED),
        (INFER_FP32, [], [], Verdict.REJECTED),
    ],
)
def test_tensors_fall_on_the_right_side(profile: Any, ours: list[bytes], theirs: list[bytes], verdict: Verdict) -> None:
    for pair in ((ours, theirs), (theirs, ours)):
        decision = decide_tensors(profile, *pair)
        assert decision.verdict is verdict and decision.reason


def tensor_verdict(subject: Job, *checks: Job, drawn: tuple[int, ...] = DRAWN) -> Verdict:
    return verdict(subject, *checks, drawn=drawn, profile=INFER_FP32)


@pytest.mark.parametrize("wrong", [answers(1e-2), answers(label=1)])
def test_judge_tensors_two_agreeing_checks_reject_and_one_makes_grey(wrong: list[bytes]) -> None:
    right = answers()
    assert tensor_verdict(tensor_job(wrong), tensor_check(right, FIRST), tensor_check(right, SECOND)) is Verdict.REJECTED
    assert tensor_verdict(tensor_job(wrong), tensor_check(right, FIRST)) is Verdict.GREY
    assert tensor_verdict(tensor_job(right), tensor_check(right, FIRST)) is Verdict.ACCEPTED
    assert tensor_verdict(tensor_job(wrong), tensor_check(right, FIRST, (2, 3)), drawn=(2, 3)) is Verdict.ACCEPTED
    assert tensor_verdict(tensor_check(wrong, FIRST), tensor_check(right, SECOND), tensor_job(right)) is Verdict.REJECTED


def test_judge_tensors_evidence_over_other_rows_is_refused() -> None:
    right = answers()
    with pytest.raises(ProtocolError, match="drawn"):
        tensor_verdict(tensor_job(right), tensor_check(right, FIRST, (1, 3)))
    with pytest.raises(ProtocolError, match="ascending"):
        tensor_verdict(tensor_job(right, prefix=2, prefix_units=2), tensor_check(right, FIRST))


def test_opening_of_tensors_is_held_against_its_rows() -> None:
    assert open_evidence(DOMAIN, tensor_job(answers(), prefix=2, prefix_units=2).opening()).own_start == 2
    with pytest.raises(BadReceipt):
        open_evidence(DOMAIN, Job(PROVIDER, Task.INFER, tensors_to_proto(TENSORS), answers() * 2, 12, INFER_FP32).opening())
    with pytest.raises(ProtocolError):
        open_evidence(DOMAIN, Job(PROVIDER, Task.INFER, pb.TensorRequest(rows=6), answers(), 6, INFER_FP32).opening())
    with pytest.raises(ProtocolError):
        open_evidence(
            DOMAIN, Job(PROVIDER, Task.CHECK, pb.CheckRequest(infer=pb.TensorRequest(rows=2)), answers()[:2], 2, INFER_FP32).opening()
        )


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True).map(sorted))
def test_rows_that_a_check_repeats_are_found_again(drawn: list[int]) -> None:
    """Rows 0, 2 and 5 are equal: any of them stands for the others."""
    body = tensors_to_proto(TENSORS)
    found = drawn_by(body, check_of(body, drawn), 0, 6)
    assert check_of(body, found) == check_of(body, drawn) and list(found) == sorted(set(found))
    with pytest.raises(ProtocolError):
        drawn_by(body, check_of(body, [1, 0]), 2, 6)


def test_request_without_rows_is_checked_whole() -> None:
    one = tensors_to_proto(TensorRequest((Tensor("x", "UINT8", (2,), b"ab"),), (TensorSpec("y", "FP32", (2,)),), 0))
    assert drawn_by(one, check_of(one, (0,)), 0, 1) == (0,)
    output = [encode_item([np.zeros(2, np.float32)])]
    subject = Job(PROVIDER, Task.INFER, one, output, 1, INFER_FP32)
    checks = [Job(key, Task.CHECK, check_of(one, (0,)), [encode_item([np.ones(2, np.float32)])], 1, INFER_FP32) for key in (FIRST, SECOND)]
    assert tensor_verdict(subject, *checks, drawn=(0,)) is Verdict.REJECTED

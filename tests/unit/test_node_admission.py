"""Admission: each guard refuses what it is for, and an honest job passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from node_fixtures import (
    CHANNEL,
    CLIENT,
    NOW,
    PROVIDER,
    SCHEDULER,
    STRANGER,
    TOKEN,
    Channel,
    Job,
    embed_job,
    generate_job,
    house,
    on_sale,
    text_hash,
)

from gpumarket.core.errors import BadSignature, Busy, ChannelExpiring, GpumarketError, OutOfFunds, ProtocolError, UnknownModel
from gpumarket.core.terms import Lease, Task, keccak256, sampling_seed
from gpumarket.core.units import Hash, Money
from gpumarket.node.admission import Admitted, admit
from gpumarket.node.credit import OpenJob, Standing, exposure, require_credit, require_deposit
from gpumarket.node.work import EmbedWork, GenerateWork, ReplayWork
from gpumarket.v1 import provider_pb2 as pb
from gpumarket.v1 import terms_pb2 as terms

TEXT, VECTORS = on_sale(Task.GENERATE), on_sale(Task.EMBED)
NONCE = Hash(b"\x09" * 32)


def judge(message: pb.InferOpen, channel: Channel | None = None, now: int = NOW, **rules: Any) -> Admitted:
    return admit(message, house(TEXT, VECTORS, **rules), {CHANNEL: channel or Channel()}, NONCE, now)


def test_admission_of_an_honest_text_job_seeds_it_with_lease_and_nonce() -> None:
    job = generate_job(TEXT)
    work = judge(job.open()).work
    assert isinstance(work, GenerateWork)
    assert work.request.sampling.seed == sampling_seed(job.lease.struct_hash, NONCE)
    assert work.request.prompt == (1, 2, 3)


def test_admission_of_an_honest_embedding_job_passes() -> None:
    work = judge(embed_job(VECTORS).open()).work
    assert isinstance(work, EmbedWork)
    assert work.request.inputs == ((1, 2), (3, 4, 5))


LEASE_LIES: list[tuple[dict[str, Any], type[GpumarketError], str]] = [
    ({"provider": STRANGER.address}, ProtocolError, "this is"),
    ({"provider_channel": Hash(b"\x77" * 32)}, ProtocolError, "no confirmed channel"),
    ({"spec": Hash(b"\x77" * 32)}, ProtocolError, "lease's spec"),
    ({"job": Hash(b"\x77" * 32)}, ProtocolError, "lease's job"),
    ({"client": STRANGER.address}, ProtocolError, "lease's client"),
    ({"model": VECTORS.manifest.digest}, ProtocolError, "lease's model"),
    ({"task": Task.EMBED}, ProtocolError, "lease's task"),
    ({"profile": Hash(b"\x77" * 32)}, ProtocolError, "lease's profile"),
    ({"issued_at": NOW + 61}, ProtocolError, "61 s after now"),
    ({"issued_at": NOW - 61}, ProtocolError, "61 s before now"),
    ({"deadline": NOW}, ProtocolError, "passed 0 s ago"),
    ({"deadline": NOW + 601}, ProtocolError, "after the order's deadline"),
    ({"maximum": Money(2 * TOKEN)}, ProtocolError, "at most"),
    ({"maximum": Money(1)}, ProtocolError, "earns at most"),
    ({"prompt_price_per_mtok": Money(TEXT.prompt_price - 1)}, ProtocolError, "input tokens"),
    ({"output_price_per_mtok": Money(TEXT.output_price - 1)}, ProtocolError, "generated tokens"),
    ({"window_units": 65}, ProtocolError, "window of 65"),
    ({"prefix_units": 1}, ProtocolError, "continues from"),
    ({"prefix_hash": Hash(b"\x77" * 32)}, ProtocolError, "continues from"),
]


@pytest.mark.parametrize(("changes", "error", "match"), LEASE_LIES, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_admission_of_an_altered_lease_names_what_is_wrong(changes: dict[str, Any], error: type[GpumarketError], match: str) -> None:
    with pytest.raises(error, match=match):
        judge(generate_job(TEXT, lease_changes=changes).open())


@pytest.mark.parametrize("shift", [-60, 60])
def test_admission_of_a_lease_whose_date_clocks_explain_passes(shift: int) -> None:
    assert judge(generate_job(TEXT, lease_changes={"issued_at": NOW + shift}).open()).lease.issued_at == NOW + shift


def test_admission_of_a_lease_by_another_key_is_refused() -> None:
    with pytest.raises(BadSignature, match="the lease"):
        judge(generate_job(TEXT).open(lease_signer=STRANGER))


def test_admission_of_a_scheduler_without_channel_is_refused_although_it_signs_well() -> None:
    changes = {"scheduler": STRANGER.address}
    job = generate_job(TEXT, lease_changes=changes, spec_changes=changes)
    with pytest.raises(ProtocolError, match="no confirmed channel"):
        judge(job.open(lease_signer=STRANGER))


def test_admission_of_an_order_by_another_key_is_refused() -> None:
    with pytest.raises(BadSignature, match="the order"):
        judge(generate_job(TEXT).open(order_signer=STRANGER))


@pytest.mark.parametrize(
    ("channel", "error"),
    [
        (Channel(payee=STRANGER.address), ProtocolError),
        (Channel(payer=STRANGER.address, signer=STRANGER.address), ProtocolError),
        (Channel(closed=True), ChannelExpiring),
        (Channel(closes_at=NOW + 5), ChannelExpiring),
        (Channel(expires_at=NOW + 600 + 599), ChannelExpiring),
    ],
)
def test_admission_on_a_channel_that_cannot_pay_is_refused(channel: Channel, error: type[GpumarketError]) -> None:
    with pytest.raises(error):
        judge(generate_job(TEXT).open(), channel)


def test_admission_of_a_channel_signed_by_the_scheduler_for_a_cold_payer_passes() -> None:
    assert judge(generate_job(TEXT).open(), Channel(payer=STRANGER.address, signer=SCHEDULER.address)).lease.provider == PROVIDER.address


def test_admission_of_another_request_than_ordered_is_refused() -> None:
    message = generate_job(TEXT).open()
    message.request = generate_job(TEXT, prompt=(1, 2, 4)).request
    with pytest.raises(ProtocolError, match="salted hash"):
        judge(message)


def test_admission_of_a_request_whose_border_to_the_salt_was_moved_is_refused() -> None:
    """The two are hashed as one string: with another border the same hash would open to another request before the client's judges."""
    message = generate_job(TEXT).open()
    together = message.salt + message.request
    for cut in (31, 33):
        message.salt, message.request = together[:cut], together[cut:]
        with pytest.raises(ProtocolError, match="salted hash"):
            judge(message)


def test_admission_of_a_model_not_on_sale_names_it() -> None:
    other = on_sale(Task.GENERATE)
    other = replace(other, manifest=replace(other.manifest, licence="MIT"))
    with pytest.raises(UnknownModel):
        judge(generate_job(other).open())


@pytest.mark.parametrize(
    ("job", "match"),
    [
        (generate_job(TEXT, prompt_units=2), "states 2 input tokens, the request has 3"),
        (generate_job(TEXT, max_output_units=39), "wants 40 tokens"),
        (generate_job(TEXT, prompt=[1] * 500), "takes 512"),
        (embed_job(VECTORS, prompt_units=4), "the request has 5"),
        (embed_job(VECTORS, max_output_units=6), "output units"),
        (embed_job(VECTORS, [[7] * 513]), "takes 512"),
        (embed_job(VECTORS, prefix_units=1), "middle of an input"),
        (embed_job(VECTORS, prefix_units=5), "nothing is left"),
        (replace(embed_job(VECTORS), model=TEXT), "EMBED does not go with"),
    ],
)
def test_admission_of_a_request_that_the_order_does_not_cover_is_refused(job: Job, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        judge(job.open())


def test_admission_of_a_continued_text_checks_the_delivered_tokens() -> None:
    job = generate_job(TEXT, attempt=2, prefix=(0, 1, 2), prefix_units=3, prefix_hash=text_hash((0, 1, 2)))
    work = judge(job.open()).work
    assert isinstance(work, GenerateWork)
    assert work.request.prefix == (0, 1, 2)
    with pytest.raises(ProtocolError, match="continues from"):
        judge(replace(job, prefix=(0, 1, 3)).open())


def test_admission_of_a_continued_embedding_skips_what_was_delivered() -> None:
    work = judge(embed_job(VECTORS, attempt=2, prefix_units=2, prefix_hash=Hash(b"\x05" * 32)).open()).work
    assert isinstance(work, EmbedWork)
    assert work.request.inputs == ((3, 4, 5),)


def check_job(body: terms.CheckRequest, units: int, model: Any = TEXT) -> Job:
    return Job(model, Task.CHECK, body.SerializeToString(), units, units, 1_000)


def text_check(**changes: Any) -> terms.CheckRequest:
    body = terms.CheckRequest(
        generate=terms.GenerateRequest(prompt=[1, 2, 3], max_tokens=40, top_p_ppm=1_000_000),
        output=[4, 5],
        segments=[terms.SeedSegment(start=0, seed=b"\x01" * 32)],
    )
    for name, value in changes.items():
        body.ClearField(name)  # type: ignore[arg-type]
        getattr(body, name).extend(value)
    return body


def test_admission_of_checks_gives_the_work_of_both_kinds() -> None:
    work = judge(check_job(text_check(), 5).open()).work
    assert isinstance(work, ReplayWork)
    assert (work.output, work.segments[0].seed) == ((4, 5), b"\x01" * 32)
    body = terms.CheckRequest(embed=terms.EmbedRequest(inputs=[terms.TokenList(ids=[1, 2])]))
    assert isinstance(judge(check_job(body, 2, VECTORS).open()).work, EmbedWork)


@pytest.mark.parametrize(
    ("body", "units", "match"),
    [
        (text_check(segments=[]), 5, "segments"),
        (text_check(segments=[terms.SeedSegment(start=1, seed=b"\x01" * 32)]), 5, "segments"),
        (text_check(segments=[terms.SeedSegment(start=0, seed=b"\x01")]), 5, "32 bytes"),
        (text_check(output=[]), 3, "empty text"),
        (text_check(), 4, "the request has 5"),
        (terms.CheckRequest(), 1, "exactly one"),
    ],
)
def test_admission_of_a_malformed_check_is_refused(body: terms.CheckRequest, units: int, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        judge(check_job(body, units).open())


def test_admission_of_checks_where_none_are_taken_is_refused() -> None:
    with pytest.raises(ProtocolError, match="does not take checks"):
        judge(check_job(text_check(), 5).open(), checks=False)


def test_admission_of_bytes_that_are_no_term_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        judge(pb.InferOpen(lease=terms.SignedLease(lease=terms.Lease(job=b"short"))))


# --- credit --------------------------------------------------------------------------------------------------------------------


def lease(**changes: Any) -> Lease:
    return replace(generate_job(TEXT).lease, **changes)


def test_credit_exposure_of_a_text_is_its_prompt_and_one_window_rounded_up() -> None:
    changed = lease(prompt_price_per_mtok=Money(1), output_price_per_mtok=Money(3_000_000), window_units=8)
    assert exposure(changed, 3) == 25
    assert exposure(replace(changed, maximum=Money(10)), 3) == 10


def test_credit_over_the_limit_waits_for_payment() -> None:
    standing = Standing(unpaid={keccak256(b"a"): Money(60)}, paid=0)
    job = OpenJob(Money(100), Money(50))
    with pytest.raises(Busy) as refused:
        require_credit(standing, job, standing.limit(100, 1.0))
    assert refused.value.retry_after_seconds > 0
    standing.paid = 10
    require_credit(standing, job, standing.limit(100, 1.0))


def test_credit_shrinks_by_what_final_answers_left_out() -> None:
    job = OpenJob(Money(100), Money(50))
    require_credit(Standing(), job, 100)
    with pytest.raises(Busy):
        require_credit(Standing(short=51), job, 100)


def test_credit_deposit_covers_vouchers_bills_and_open_maxima() -> None:
    standing = Standing(unpaid={keccak256(b"a"): Money(20)})
    job, other = OpenJob(Money(40), Money(1)), OpenJob(Money(30), Money(1))
    require_deposit(standing, job, deposit=100, vouchered=10, open_here=[other])
    with pytest.raises(OutOfFunds, match="promised"):
        require_deposit(standing, job, deposit=99, vouchered=10, open_here=[other])


def test_admitted_job_counts_its_maximum_and_exposure() -> None:
    admitted = judge(generate_job(TEXT).open())
    assert admitted.open_job.maximum == TOKEN // 100
    assert 0 < admitted.open_job.exposure < admitted.open_job.maximum
    assert admitted.spec.client == CLIENT.address

"""Checked text jobs counted together: what no single check shows."""

import json

import pytest
from sqlalchemy import create_engine, insert

from gpumarket.core.codec import to_proto
from gpumarket.core.terms import Lease, Task
from gpumarket.core.units import ZERO_HASH, Address, Hash, Money
from gpumarket.sdk.constraints import Constraints
from gpumarket.sdk.pool import Observation, Pool, observations
from gpumarket.sdk.tables import ATTEMPTS, JOBS, METADATA
from gpumarket.settlement.verification import TEXT_BF16
from gpumarket.v1 import terms_pb2 as pb

HONEST, CHEAT = Address(b"\1" * 20), Address(b"\2" * 20)
PROFILE = TEXT_BF16.digest
INT8_MEAN_GAP = 0.00069
"""Measured median of int8 weights: most jobs lie inside the accept band."""
HONEST_MEAN_GAP = 0.00008


def seen(provider: Address, mean_gap: float, units: int = 128) -> Observation:
    return Observation(provider, PROFILE, mean_gap, units)


def test_pool_hidden_int8_is_distrusted_and_an_honest_provider_is_not() -> None:
    pool = Pool.of([seen(HONEST, HONEST_MEAN_GAP)] * 200 + [seen(CHEAT, INT8_MEAN_GAP)] * 12)
    assert pool.distrusted(PROFILE) == {CHEAT}
    assert pool.distrusted(ZERO_HASH) == frozenset()


def test_pool_one_job_alone_distrusts_nobody() -> None:
    assert not Pool.of([seen(CHEAT, 2.0)]).distrusted(PROFILE)


def test_pool_short_answers_are_joined() -> None:
    assert Pool.of([seen(CHEAT, INT8_MEAN_GAP, units=8)] * 12 * 16).distrusted(PROFILE) == {CHEAT}


def test_pool_unknown_profile_and_missing_statistic_count_nothing() -> None:
    pool = Pool.of([Observation(CHEAT, ZERO_HASH, 2.0, 128), seen(CHEAT, float("nan"))] * 50)
    assert not pool.distrusted(PROFILE) and not pool.distrusted(ZERO_HASH)


def test_constraints_leave_out_whom_the_pool_distrusts() -> None:
    made = Constraints(exclude_providers=(HONEST,)).to_proto({CHEAT, HONEST})
    assert list(made.exclude_providers) == [HONEST, CHEAT]


@pytest.mark.parametrize(("verdict", "counted"), [("accepted", 1), ("grey", 1), ("rejected", 0), ("unchecked", 0), ("", 0)])
def test_pool_is_replayed_from_the_journals_verdicts(verdict: str, counted: int) -> None:
    engine = create_engine("sqlite://")
    METADATA.create_all(engine)
    lease = Lease(
        job=ZERO_HASH, spec=ZERO_HASH, attempt=1, client=HONEST, scheduler=HONEST, provider=CHEAT, model=ZERO_HASH, task=Task.GENERATE,
        prompt_price_per_mtok=Money(0), output_price_per_mtok=Money(0), maximum=Money(0), fee_ppm=0, client_channel=ZERO_HASH,
        provider_channel=ZERO_HASH, profile=PROFILE, window_units=1, prefix_units=0, prefix_hash=ZERO_HASH, issued_at=0, deadline=0,
    )  # fmt: skip
    blank = {"order": b"", "request": b"", "salt": ZERO_HASH, "options": "{}", "finish_reason": "", "created_at": 0, "deadline": 0}
    money = {"max_amount": Money(0), "billed": Money(0)}
    judged = {"verdict": verdict, "verdict_json": json.dumps({"statistic": 0.5}), "will_check": True, "state": "done", "ended_at": 1}
    name = {"job": Hash(b"\7" * 32), "alias": "m", "purpose": "user", "task": int(Task.GENERATE), "channel": ZERO_HASH, "attempt": 1}
    signed = pb.SignedLease(lease=to_proto(lease, pb.Lease())).SerializeToString()
    attempt = {"number": 1, "provider": CHEAT, "lease": signed, "offer": b"", "reason": "", "detail": "", "units": 99, "amount": Money(0)}
    with engine.begin() as connection:
        connection.execute(insert(JOBS).values(name | judged | money | blank))
        connection.execute(insert(ATTEMPTS).values(attempt | {"job": name["job"]}))
        assert observations(connection) == [Observation(CHEAT, PROFILE, 0.5, 99)] * counted

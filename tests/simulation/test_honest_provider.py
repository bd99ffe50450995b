"""Who is paid, rejected, slashed: honest providers and gross cheats before checkers and panels; with faults, liars and the worst prompts.

The numbers are drawn from the measured distributions (`numbers`), the rules are the product's own (`court`).
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import scheduler_jobs
from reliability import record
from simulation import court, numbers

from gpumarket.scheduler import lifecycle as life
from gpumarket.scheduler.jobs import AttemptState, charged
from gpumarket.settlement.disputes import Outcome, Payout, Stakes
from gpumarket.settlement.verification import TEXT_BF16, Verdict

SEED = 20_260_101
JOBS = [pytest.param(500, id="500"), pytest.param(10_000, id="10000", marks=pytest.mark.slow)]
HARMED = (Outcome.SLASHED, Outcome.RESTITUTION)


def some_job(rng: random.Random, *, worst_of: int) -> court.Delivered:
    if rng.random() < 0.25:
        return court.embeddings(rng, rng.randint(1, 16))
    if rng.random() < 0.25:
        ties = rng.choice(numbers.real_ties())
        return court.text(rng, len(ties), ties=ties)
    return court.text(rng, rng.choice((16, 64, 129, 256)), worst_of=worst_of)


def conserved(payout: Payout, stakes: Stakes) -> None:
    """Nothing comes from nowhere: stake and bond and fees in, credits and the burned part out."""
    fees = sum(payout.fees.values())
    assert sum(payout.credited.values()) + payout.burned == payout.taken + stakes.bond + fees, (payout, stakes)
    assert payout.taken <= stakes.locked


def test_honest_numbers_drawn_here_are_those_that_were_measured() -> None:
    rng = random.Random(SEED)
    means, largest = [], 0.0
    for _ in range(200):
        gaps = numbers.honest_gaps(rng, 129, numbers.tie_rate(rng))
        means.append(float(np.minimum(gaps, 2.0).mean()))
        largest = max(largest, float(gaps.max()))
    assert 4e-5 < float(np.median(means)) < 1.6e-4
    assert 3e-4 < max(means) < 9.2e-4
    assert 0.02 < largest <= numbers.GAP_MAX + 1e-6


def test_real_decoders_ties_are_wider_than_those_drawn_and_never_gross() -> None:
    """What was measured once, and how far it is from the lines that a text is judged by."""
    texts = numbers.real_ties()
    assert len(texts) == 8 and all(len(gaps) >= TEXT_BF16.min_units for gaps in texts)
    largest, means = max(float(gaps.max()) for gaps in texts), [float(gaps.mean()) for gaps in texts]
    assert numbers.GAP_MAX < largest < TEXT_BF16.gross_gap_milli / 1e3
    assert max(means) < TEXT_BF16.reject_mean_gap_micro / 1e6 * 0.6
    record("near ties of a real decoder", 100, f"largest gap {largest:.3f}, largest mean {max(means):.1e}", "gap < 0.1, mean < 2e-3")


@pytest.mark.parametrize("jobs", JOBS)
@pytest.mark.timeout(1_800)
def test_honest_provider_is_never_rejected_nor_slashed(jobs: int) -> None:
    """Every job is checked and disputed, its prompt the worst of a hundred; a liar among the checkers, up to two in the panel; faults."""
    rng = random.Random(SEED)
    verdicts: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for index in range(jobs):
        job = some_job(rng, worst_of=numbers.TRIED)
        decision, rejected = court.checked(rng, job, hostile=rng.randint(0, 1))
        assert not rejected, f"seed {SEED}, job {index}: {decision}"
        assert decision is None or decision.verdict is not Verdict.REJECTED, f"seed {SEED}, job {index}: {decision}"
        verdicts[decision.verdict.name if decision else "UNCHECKED"] += 1
        payout, stakes = court.disputed(rng, job, hostile=rng.randint(0, 2))
        conserved(payout, stakes)
        assert payout.outcome not in HARMED and not payout.taken, f"seed {SEED}, job {index}: {payout}"
        outcomes[payout.outcome.name] += 1
    record("F47", jobs, f"rejected 0, slashed 0 ({dict(verdicts)}, {dict(outcomes)})", "rejected 0, slashed 0")


@pytest.mark.parametrize("hostile", [0, 1, 2])
@pytest.mark.parametrize("jobs", JOBS)
@pytest.mark.timeout(1_800)
def test_gross_cheat_is_slashed_and_never_paid_for_rejected_work(jobs: int, hostile: int) -> None:
    rng = random.Random(SEED + hostile)
    rejections = 0
    for index in range(jobs // 5):
        cheats = rng.choice([*numbers.GROSS_SHARES, "rows"])
        job = court.embeddings(rng, 8, cheats=True) if cheats == "rows" else court.text(rng, 256, cheats=cheats)
        payout, stakes = court.disputed(rng, job, hostile=hostile, silent=0.0)
        conserved(payout, stakes)
        expected = Outcome.SLASHED if hostile <= 1 else Outcome.RESTITUTION
        assert payout.outcome is expected, f"seed {SEED + hostile}, job {index}, {cheats}: {payout}"
        assert payout.credited[court.CLIENT] >= court.AMOUNT, "the victim is made whole"
        assert payout.burned * 2 >= payout.taken, "half of what is taken is burned"
        decision, rejected = court.checked(rng, job, hostile=0)
        if decision is not None and rejected:
            rejections += 1
    assert rejections > jobs // 5 * 0.9, "two of three honest checkers are nearly always heard"
    bar = "slashed with up to 1 hostile of 5, restitution with 2"
    record(f"gross cheat, {hostile} hostile of 5", jobs // 5, "restitution" if hostile == 2 else "slashed", bar)


def test_rejected_attempt_costs_its_client_nothing_and_pays_nothing() -> None:
    job, _ = scheduler_jobs.leased()
    job, _ = scheduler_jobs.claim(job, scheduler_jobs.ack_of(job, scheduler_jobs.UNITS, complete=True, will_check=True))
    held = charged(job.newest)
    assert held > 0
    job, moves = life.reject(job, 1, "two checks agree")
    assert (job.newest.state, job.newest.amount, job.spent) == (AttemptState.REJECTED, 0, 0)
    sides = {m.side: m.amount for m in moves if isinstance(m, life.Move)}
    assert sides[life.Side.RETURN] == held
    assert life.Side.PAY not in sides and life.Side.OWE not in sides
    assert life.claim(job, 1, scheduler_jobs.receipt_of(job, 100), None, (b"", b""), 10**6, 60) == (job, [])


@pytest.mark.parametrize("hostile", [0, 1, 2])
def test_slashing_oneself_always_loses_money(hostile: int) -> None:
    """Provider, challenger, client and the whole panel are one person: it gets back less than it put in."""
    rng = random.Random(SEED)
    for _ in range(50):
        payout, stakes = court.disputed(rng, court.text(rng, 256, cheats="another model"), hostile=hostile)
        ours = sum(payout.credited.values()) - stakes.bond - sum(payout.fees.values())
        assert ours - payout.taken <= -payout.taken // 2
        assert payout.outcome not in HARMED or ours < payout.taken


def test_honest_provider_before_three_hostile_members_pays_restitution() -> None:
    """What is not promised: who holds three of five seats takes the amount, never the stake."""
    rng = random.Random(SEED)
    payout, stakes = court.disputed(rng, court.text(rng, 256), hostile=3, silent=0.0)
    assert payout.outcome is Outcome.RESTITUTION
    assert payout.taken < stakes.locked

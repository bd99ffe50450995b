"""One delivered job before its judges: the client's checkers, and the dispute's panel of five, with the product's own rules.

Here a fault of network or chain is a checker that does not answer, or a member whose commit or reveal does not make it into a
block in time: a no-show, whatever it would have said. Whole disputes under such faults: `test_honest_disputes`. A hostile member
says what hurts most.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import sdk_terms
from simulation import numbers

from gpumarket.contracts.dispute_terms import DisputeTerms
from gpumarket.core.terms import JobSpec, Lease, Outcome, Receipt, Task, VerificationProfile, keccak256, sampling_seed
from gpumarket.core.units import ZERO_HASH, Address, Hash
from gpumarket.sdk.panel import Panel
from gpumarket.settlement.disputes import NUMBER_MAX, PANEL_SIZE, Payout, Shares, Stakes, bound, lock_and_bond, number, settle
from gpumarket.settlement.verification import EMBED_FP32, TEXT_BF16, Decision, Evidence, Verdict, judge
from gpumarket.v1 import terms_pb2 as pb

TERMS = DisputeTerms()
SHARES = Shares(
    TERMS.panel_fee,
    TERMS.no_show_fee,
    TERMS.bond_minimum,
    TERMS.lock_minimum,
    TERMS.bond_ppm,
    TERMS.amount_bond_ppm,
    TERMS.burn_ppm,
    TERMS.challenger_ppm,
    TERMS.slash_multiple,
    TERMS.victim_multiple,
)
MEMBERS = [Address(keccak256(b"member %d" % i)[:20]) for i in range(PANEL_SIZE)]
CHECKERS = [Address(keccak256(b"checker %d" % i)[:20]) for i in range(3)]
CHALLENGER, CLIENT = Address(keccak256(b"challenger")[:20]), Address(keccak256(b"victim")[:20])
AMOUNT = 10**18
SILENT = 0.1
"""Chance that a fault keeps a checker or a member from being heard."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """A job's evidence, and how its numbers come out elsewhere. `rate`: of near ties, for an honest text; None for a gross cheat."""

    evidence: Evidence
    rate: float | None
    shares: tuple[float, float] = (0.0, 0.0)
    truth: numbers.Gaps | None = None
    ties: numbers.Gaps | None = None
    """What a real decoder found for this honest text."""

    def computed(self, rng: random.Random) -> tuple[bytes, ...]:
        """What an honest checker's engine gives: rows, or one item of gaps."""
        if self.truth is not None:
            return numbers.as_items(numbers.near(rng, self.truth))
        if self.ties is not None:
            return (self.ties.tobytes(),)
        tokens = len(self.evidence.output)
        gaps = numbers.gross_gaps(rng, tokens, self.shares) if self.rate is None else numbers.honest_gaps(rng, tokens, self.rate)
        return (gaps.tobytes(),)


def text(rng: random.Random, tokens: int, *, cheats: str = "", worst_of: int = 1, ties: numbers.Gaps | None = None) -> Delivered:
    """A text. `cheats` names a row of `numbers.GROSS_SHARES`; `ties` are its gaps where they were measured."""
    request = pb.GenerateRequest(prompt=[1, 2, 3], max_tokens=tokens)
    evidence = _evidence(Task.GENERATE, request, tuple(i.to_bytes(4, "little") for i in range(tokens)), 3, tokens)
    if cheats:
        return Delivered(evidence, None, numbers.GROSS_SHARES[cheats])
    return Delivered(evidence, numbers.tie_rate(rng, worst_of=worst_of), ties=ties)


def embeddings(rng: random.Random, count: int, *, cheats: bool = False) -> Delivered:
    """Rows for so many texts of one token."""
    truth = numbers.rows(count)
    given = numbers.off(rng, truth) if cheats else numbers.near(rng, truth)
    request = pb.EmbedRequest(inputs=[pb.TokenList(ids=[i + 1]) for i in range(count)])
    return Delivered(_evidence(Task.EMBED, request, numbers.as_items(given), count, count), 0.0, truth=truth)


def checked(rng: random.Random, job: Delivered, *, hostile: int, silent: float = SILENT) -> tuple[Decision | None, bool]:
    """The client's verdict after up to three checkers, `hostile` of them lying; and whether a scheduler takes its rejection.

    None when nobody answered: accepted for lack of evidence.
    """
    subject = job.evidence
    drawn = tuple(range(len(subject.output))) if subject.lease.task is Task.EMBED else ()
    panel = Panel(_profile(subject), subject, drawn, lambda who: who)
    for index, checker in enumerate(rng.sample(CHECKERS, len(CHECKERS))):
        if panel.answers and panel.settled:
            break
        if rng.random() < silent:
            continue
        answer = _lie(job) if index < hostile else job.computed(rng)
        panel = replace(panel, answers=(*panel.answers, _check(subject, checker, answer, drawn)))
    if not panel.answers:
        return None, False
    decision, rests_on = panel.decide()
    if decision.verdict is not Verdict.REJECTED:
        return decision, False
    again = judge(panel.profile, subject, [panel.answers[i] for i in rests_on], drawn, lambda who: who)
    return decision, again.verdict is Verdict.REJECTED


def disputed(rng: random.Random, job: Delivered, *, hostile: int, silent: float = SILENT, slashable: bool = True) -> tuple[Payout, Stakes]:
    """The end of a dispute over the job: `hostile` members say what harms the truth, the honest ones what they computed."""
    profile, subject = _profile(job.evidence), job.evidence
    locked, bond = lock_and_bond(SHARES, AMOUNT, 10**24)
    stakes = Stakes(subject.lease.provider, CHALLENGER, CLIENT, AMOUNT, locked, bond, slashable)
    members = rng.sample(MEMBERS, PANEL_SIZE)
    revealed, no_shows = dict[Address, int](), list[Address]()
    for index, member in enumerate(members):
        if index < hostile:
            revealed[member] = 0 if _is_cheat(job) else NUMBER_MAX
        elif rng.random() < silent:
            no_shows.append(member)
        else:
            revealed[member] = number(profile, subject, job.computed(rng))
    return settle(SHARES, stakes, bound(profile), revealed, no_shows), stakes


def _is_cheat(job: Delivered) -> bool:
    if job.truth is None:
        return job.rate is None
    given = np.array([np.frombuffer(row, dtype="<f4") for row in job.evidence.output])
    return bool(np.abs(given - job.truth).max() > 1e-5)


def _lie(job: Delivered) -> tuple[bytes, ...]:
    """A hostile checker's numbers: against honest work, or for a cheat's."""
    if job.truth is not None:
        return job.evidence.output if _is_cheat(job) else numbers.as_items(job.truth + np.float32(0.5))
    gap = 0.0 if _is_cheat(job) else 3.0
    return (np.full(len(job.evidence.output), gap, dtype="<f4").tobytes(),)


def _profile(subject: Evidence) -> VerificationProfile:
    return EMBED_FP32 if subject.lease.task is Task.EMBED else TEXT_BF16


def _evidence(task: Task, request: pb.EmbedRequest | pb.GenerateRequest, output: tuple[bytes, ...], units: int, most: int) -> Evidence:
    profile = (EMBED_FP32 if task is Task.EMBED else TEXT_BF16).digest
    spec = sdk_terms.spec(task, units=units, output=most, profile=profile)
    lease = sdk_terms.lease(spec)
    nonce = Hash(keccak256(lease.struct_hash))
    return Evidence(lease, spec, _receipt(lease, nonce, spec, len(output)), request, output)


def _check(subject: Evidence, checker: Address, answer: tuple[bytes, ...], drawn: Sequence[int]) -> Evidence:
    lease = replace(subject.lease, provider=checker, task=Task.CHECK)
    if drawn:
        assert isinstance(subject.request, pb.EmbedRequest)
        request = pb.CheckRequest(embed=pb.EmbedRequest(inputs=[subject.request.inputs[i] for i in drawn]))
    else:
        assert isinstance(subject.request, pb.GenerateRequest)
        seed = sampling_seed(subject.lease.struct_hash, subject.receipt.nonce)
        tokens = [int.from_bytes(item, "little") for item in subject.output]
        request = pb.CheckRequest(generate=subject.request, output=tokens, segments=[pb.SeedSegment(start=0, seed=seed)])
    return Evidence(lease, subject.spec, subject.receipt, request, answer)


def _receipt(lease: Lease, nonce: Hash, spec: JobSpec, units: int) -> Receipt:
    return Receipt(lease.struct_hash, nonce, spec.request_hash, ZERO_HASH, 0, ZERO_HASH, spec.prompt_units, units, Outcome.COMPLETED, 1)

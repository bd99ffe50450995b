"""What a rejection must show, recomputed here from the openings with the same functions that the client ran. Pure."""

from __future__ import annotations

from collections.abc import Callable

from gpumarket.core.errors import ProtocolError
from gpumarket.core.signing import Domain
from gpumarket.core.units import Address
from gpumarket.scheduler.lifecycle import Job
from gpumarket.settlement.verification import PROFILES, Decision, Evidence, drawn_by, judge, open_evidence
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import terms_pb2

CHECKS_MAX = 4
ITEMS_MAX = 65_536
"""Output items of one opening: three times the rows of all-MiniLM-L6-v2 that a message can hold. They cost 4 µs each to recompute."""


def judge_report(domain: Domain, job: Job, number: int, request: pb.ReportRequest, owner_of: Callable[[Address], Address]) -> Decision:
    """The verdict that the evidence carries: REJECTED by two agreeing checks, GREY by one, ACCEPTED when a check agrees with the subject.

    Raises ProtocolError, BadSignature or VerificationError for evidence that is none.
    """
    attempt = job.attempt(number)
    if not 1 <= len(request.checks) <= CHECKS_MAX:
        raise ProtocolError(f"a rejection rests on 1 to {CHECKS_MAX} checks, not on {len(request.checks)}")
    if any(len(opening.output) > ITEMS_MAX for opening in (request.subject, *request.checks)):
        raise ProtocolError(f"an opening of more than {ITEMS_MAX} items", hint="results that large are checked and not reported")
    subject = open_evidence(domain, request.subject)
    if subject.lease.struct_hash != attempt.hash:
        raise ProtocolError("the opened result is not the attempt that is reported")
    checks = [open_evidence(domain, opening) for opening in request.checks]
    for check in checks:
        if check.lease.scheduler != subject.lease.scheduler or check.lease.client != subject.lease.client:
            raise ProtocolError("a check that was not bought by this client on this market")
    profile = PROFILES.get(attempt.lease.profile)
    if profile is None:
        raise ProtocolError("the job's verification profile is not known here")
    return judge(profile, subject, checks, drawn_of(subject, checks), owner_of)


def drawn_of(subject: Evidence, checks: list[Evidence]) -> tuple[int, ...]:
    """Indices of the inputs or rows that the checks repeat, ascending; empty for text."""
    jobs = [e for e in (subject, *checks) if isinstance(e.request, terms_pb2.EmbedRequest | terms_pb2.TensorRequest)]
    replays = [e for e in (subject, *checks) if isinstance(e.request, terms_pb2.CheckRequest)]
    if not jobs or not replays:
        return ()
    request, replay = jobs[0].request, replays[0].request
    assert isinstance(request, terms_pb2.EmbedRequest | terms_pb2.TensorRequest)
    assert isinstance(replay, terms_pb2.CheckRequest)
    return drawn_by(request, replay, jobs[0].own_start, len(jobs[0].output))  # what was not delivered cannot have been checked

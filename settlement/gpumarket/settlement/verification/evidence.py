"""What a rejection must show, and what follows from it: client and scheduler run these same functions on the same openings.

An opening is what a job's hashes stand for. `open_evidence` takes nothing on trust: lease, order and receipt are signed by whom they name
and belong together, request and output are those that the hashes promise, and the units billed are the units delivered. `judge` then
compares numbers. A provider is rejected only by two checks of different owners that agree with each other; one alone makes it grey.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gpumarket.core.codec import open_lease, open_order, open_receipt, parse
from gpumarket.core.errors import BadReceipt, ProtocolError
from gpumarket.core.seeds import drawing_seed
from gpumarket.core.signing import Domain
from gpumarket.core.tensor_requests import from_bytes, from_proto
from gpumarket.core.terms import JobSpec, Lease, Receipt, Task, VerificationProfile, opens_request, output_chain
from gpumarket.core.units import Address
from gpumarket.settlement.verification.decide import Decision, Verdict, decide_items, decide_text
from gpumarket.settlement.verification.subset import check_of
from gpumarket.v1 import market_pb2 as mpb
from gpumarket.v1 import terms_pb2 as pb

Request = pb.EmbedRequest | pb.GenerateRequest | pb.TensorRequest | pb.CheckRequest
CHECKS_TO_REJECT = 2


@dataclass(frozen=True, slots=True)
class Evidence:
    """An opened job: its signed terms, the request, and every item of the output chain, earlier attempts' included."""

    lease: Lease
    spec: JobSpec
    receipt: Receipt
    request: Request
    output: tuple[bytes, ...]

    @property
    def own_start(self) -> int:
        """Index of the first output item that this attempt delivered itself."""
        if self.lease.task is Task.EMBED:
            assert isinstance(self.request, pb.EmbedRequest)
            return _items_within(self.request, self.lease.prefix_units)
        return self.lease.prefix_units if self.lease.task in (Task.GENERATE, Task.INFER) else 0


def open_evidence(domain: Domain, opening: mpb.Opening) -> Evidence:
    """Raises BadSignature, ProtocolError (parts that do not belong together) or BadReceipt (a receipt that states what is not so)."""
    lease = open_lease(domain, opening.lease)
    spec, _ = open_order(domain, opening.order)
    receipt = open_receipt(domain, opening.receipt, lease.provider)
    if (lease.spec, lease.job, lease.task, lease.model) != (spec.struct_hash, spec.key, spec.task, spec.model):
        raise ProtocolError("the opening's order is not the one that its lease was made for")
    if receipt.lease != lease.struct_hash:
        raise ProtocolError("the opening's receipt belongs to another lease")
    if not opens_request(opening.salt, opening.request, spec.request_hash):
        raise ProtocolError("the opening's request is not the one that was ordered")
    evidence = Evidence(lease, spec, receipt, _request(spec.task, opening.request), tuple(opening.output))
    _check_receipt(evidence)
    return evidence


def judge(
    profile: VerificationProfile,
    subject: Evidence,
    checks: Sequence[Evidence],
    drawn: Sequence[int],
    owner_of: Callable[[Address], Address],
) -> Decision:
    """The verdict on `subject` by independent evidence.

    `drawn` are the indices of the subject's inputs or rows that were checked (EMBED, INFER; empty otherwise). A subject that is itself a
    CHECK is judged by other CHECK jobs over the same request and by the job that it checked. Raises ProtocolError for evidence that does
    not bear on the subject or is not independent of it.
    """
    if subject.lease.profile != profile.digest:
        raise ProtocolError("the subject was leased under another verification profile")
    _require_independent(subject, checks, owner_of)
    against: list[tuple[Evidence, Decision]] = []
    for check in checks:
        decision = _compare(profile, subject, check, drawn)
        if decision.verdict is not Verdict.REJECTED:
            return decision  # the subject and this check agree: whoever differs from both is in the minority
        against.append((check, decision))
    if not against:
        raise ProtocolError("a rejection needs the check jobs that it rests on")
    first, decision = against[0]
    agreeing = 1 + sum(_agree(profile, subject, first, other, drawn) for other, _ in against[1:])
    if agreeing < CHECKS_TO_REJECT:
        return Decision(
            Verdict.GREY, decision.statistic, f"{agreeing} check against the result, {CHECKS_TO_REJECT} reject it: {decision.reason}"
        )
    return Decision(Verdict.REJECTED, decision.statistic, f"{agreeing} checks agree: {decision.reason}")


# --- the opening's parts -------------------------------------------------------------------------------------------------------


def _request(task: Task, raw: bytes) -> Request:
    if task is Task.GENERATE:
        return parse(pb.GenerateRequest, raw)
    if task is Task.EMBED:
        return parse(pb.EmbedRequest, raw)
    if task is Task.INFER:
        from_bytes(raw)  # whole, or refused
        return parse(pb.TensorRequest, raw)
    check = parse(pb.CheckRequest, raw)
    if check.HasField("infer"):
        from_proto(check.infer)
    return check


def _check_receipt(evidence: Evidence) -> None:
    lease, receipt, request, output = evidence.lease, evidence.receipt, evidence.request, evidence.output
    if receipt.request_hash != evidence.spec.request_hash:
        raise BadReceipt("the receipt names another request")
    if (receipt.prefix_units, receipt.prefix_hash) != (lease.prefix_units, lease.prefix_hash):
        raise BadReceipt("the receipt names another prefix than the lease")
    if output_chain(output) != receipt.output_hash:
        raise BadReceipt("the output is not the one that the receipt's hash stands for")
    if isinstance(request, pb.GenerateRequest | pb.TensorRequest):
        units = len(output)
    elif isinstance(request, pb.EmbedRequest):
        units = sum(len(item.ids) for item in request.inputs[: len(output)])
    else:
        units = _check_units(request)
    if len(output) > _items_allowed(request) or units != receipt.prefix_units + receipt.output_units:
        raise BadReceipt(f"the receipt bills {receipt.prefix_units} + {receipt.output_units} units, delivered are {units}")
    if output_chain(output[: evidence.own_start]) != lease.prefix_hash:
        raise BadReceipt("the output does not continue the prefix that the lease names")


def _check_units(request: pb.CheckRequest) -> int:
    if request.embed.inputs:
        return sum(len(item.ids) for item in request.embed.inputs)
    if request.HasField("infer"):
        return max(1, request.infer.rows)
    return len(request.generate.prompt) + len(request.output)


def _items_allowed(request: Request) -> int:
    if isinstance(request, pb.GenerateRequest):
        return request.max_tokens
    if isinstance(request, pb.EmbedRequest):
        return len(request.inputs)
    if isinstance(request, pb.TensorRequest):
        return max(1, request.rows)
    return len(request.embed.inputs) or max(1, request.infer.rows)


def _items_within(request: pb.EmbedRequest, units: int) -> int:
    """How many leading inputs `units` tokens cover. Raises ProtocolError when they end inside one."""
    for index, item in enumerate(request.inputs):
        if units <= 0:
            return index if units == 0 else _raise_split()
        units -= len(item.ids)
    return len(request.inputs) if units == 0 else _raise_split()


def _raise_split() -> int:
    raise ProtocolError("the lease's prefix ends inside an input")


# --- numbers -------------------------------------------------------------------------------------------------------------------


def _require_independent(subject: Evidence, checks: Sequence[Evidence], owner_of: Callable[[Address], Address]) -> None:
    owners = [owner_of(e.lease.provider) for e in (subject, *checks)]
    if len(set(owners)) != len(owners):
        raise ProtocolError("the checks are not of different owners, or are the subject's own")
    for check in checks:
        if (check.lease.model, check.lease.scheduler) != (subject.lease.model, subject.lease.scheduler):
            raise ProtocolError("a check job of another model or another scheduler")


def _compare(profile: VerificationProfile, subject: Evidence, check: Evidence, drawn: Sequence[int]) -> Decision:
    """REJECTED when the two do not agree about the work of `subject`."""
    if _by_item(subject):
        return decide_items(profile, _rows(subject, check, subject, drawn), _rows(subject, check, check, drawn))
    theirs = decide_text(profile, _gaps(subject, check))
    if subject.lease.task is Task.GENERATE:
        return theirs
    own = decide_text(profile, _gaps(subject, subject))
    if own.accepted == theirs.accepted:
        return Decision(Verdict.ACCEPTED, own.statistic, f"both checkers say the same: {own.reason}")
    return Decision(Verdict.REJECTED, own.statistic, f"the checker found {own.reason}; the other {theirs.reason}")


def _agree(profile: VerificationProfile, subject: Evidence, first: Evidence, other: Evidence, drawn: Sequence[int]) -> bool:
    if not _by_item(subject):
        return True  # both contradict the subject, and there are only two things to say
    return decide_items(profile, _rows(subject, first, first, drawn), _rows(subject, other, other, drawn)).accepted


def _by_item(subject: Evidence) -> bool:
    """Whether the answer has an item for each input or row, so that some of them can be checked."""
    request = subject.request
    if isinstance(request, pb.CheckRequest):
        return request.HasField("infer") or bool(request.embed.inputs)
    return isinstance(request, pb.EmbedRequest | pb.TensorRequest)


def _rows(subject: Evidence, check: Evidence, wanted: Evidence, drawn: Sequence[int]) -> tuple[bytes, ...]:
    """`wanted`'s rows for the inputs that `subject` and `check` share; refuses a check over other inputs."""
    job, replay = (check, subject) if check.lease.task in (Task.EMBED, Task.INFER) else (subject, check)
    if not isinstance(replay.request, pb.CheckRequest):
        raise ProtocolError("a check that is no CHECK job")
    if isinstance(job.request, pb.CheckRequest):
        if job.request != replay.request:
            raise ProtocolError("two checks over different requests")
        return wanted.output
    assert isinstance(job.request, pb.EmbedRequest | pb.TensorRequest)
    _require_drawn(job, drawn)
    if check_of(job.request, drawn) != replay.request:
        raise ProtocolError("the check's inputs are not the ones that were drawn")
    return tuple(job.output[i] for i in drawn) if wanted is job else wanted.output


def _require_drawn(job: Evidence, drawn: Sequence[int]) -> None:
    if not drawn or list(drawn) != sorted(set(drawn)) or drawn[0] < job.own_start or drawn[-1] >= len(job.output):
        raise ProtocolError("the drawn inputs are not ascending indices of what this attempt delivered")


def _gaps(subject: Evidence, check: Evidence) -> bytes:
    """The check's gaps for the tokens of `subject`; for a witness that is the checked job itself, the gaps it stands for: none."""
    if check is subject or isinstance(check.request, pb.CheckRequest):
        _require_replay(subject, check)
        raw = check.output[0] if check.output else b""
        assert isinstance(check.request, pb.CheckRequest)
        if len(raw) != 4 * len(check.request.output):
            return b""  # no gaps: decide_text calls that a mismatch
        return raw[4 * subject.own_start :]
    if not isinstance(subject.request, pb.CheckRequest):
        raise ProtocolError("a check that is no CHECK job")
    if check.request != subject.request.generate or [int.from_bytes(t, "little") for t in check.output] != list(subject.request.output):
        raise ProtocolError("the check was not over this job's request and output")
    return np.zeros(max(1, len(subject.request.output)), dtype="<f4").tobytes()


def _require_replay(subject: Evidence, check: Evidence) -> None:
    """A CHECK over the subject's own request, tokens and seed."""
    request = check.request
    assert isinstance(request, pb.CheckRequest)
    if isinstance(subject.request, pb.CheckRequest):
        if request != subject.request:
            raise ProtocolError("two checks over different requests")
        return
    tokens = [int.from_bytes(item, "little") for item in subject.output]
    if request.generate != subject.request or list(request.output) != tokens:
        raise ProtocolError("the check is not over the subject's request and output")
    last = request.segments[-1] if request.segments else pb.SeedSegment()
    assert isinstance(subject.request, pb.GenerateRequest)
    seed = drawing_seed(subject.request, subject.lease.struct_hash, subject.receipt.nonce)
    if (last.start, last.seed) != (subject.lease.prefix_units, seed):
        raise ProtocolError("the check did not replay the subject's seed")

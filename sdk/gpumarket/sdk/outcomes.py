"""Results from the journal: what a purchase returns and what `resume` returns is built by the same lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from sqlalchemy import Connection

from gpumarket.core.codec import from_proto
from gpumarket.core.errors import JournalError
from gpumarket.core.tensor_requests import from_bytes
from gpumarket.core.tensors import join_items
from gpumarket.core.terms import Lease, Receipt, Task
from gpumarket.core.units import Hash, Money
from gpumarket.sdk import store
from gpumarket.sdk.buying import Bought
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.openings import Delivered, delivered
from gpumarket.sdk.requests import warnings_from_json
from gpumarket.sdk.results import AttemptRecord, ChatResult, EmbedResult, InferResult, JobResult, Usage
from gpumarket.sdk.tokens import TextCodec


def build(desk: Desk, bought: Bought, codec: TextCodec | None) -> JobResult:
    """The result of a purchase. `codec` decodes text (GENERATE)."""
    job, attempts, evidence = desk.journal.read(
        lambda c: (store.load_job(c, bought.job), store.load_attempts(c, bought.job), delivered(c, bought.job))
    )
    if job is None:
        raise JournalError(f"job 0x{bought.job.hex()} is not in this journal")
    receipt = from_proto(Receipt, evidence.opening.receipt.receipt)
    shared: dict[str, Any] = {
        "job": job.job,
        "model": job.alias,
        "provider": evidence.provider,
        "receipt": receipt,
        "signed_receipt": evidence.opening.receipt,
        "lease": from_proto(Lease, evidence.opening.lease.lease),
        "verdict": bought.verdict,
        "cost": job.billed,
        "check_cost": bought.check_cost,
        "usage": Usage(job.spec.prompt_units, len(evidence.output) if job.task is Task.GENERATE else 0),
        "attempts": tuple(AttemptRecord(a.number, a.lease.provider, a.reason, a.detail, a.units, a.amount) for a in attempts),
        "rejected": bought.rejected,
        "warnings": warnings_from_json(job.options.get("warnings", ())),
        "explanation": bought.explanation,
    }
    if job.task is Task.GENERATE:
        return _text(shared, evidence, job, codec)
    if job.task is Task.INFER:
        asked = from_bytes(job.request)
        return InferResult(outputs=join_items(asked.outputs, bool(asked.rows), evidence.output), **shared)
    vectors = np.frombuffer(b"".join(evidence.output), dtype="<f4").reshape(len(evidence.output), -1)
    return EmbedResult(vectors=vectors, **shared)


def _text(shared: dict[str, Any], evidence: Delivered, job: store.StoredJob, codec: TextCodec | None) -> ChatResult:
    assert codec is not None, "text needs its tokenizer"
    tokens = tuple(int.from_bytes(item, "little") for item in evidence.output)
    stop = frozenset(plan_stop_tokens(job.request))
    shown = tokens[:-1] if tokens and tokens[-1] in stop else tokens
    return ChatResult(text=codec.decode(shown), tokens=tokens, finish_reason="stop" if len(shown) < len(tokens) else "length", **shared)


def plan_stop_tokens(request: bytes) -> tuple[int, ...]:
    """Stop tokens of a GENERATE request."""
    from gpumarket.core.codec import parse
    from gpumarket.v1 import terms_pb2 as pb

    return tuple(parse(pb.GenerateRequest, request).stop_tokens)


def spent_on_checks(connection: Connection, jobs: Iterable[Hash]) -> Money:
    """What the checks of jobs cost."""
    checks = [key for job in jobs for key in store.children(connection, job, "check")]
    return Money(sum(found.billed for key in checks if (found := store.load_job(connection, key))))

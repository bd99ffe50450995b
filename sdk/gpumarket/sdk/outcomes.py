"""Results from the journal: what a purchase returns and what `resume` returns is built by the same lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from sqlalchemy import Connection

from gpumarket.core.codec import from_proto, parse
from gpumarket.core.errors import JournalError
from gpumarket.core.tensor_requests import from_bytes
from gpumarket.core.tensors import join_items
from gpumarket.core.terms import Receipt, Task
from gpumarket.core.units import Hash, Money
from gpumarket.sdk import store
from gpumarket.sdk.buying import Bought
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.reading import readable
from gpumarket.sdk.requests import warnings_from_json
from gpumarket.sdk.results import AttemptRecord, ChatResult, EmbedResult, InferResult, JobResult, LogprobsLost, StreamEnd, Usage
from gpumarket.sdk.stopping import before_stop
from gpumarket.sdk.tokens import TextCodec
from gpumarket.v1 import terms_pb2 as pb

_OUTCOMES = {"delivered": "completed", "done": "completed", "cancelled": "cancelled", "rejected": "rejected"}
"""Of a stream, by the state of its job; every other one is a failure to whoever read it."""


def build(desk: Desk, bought: Bought, codec: TextCodec | None) -> JobResult:
    """The result of a purchase. `codec` decodes text (GENERATE)."""
    job, attempts, output = _read(desk, bought.job)
    if not attempts or not job.request:
        raise JournalError(f"job 0x{job.job.hex()} has no delivered result in this journal")
    last = attempts[-1]
    shared: dict[str, Any] = {
        "job": job.job,
        "model": job.alias,
        "provider": last.lease.provider,
        "receipt": _receipt(last),
        "signed_receipt": last.signed_receipt,
        "lease": last.lease,
        "verdict": bought.verdict,
        "cost": job.billed,
        "check_cost": bought.check_cost,
        "usage": _usage(job, output),
        "attempts": tuple(AttemptRecord(a.number, a.lease.provider, a.reason, a.detail, a.units, a.amount) for a in attempts),
        "rejected": bought.rejected,
        "warnings": warnings_from_json(job.options.get("warnings", ())),
        "explanation": bought.explanation,
    }
    if job.task is Task.GENERATE:
        return _text(shared, output, job, bought, codec)
    if job.task is Task.INFER:
        asked = from_bytes(job.request)
        return InferResult(outputs=join_items(asked.outputs, bool(asked.rows), output), **shared)
    vectors = np.frombuffer(b"".join(output), dtype="<f4").reshape(len(output), -1)
    counts = tuple(len(each.ids) for each in parse(pb.EmbedRequest, job.request).inputs)
    return EmbedResult(vectors=vectors, input_tokens=counts, **shared)


def end_of(desk: Desk, key: Hash) -> StreamEnd:
    """How a job ended, whatever became of it."""
    job, attempts, output = _read(desk, key)
    last = attempts[-1] if attempts else None
    return StreamEnd(
        outcome=_OUTCOMES.get(job.state, "failed"),
        job=key,
        provider=last.lease.provider if last else None,
        usage=_usage(job, output),
        units=len(output),
        cost=job.billed,
        receipt=_receipt(last) if last else None,
        signed_receipt=last.signed_receipt if last else None,
        finish_reason=job.finish_reason,
    )


def _read(desk: Desk, key: Hash) -> tuple[store.StoredJob, list[store.StoredAttempt], list[bytes]]:
    job, attempts, output = desk.journal.read(
        lambda c: (store.load_job(c, key), store.load_attempts(c, key), list(store.load_output(c, key)))
    )
    if job is None:
        raise JournalError(f"job 0x{key.hex()} is not in this journal")
    return job, attempts, output


def _receipt(attempt: store.StoredAttempt) -> Receipt | None:
    return from_proto(Receipt, attempt.signed_receipt.receipt) if attempt.signed_receipt is not None else None


def _usage(job: store.StoredJob, output: list[bytes]) -> Usage:
    return Usage(job.spec.prompt_units, len(output) if job.task is Task.GENERATE else 0)


def _text(shared: dict[str, Any], output: list[bytes], job: store.StoredJob, bought: Bought, codec: TextCodec | None) -> ChatResult:
    assert codec is not None, "text needs its tokenizer"
    tokens = tuple(int.from_bytes(item, "little") for item in output)
    request = parse(pb.GenerateRequest, job.request)
    shown = tokens[:-1] if tokens and tokens[-1] in frozenset(request.stop_tokens) else tokens
    text, stopped = before_stop(codec.decode(shown), job.options.get("stop", ()))
    logprobs = None
    if request.HasField("top_logprobs"):
        if len(bought.logprobs) == len(tokens):
            logprobs = readable(codec, bought.logprobs)
        else:
            shared["warnings"] = (*shared["warnings"], LogprobsLost())
    reason = "stop" if stopped or len(shown) < len(tokens) else "length"
    return ChatResult(text=text, tokens=tokens, finish_reason=reason, logprobs=logprobs, **shared)


def spent_on_checks(connection: Connection, jobs: Iterable[Hash]) -> Money:
    """What the checks of jobs cost."""
    checks = [key for job in jobs for key in store.children(connection, job, "check")]
    return Money(sum(found.billed for key in checks if (found := store.load_job(connection, key))))

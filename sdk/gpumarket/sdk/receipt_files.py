"""A job's signed statements from the journal into a file of its own (`gpumarket.settlement.receipts`)."""

from __future__ import annotations

from pathlib import Path

from gpumarket.core import private_files
from gpumarket.core.codec import from_proto
from gpumarket.core.errors import ConfigError, JournalError
from gpumarket.core.signing import Domain
from gpumarket.core.terms import Receipt
from gpumarket.core.units import Hash, Money, parse_hash
from gpumarket.sdk import store
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.pricing import attempt_amount, client_amount
from gpumarket.settlement.receipts import Content, Document, SignedAttempt, to_json


def save(journal: Journal, domain: Domain, job: Hash | str, path: Path, *, content: bool) -> None:
    """Write the file. Raises ConfigError for a job that is not there or was never leased, WalletError where the file exists."""
    key = parse_hash(job) if isinstance(job, str) else job
    private_files.create(path, to_json(build(journal, domain, key, content=content)).encode() + b"\n", anywhere=True)


def find(journal: Journal, prefix: str) -> Hash:
    """The one job whose id begins with `prefix`. Raises ConfigError for none or several."""
    wanted = prefix.lower().removeprefix("0x")
    found = [Hash(row["job"]) for row in journal.read(store.list_jobs) if row["job"].hex().startswith(wanted)]
    if len(found) != 1:
        raise ConfigError(f"{len(found) or 'no'} jobs in this journal begin with 0x{wanted}", hint="gpumarket job list")
    return found[0]


def build(journal: Journal, domain: Domain, job: Hash, *, content: bool) -> Document:
    """The document of a job. Raises ConfigError as `save`, JournalError when request and output are erased already."""
    stored = journal.read(lambda c: store.load_job(c, job))
    attempts = journal.read(lambda c: store.load_attempts(c, job))
    if stored is None or not attempts:
        what = "is not in this journal" if stored is None else "was never leased: nobody signed anything for it"
        raise ConfigError(f"job 0x{job.hex()} {what}", hint="gpumarket job list")
    if content and not stored.request:
        raise JournalError(
            f"request and output of job 0x{job.hex()} are erased", hint="save it without --content, or sooner (keep_output_days)"
        )
    output = journal.read(lambda c: store.load_output(c, job)) if content else []
    return Document(
        chain_id=domain.chain_id,
        registry=domain.contract,
        spec=stored.spec,
        constraints=stored.order.constraints,
        order_signature=stored.order.signature,
        attempts=tuple(_attempt(attempt, stored.spec.prompt_units) for attempt in attempts),
        content=Content(stored.salt, stored.request, tuple(output)) if content else None,
    )


def _attempt(attempt: store.StoredAttempt, prompt_units: int) -> SignedAttempt:
    lease, ack, receipt = attempt.lease, attempt.ack, attempt.signed_receipt
    earned = attempt_amount(lease, prompt_units=prompt_units, units=ack.units, complete=ack.complete) if ack is not None else Money(0)
    return SignedAttempt(
        lease=lease,
        lease_signature=attempt.signed_lease.signature,
        ack=ack,
        ack_signature=attempt.signed_ack.signature if attempt.signed_ack is not None else b"",
        receipt=from_proto(Receipt, receipt.receipt) if receipt is not None else None,
        receipt_signature=receipt.signature if receipt is not None else b"",
        amount=client_amount(earned, lease.fee_ppm),
    )

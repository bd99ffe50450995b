"""What a receipt file proves. Pure: signatures, hashes and sums, computed from the file alone.

Every finding is made, whatever the ones before it said, so that a reader sees all that is wrong. Never: a claim that rests on anything that
is not in the file; what the file cannot show is listed as such, always.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gpumarket.core.errors import BadSignature
from gpumarket.core.signing import Domain, market_domain, recover
from gpumarket.core.terms import Outcome, Task, Term, keccak256, opens_request, output_chain
from gpumarket.core.units import ZERO_HASH, Address, Hash, Money, format_money, hex0x
from gpumarket.settlement.pricing import attempt_amount, client_amount
from gpumarket.settlement.receipts.document import Content, Document, SignedAttempt


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked. `detail` says what was found, both values where they differ."""

    name: str
    holds: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Proof:
    """The outcome. `proven` is empty unless everything holds."""

    findings: tuple[Finding, ...]
    proven: tuple[str, ...]
    not_proven: tuple[str, ...]
    amount: Money
    """What the client owes for the job by its own acks, fee included, base units."""

    @property
    def holds(self) -> bool:
        return all(finding.holds for finding in self.findings)


def verify(document: Document, *, chain_id: int | None = None, registry: Address | None = None) -> Proof:
    """Check everything in the file; `chain_id` and `registry` are the market that the reader means, where he says."""
    findings = tuple(_findings(document, chain_id, registry))
    amount = Money(sum(_owed(attempt, document) for attempt in document.attempts))
    holds = all(finding.holds for finding in findings)
    return Proof(
        findings, tuple(_proven(document, amount)) if holds else (), tuple(_not_proven(document, registry)), amount if holds else Money(0)
    )


def _findings(document: Document, chain_id: int | None, registry: Address | None) -> Iterator[Finding]:
    domain, spec = market_domain(document.chain_id, document.registry), document.spec
    if chain_id is not None:
        yield _equal("chain", document.chain_id, chain_id)
    if registry is not None:
        yield _equal("registry", document.registry, registry)
    yield _signed(domain, "order", spec, document.order_signature, spec.client, "the client")
    yield _equal("order constraints", keccak256(document.constraints), spec.constraints_hash)
    before: list[SignedAttempt] = []
    for attempt in document.attempts:
        name = f"attempt {attempt.lease.attempt}"
        yield from _lease(name, domain, document, attempt, before)
        yield from _ack(f"{name} ack", domain, document, attempt)
        yield from _receipt(f"{name} receipt", domain, document, attempt)
        yield _equal(f"{name} amount", attempt.amount, _owed(attempt, document))
        before.append(attempt)
    total = sum(_owed(attempt, document) for attempt in document.attempts)
    yield _at_most("total amount", total, spec.max_amount, "the order's maximum")
    if document.content is not None:
        yield from _content(document, document.content)


def _lease(name: str, domain: Domain, document: Document, attempt: SignedAttempt, before: list[SignedAttempt]) -> Iterator[Finding]:
    lease, spec = attempt.lease, document.spec
    yield _signed(domain, f"{name} lease", lease, attempt.lease_signature, spec.scheduler, "the scheduler")
    for field, value in (
        ("attempt", len(before) + 1),
        ("job", spec.key),
        ("spec", spec.struct_hash),
        ("client", spec.client),
        ("scheduler", spec.scheduler),
        ("model", spec.model),
        ("task", spec.task),
        ("profile", spec.profile),
    ):
        yield _equal(f"{name} lease {field}", getattr(lease, field), value)
    units, chain = _reached(before)
    yield _equal(f"{name} lease prefix_units", lease.prefix_units, units)
    yield _equal(f"{name} lease prefix_hash", lease.prefix_hash, chain)
    yield _at_most(f"{name} lease deadline", lease.deadline, spec.deadline, "the order's")
    spent = sum(_owed(earlier, document) for earlier in before)
    most = client_amount(lease.maximum, lease.fee_ppm) + spent
    yield _at_most(f"{name} lease maximum", most, spec.max_amount, "the order's, fee and earlier attempts included,")


def _ack(name: str, domain: Domain, document: Document, attempt: SignedAttempt) -> Iterator[Finding]:
    ack = attempt.ack
    if ack is None:
        return
    yield _signed(domain, name, ack, attempt.ack_signature, document.spec.client, "the client")
    yield _equal(f"{name} lease", ack.lease, attempt.lease.struct_hash)
    yield _at_most(f"{name} units", attempt.lease.prefix_units + ack.units, _units_allowed(document), "what was ordered")


def _receipt(name: str, domain: Domain, document: Document, attempt: SignedAttempt) -> Iterator[Finding]:
    receipt, lease, ack = attempt.receipt, attempt.lease, attempt.ack
    last = attempt is document.attempts[-1]
    if receipt is None:
        yield Finding(name, not (ack is not None and ack.complete), "there is none")
        return
    yield _signed(domain, name, receipt, attempt.receipt_signature, lease.provider, "the provider")
    for field, value in (
        ("lease", lease.struct_hash),
        ("request_hash", document.spec.request_hash),
        ("prompt_units", document.spec.prompt_units),
        ("prefix_units", lease.prefix_units),
        ("prefix_hash", lease.prefix_hash),
    ):
        yield _equal(f"{name} {field}", getattr(receipt, field), value)
    yield _at_most(f"{name} units", receipt.prefix_units + receipt.output_units, _units_allowed(document), "what was ordered")
    if receipt.outcome is Outcome.COMPLETED:
        yield _at_most(f"{name} finished_at", receipt.finished_at, lease.deadline, "the lease's deadline")
        yield Finding(f"{name} order", last, "completed, and the last attempt" if last else "completed, yet another attempt followed")
    if ack is not None and ack.complete:
        yield _equal(f"{name} outcome", receipt.outcome, Outcome.COMPLETED)
        yield _equal(f"{name} output_units", receipt.output_units, ack.units)
        yield _equal(f"{name} output_hash", receipt.output_hash, ack.output_hash)


def _content(document: Document, content: Content) -> Iterator[Finding]:
    units, chain = _reached(list(document.attempts))
    opens = opens_request(content.salt, content.request, document.spec.request_hash)
    yield Finding("content request", opens, "what the order names" if opens else "another request, or a salt that is none")
    yield _equal("content output", output_chain(content.output), chain)
    if document.spec.task is Task.GENERATE:
        yield _equal("content units", len(content.output), units)


# --- arithmetic ----------------------------------------------------------------------------------------------------------------


def _owed(attempt: SignedAttempt, document: Document) -> int:
    """What the client owes for an attempt by its own ack, fee included."""
    ack, lease = attempt.ack, attempt.lease
    if ack is None:
        return 0
    earned = attempt_amount(lease, prompt_units=document.spec.prompt_units, units=ack.units, complete=ack.complete)
    return client_amount(earned, lease.fee_ppm)


def _reached(attempts: list[SignedAttempt]) -> tuple[int, Hash]:
    """Units and output hash that the acks of these attempts add up to."""
    units, chain = 0, ZERO_HASH
    for attempt in attempts:
        if attempt.ack is not None and attempt.ack.units:
            units, chain = units + attempt.ack.units, attempt.ack.output_hash
    return units, chain


def _units_allowed(document: Document) -> int:
    return document.spec.max_output_units if document.spec.task is Task.GENERATE else document.spec.prompt_units


def _signed(domain: Domain, name: str, term: Term, signature: bytes, signer: Address, who: str) -> Finding:
    try:
        found = recover(domain.digest(term.struct_hash), signature)
    except BadSignature as error:
        return Finding(f"{name} signature", False, error.message)
    if found == signer:
        return Finding(f"{name} signature", True, f"by {who} {hex0x(signer)}")
    return Finding(f"{name} signature", False, f"by {hex0x(found)}, not by {who} {hex0x(signer)}")


def _equal(name: str, found: object, wanted: object) -> Finding:
    return Finding(name, found == wanted, _show(found) if found == wanted else f"{_show(found)}, not {_show(wanted)}")


def _at_most(name: str, found: int, most: int, what: str) -> Finding:
    return Finding(name, found <= most, f"{found}, at most {what} {most}" if found <= most else f"{found} is above {what} {most}")


def _show(value: object) -> str:
    return hex0x(value) if isinstance(value, bytes) else str(value)


# --- words ---------------------------------------------------------------------------------------------------------------------


def _proven(document: Document, amount: Money) -> Iterator[str]:
    spec = document.spec
    yield f"{hex0x(spec.client)} ordered {spec.task.name.lower()} of model {hex0x(spec.model)} for at most {format_money(spec.max_amount)}"
    for attempt in document.attempts:
        lease, receipt, ack = attempt.lease, attempt.receipt, attempt.ack
        yield f"scheduler {hex0x(lease.scheduler)} leased attempt {lease.attempt} to provider {hex0x(lease.provider)} at the prices stated"
        if receipt is not None:
            said = receipt.outcome.name.lower()
            yield f"provider {hex0x(lease.provider)} signed: {said}, {receipt.output_units} units, output hash {hex0x(receipt.output_hash)}"
        if ack is not None:
            yield f"the client acknowledged {ack.units} units of attempt {lease.attempt}{', the whole answer' if ack.complete else ''}"
    yield f"by its acks and the leases' prices the client owes {format_money(amount)}, fee included"
    if document.content is not None:
        yield "request and output in this file are the ones that these statements are about"


_ALWAYS = (
    "that the answer is right: a hash says which answer it was; only a check or a dispute recomputes it",
    "that the client kept the result: a rejection lies with the scheduler, not in this file",
    "that anything was paid: vouchers and redemptions are in ledgers and on chain, not in this file",
    "that provider and scheduler are registered or staked: the registry on chain says so",
    "when it happened: the times are the signers' own clocks",
    "which person or company holds these keys, or on what hardware the work was done",
)


def _not_proven(document: Document, registry: Address | None) -> Iterator[str]:
    yield from _ALWAYS
    if registry is None:
        where = f"chain {document.chain_id} with registry {hex0x(document.registry)}"
        yield f"that {where} is the market you mean: compare them, or give --address-book"
    if document.content is None:
        yield "what was asked and answered: the file holds their hashes only"
    if not any(a.receipt is not None and a.receipt.outcome is Outcome.COMPLETED for a in document.attempts):
        yield "that the job was completed: no provider signed that it was"

"""Takes a provider that delivered something grossly different before a panel: opens the dispute, and sees it through.

Journal first: nonce and evidence are kept before the challenge leaves, and every later step follows from what the chain shows
(`settlement.disputes.challenger_step`), so that `open` called again after a crash goes on where it was. Never: a dispute that this client's
own checks do not carry, since its bond would go to the panel; evidence to anybody but the five who were drawn.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection

from gpumarket.core.codec import from_proto, parse
from gpumarket.core.errors import ConfigError, EngineFailed, JournalError, OutOfFunds, ResultRejected
from gpumarket.core.seeds import require_disputable
from gpumarket.core.signing import LocalKey
from gpumarket.core.terms import Lease, Task, VerificationProfile, keccak256
from gpumarket.core.units import Hash, Money, format_money, hex0x
from gpumarket.sdk import dispute_records, store
from gpumarket.sdk.account import TEST_CHAIN
from gpumarket.sdk.challenging import Challenger
from gpumarket.sdk.desk import Desk
from gpumarket.sdk.dispute_port import DisputePort, HasDisputes
from gpumarket.sdk.dispute_records import StoredDispute
from gpumarket.sdk.dispute_view import DisputeView
from gpumarket.sdk.openings import Delivered, delivered
from gpumarket.sdk.results import VerdictState
from gpumarket.settlement.disputes import Dispute, bound, disputed_amount, nonce_commitment, number
from gpumarket.settlement.verification import Evidence, open_evidence, profile_by_digest
from gpumarket.v1 import market_pb2 as mpb


def port_of(desk: Desk) -> DisputePort:
    """The Disputes contract, for the key that leases name as their client. Raises ConfigError where the chain has none."""
    found = None
    if isinstance(desk.chain, HasDisputes) and isinstance(desk.signer, LocalKey):
        found = desk.chain.disputes(desk.signer, desk.journal)
    if found is None:
        raise ConfigError("this network has no Disputes contract", hint="a rejected result is unpaid all the same")
    return found


async def open_dispute(desk: Desk, job: Hash) -> StoredDispute:
    """The dispute about a rejected job: the one that was opened before, or a new one whose challenge is mined.

    Raises ConfigError for a job that cannot be disputed (NotDisputable where its client chose the seed), OutOfFunds when the bond is not
    there, TransactionFailed.
    """
    port = port_of(desk)
    stored = desk.journal.read(lambda c: dispute_records.of_job(c, job))
    if stored is None:
        stored = await _prepare(desk, port, job)
    if stored.outcome:
        return stored
    await port.watch.sync()
    if stored.dispute not in port.watch.disputes:
        await _challenge(desk, port, stored)
    return stored


async def pursue(desk: Desk, job: Hash, *, wait: bool, on_change: Callable[[DisputeView], None] | None) -> DisputeView:
    """`open_dispute`, then to its end; without `wait` until every member has the evidence. Never less: an undrawn panel costs the bond."""
    stored = await open_dispute(desk, job)

    def told(dispute: Dispute) -> None:
        if on_change is not None:
            on_change(DisputeView.of(job, stored.dispute, "", dispute))

    if not stored.outcome:
        await Challenger(desk, port_of(desk), stored, told, leave_delivered=not wait).run()
    return next(found for found in await views(desk) if found.job == job)


async def views(desk: Desk) -> list[DisputeView]:
    """Every dispute of the journal, newest first."""
    stored = desk.journal.read(dispute_records.everything)
    if not stored:
        return []
    watch = port_of(desk).watch
    await watch.sync()
    return [DisputeView.of(s.job, s.dispute, s.outcome, watch.disputes.get(s.dispute)) for s in stored]


async def _prepare(desk: Desk, port: DisputePort, job: Hash) -> StoredDispute:
    """Check that it can be won, and write it down."""
    subject, evidence, profile = _rejected(desk, job)
    _require_gross(desk, job, evidence, profile)
    terms = await port.actions.terms()
    head = await port.actions.head()
    if head.time >= evidence.lease.issued_at + terms.rules.challenge_seconds:
        raise ConfigError(f"job {hex0x(job)} is too old: a result is disputed within {terms.rules.challenge_seconds} s of its lease")
    _, bond = await port.actions.quote(evidence.lease.provider, disputed_amount(evidence.lease, evidence.receipt))
    balance = await port.actions.funds()
    if balance < bond and desk.settings.faucet and desk.chain.chain_id == TEST_CHAIN:
        await desk.chain.faucet()
        balance = await port.actions.funds()
    if balance < bond:
        key = hex0x(desk.signer.address)
        raise OutOfFunds(
            f"the bond of this dispute is {format_money(Money(bond))}, {key} has {format_money(balance)}",
            hint=f"send tokens to {key}; the bond comes back when the panel agrees",
        )
    raw = subject.opening.SerializeToString(deterministic=True)
    stored = StoredDispute(job, evidence.lease.struct_hash, Hash(desk.random.token(32)), raw, "", head.time)
    await desk.journal.transact(lambda c: dispute_records.add(c, stored))
    return stored


async def _challenge(desk: Desk, port: DisputePort, stored: StoredDispute) -> None:
    opening = parse(mpb.Opening, stored.evidence)
    profile = profile_by_digest(from_proto(Lease, opening.lease.lease).profile)
    committed = nonce_commitment(stored.dispute, desk.signer.address, stored.nonce)
    await port.actions.challenge(opening, profile, committed, keccak256(stored.evidence))


# --- what carries a dispute ----------------------------------------------------------------------------------------------------


def _rejected(desk: Desk, job: Hash) -> tuple[Delivered, Evidence, VerificationProfile]:
    found = desk.journal.read(lambda c: store.load_job(c, job))
    if found is None:
        raise ConfigError(f"job {hex0x(job)} is not in this journal", hint="gpumarket job list")
    if found.verdict != VerdictState.REJECTED.value:
        said = found.verdict or "not checked"
        raise ConfigError(f"job {hex0x(job)} was not rejected ({said}): there is nothing to dispute", hint="gpumarket job list")
    if found.task not in (Task.EMBED, Task.GENERATE):
        raise ConfigError(f"job {hex0x(job)} is a {found.task.name.lower()} job, which is unpaid when rejected but cannot be disputed")
    subject = desk.journal.read(lambda c: delivered(c, job))
    evidence = open_evidence(desk.domain, subject.opening)
    require_disputable(evidence.request)
    if desk.signer.address != evidence.lease.client:
        raise ConfigError(f"job {hex0x(job)} was bought by {hex0x(evidence.lease.client)}: only it can dispute the result")
    return subject, evidence, profile_by_digest(evidence.lease.profile)


def _require_gross(desk: Desk, job: Hash, evidence: Evidence, profile: VerificationProfile) -> None:
    """The two checks that rejected a text must be beyond the bound that a panel judges by: a rejection for a high mean alone is not gross.
    For embeddings the two bounds are one."""
    if profile.task is not Task.GENERATE:
        return
    answers = desk.journal.read(lambda c: _answers(c, job))
    gross = [answer for answer in answers if _number(profile, evidence, answer) > bound(profile)]
    if len(gross) < 2:
        raise ResultRejected(
            f"job {hex0x(job)} is rejected, but not grossly: {len(gross)} of {len(answers)} checks found more than "
            f"{profile.gross_share_ppm / 10_000:g} % of its tokens off",
            hint="it is unpaid; a panel would take the bond",
        )


def _answers(connection: Connection, job: Hash) -> list[Delivered]:
    """What the checks of a job answered."""
    found = []
    for key in store.children(connection, job, "check"):
        try:
            found.append(delivered(connection, key))
        except JournalError:  # a check that was ordered and never answered
            continue
    return found


def _number(profile: VerificationProfile, evidence: Evidence, answer: Delivered) -> int:
    try:
        return number(profile, evidence, answer.output)
    except EngineFailed:  # a checker's answer that is none
        return 0

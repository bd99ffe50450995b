"""Bugs to seed: each is a function of the product and a text in it that becomes another. A machine that does not notice one is no machine.

`seeded` compiles the changed source and swaps the function's code in place, so that every reference to it runs the bug, and swaps it back.
A text that is no longer there fails: the table is kept in step with the code.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any


@dataclass(frozen=True, slots=True)
class Mutant:
    """`changes`: (module:qualified.name, old text, new text)."""

    name: str
    changes: tuple[tuple[str, str, str], ...]
    invariant: str
    """What it breaks."""
    of: str = "market"
    """Whose machine catches it: the whole market's, the pure ones ("pure"), that of disputes ("disputes"), or of signed calls ("calls")."""
    quick: bool = False
    """Caught within a few examples: also tried in `make test`."""


MUTANTS = (
    Mutant(
        "an ack leaves the client before it is committed",
        (
            (
                "gpumarket.sdk.running:JobRun._apply",
                "await self._desk.journal.transact(work)",
                "asyncio.ensure_future(self._desk.journal.transact(work))",
            ),
        ),
        "I2",
        quick=True,
    ),
    Mutant(
        "a lease leaves the scheduler before it is committed",
        (("gpumarket.scheduler.ledger:Ledger.after_commit", "self._answers.append(answer)", "answer(None)"),),
        "I2",
        quick=True,
    ),
    Mutant(
        "a receipt leaves the provider before it is committed",
        (
            (
                "gpumarket.node.serving:Session._conclude",
                "await self._desk.accounts.keep_receipt(self.job.lease_hash, receipt)",
                "asyncio.ensure_future(self._desk.accounts.keep_receipt(self.job.lease_hash, receipt))",
            ),
        ),
        "I2",
        quick=True,
    ),
    Mutant(
        "an order that comes again is taken as a new one",
        (("gpumarket.scheduler.desk:Desk._order", "if known is not None:", "if known is not None and not known.order:"),),
        "I5",
    ),
    Mutant(
        "a provider takes a lower voucher for a newer one",
        (
            ("gpumarket.node.accounts:Accounts.keep_voucher", "voucher.cumulative > self.vouchered(voucher.channel)", "True"),
            ("gpumarket.node.accounts:_write_voucher", "elif known < voucher.cumulative:", "else:"),
        ),
        "I3",
    ),
    Mutant(
        "the scheduler takes a lower voucher for a newer one",
        (
            (
                "gpumarket.scheduler.channels:Channels.receive",
                "if cumulative > hub.state.voucher:",
                "if cumulative != hub.state.voucher:",
            ),
            ("gpumarket.settlement.channel:_receive_voucher", "if event.cumulative <= state.voucher:", "if False:"),
        ),
        "I3",
        of="pure",
        quick=True,
    ),
    Mutant(
        "a claim that comes again is credited again",
        (
            ("gpumarket.scheduler.lifecycle:claim", "if attempt.state is not AttemptState.OPEN:", "if False:"),
            (
                "gpumarket.scheduler.billing:Billing.claim",
                "if attempt.state in (AttemptState.OPEN, AttemptState.HELD, AttemptState.CLOSED):",
                "if True:",
            ),
        ),
        "I5",
        quick=True,
    ),
    Mutant(
        "a retry opens the next attempt without closing the last",
        (
            ("gpumarket.scheduler.lifecycle:close", "if attempt.state is not AttemptState.OPEN:", "if True:"),
            ("gpumarket.scheduler.lifecycle:grant", "if job.attempts and job.newest.state is AttemptState.OPEN:", "if False:"),
        ),
        "I5",
        quick=True,
    ),
    Mutant(
        "a voucher is released before its guard",
        (
            (
                "gpumarket.scheduler.ledger:Ledger.voucher",
                "return spoke.released, spoke.signature",
                "return spoke.state.vouchered, sign_voucher(self._signer, self._domain, channel, spoke.state.vouchered)",
            ),
        ),
        "I2",
        quick=True,
    ),
    Mutant(
        "a hold never ends",
        (("gpumarket.scheduler.lifecycle:due", "attempt.state is AttemptState.HELD and now >= attempt.hold_until", "False"),),
        "I6",
    ),
    Mutant(
        "a crash forgets what is reserved for providers",
        (("gpumarket.scheduler.records:load", "**{n: r[n] for n in _SPOKE}", '**({n: r[n] for n in _SPOKE} | {"reserved": 0})'),),
        "I1",
    ),
    Mutant(
        "a client's voucher passes its limit",
        (("gpumarket.sdk.account:voucher_for", "if wanted - channel.used > limit:", "if False:"),),
        "I4",
    ),
    Mutant(
        "a client signs without its guard",
        (("gpumarket.sdk.account:Account._cover", "guard.advance(connection, channel.id, wanted)", "pass"),),
        "I3",
        quick=True,
    ),
    Mutant(
        "a provider streams ahead of its window",
        (("gpumarket.node.meter:Meter.fits", "ahead = self.sent - self._durable", "ahead = 0"),),
        "I4",
    ),
    Mutant(
        "a higher ack of the provider's is ignored",
        (("gpumarket.scheduler.billing:Billing.claim", "if ack is not None:", "if False:"),),
        "I7",
    ),
    Mutant(
        "a rejected attempt is paid",
        (("gpumarket.scheduler.lifecycle:reject", "Move(Side.RETURN, charged(attempt))", "Move(Side.OWE, charged(attempt))"),),
        "I7",
    ),
    Mutant(
        "a signed call that comes again is taken again",
        (("gpumarket.core.codec:_Nonces.refuse", "if nonce in self._until:", "if False:"),),
        "I5",
        of="calls",
        quick=True,
    ),
    Mutant(
        "a member commits under a salt that it does not keep",
        (
            (
                "gpumarket.node.panel.member:Panel._do",
                "commitment(dispute.id, self._me, written.number, written.salt)",
                "commitment(dispute.id, self._me, written.number, self._salt())",
            ),
        ),
        "I3",
        of="disputes",
        quick=True,
    ),
    Mutant(
        "a member reveals while others may still commit",
        (("gpumarket.settlement.disputes.steps:revealing", "committing_over(dispute, now) and ", ""),),
        "I3",
        of="disputes",
    ),
    Mutant(
        "a slash pays the challenger's reward twice",
        (
            (
                "gpumarket.settlement.disputes.payouts:_slashed",
                "_split(payout, left - victim - reward, panel)",
                "_split(payout, left - victim, panel)",
            ),
        ),
        "I1",
        of="disputes",
        quick=True,
    ),
    Mutant(
        "three of five slash",
        (("gpumarket.settlement.disputes.payouts:settle", "len(beyond) >= TO_SLASH", "len(beyond) >= TO_RESTORE"),),
        "I7",
        of="disputes",
        quick=True,
    ),
    Mutant(
        "nobody ends a dispute whose panel was never drawn",
        (("gpumarket.settlement.disputes.steps:accused_step", "may_finish(dispute, now, rules)", "False"),),
        "I6",
        of="disputes",
    ),
)


@contextmanager
def seeded(mutant: Mutant) -> Iterator[None]:
    """The product with this bug."""
    with ExitStack() as stack:
        for target, old, new in mutant.changes:
            stack.enter_context(_changed(target, old, new))
        yield


@contextmanager
def _changed(target: str, old: str, new: str) -> Iterator[None]:
    function = _find(target)
    source = textwrap.dedent(inspect.getsource(function))
    if old not in source:
        raise LookupError(f"{target} does not say {old!r} any more: bring the table of mutants up to date")
    changed: dict[str, Any] = {}
    code = compile("from __future__ import annotations\n" + source.replace(old, new), f"<mutant of {target}>", "exec")
    exec(code, function.__globals__, changed)
    before, function.__code__ = function.__code__, changed[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = before


def _find(target: str) -> FunctionType:
    module, _, name = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert isinstance(found, FunctionType)
    return found

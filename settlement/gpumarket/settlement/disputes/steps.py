"""What a panel member, a challenger and the accused do next in a dispute: functions of the chain, of what each knows, of the time. Pure.

Both are asked again after every change and every restart, so nothing depends on having been there: a step that was taken shows on chain.
Never: a reveal before committing is over, a commit of anything but the one number that was written down.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from gpumarket.core.units import Address
from gpumarket.settlement.disputes.state import Dispute, Seat, State


@dataclass(frozen=True, slots=True)
class Rules:
    """What the steps need of the contract's terms (Disputes.terms)."""

    report_seconds: int
    reveal_seconds: int
    challenge_seconds: int


class Step(enum.Enum):
    """What to do now."""

    WAIT = "wait"
    REPORT = "report"
    """Member: say on chain that no evidence came."""
    READ = "read"
    """Member: open what was posted since it last looked."""
    SHOWN_NOTHING = "shown nothing"
    """Member: it reported, and what was posted holds nothing that opens for it: a challenger who shows nothing has shown nothing wrong."""
    COMMIT = "commit"
    REVEAL = "reveal"
    DRAW = "draw"
    """Challenger: show the nonce, so that the panel is drawn."""
    DELIVER = "deliver"
    """Challenger: hand the evidence to the members that do not have it."""
    POST = "post"
    """Challenger: seal the evidence on chain to those who miss it."""
    FINISH = "finish"
    """Anyone: the contract pays out."""
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Mine:
    """What a member knows. `number` is in its journal, or None."""

    has_number: bool
    judging: bool = False
    """Evidence came, and the engine is at it."""
    posted_read: int = 0
    """How many of the posted texts it has tried to open."""


def member_step(dispute: Dispute, me: Address, mine: Mine, now: int, rules: Rules) -> Step:
    """The member's next step. It misses the evidence from the middle of the report window on: until then it may be on its way."""
    member = dispute.member(me)
    if dispute.state is State.FINISHED or member is None:
        return Step.DONE
    if may_finish(dispute, now, rules):
        return Step.FINISH
    if member.seat is Seat.COMMITTED:
        return Step.REVEAL if mine.has_number and revealing(dispute, now, rules) else Step.WAIT
    if member.seat is Seat.REVEALED or now >= dispute.commit_until:
        return Step.WAIT
    if mine.has_number or mine.judging:
        return Step.COMMIT if mine.has_number else Step.WAIT
    if len(dispute.posted) > mine.posted_read:
        return Step.READ
    if member.seat is Seat.MISSING:
        return Step.SHOWN_NOTHING if now >= dispute.post_until else Step.WAIT
    missed_from = dispute.report_until - rules.report_seconds // 2
    return Step.REPORT if missed_from <= now < dispute.report_until else Step.WAIT


def challenger_step(
    dispute: Dispute, delivered: frozenset[Address], posted: frozenset[Address], now: int, block: int, rules: Rules
) -> Step:
    """The challenger's next step. `block` is the chain's newest; `delivered` and `posted` are the members who took the evidence off chain,
    and those to whom it was sealed."""
    if dispute.state is State.FINISHED:
        return Step.DONE
    if may_finish(dispute, now, rules):
        return Step.FINISH
    if dispute.state is State.CHALLENGED:
        return Step.DRAW if block > dispute.draw_block else Step.WAIT
    if now < dispute.post_until and set(dispute.missing) - posted:
        return Step.POST
    return Step.DELIVER if now < dispute.commit_until and undelivered(dispute, delivered) else Step.WAIT


def accused_step(dispute: Dispute, now: int, rules: Rules) -> Step:
    """The accused provider's next step. Its stake is locked until somebody ends the dispute, also one whose challenger never drew a panel:
    then nobody else has a reason to."""
    if dispute.state is State.FINISHED:
        return Step.DONE
    return Step.FINISH if may_finish(dispute, now, rules) else Step.WAIT


def undelivered(dispute: Dispute, delivered: frozenset[Address]) -> tuple[Address, ...]:
    """Members who may still want the evidence."""
    waiting = (m.operator for m in dispute.members if m.seat in (Seat.DRAWN, Seat.MISSING))
    return tuple(operator for operator in waiting if operator not in delivered)


def revealing(dispute: Dispute, now: int, rules: Rules) -> bool:
    """Whether numbers may be revealed now."""
    return committing_over(dispute, now) and now < reveal_end(dispute, rules)


def committing_over(dispute: Dispute, now: int) -> bool:
    """All five have committed, or their time is over."""
    return dispute.reveal_until > 0 or now >= dispute.commit_until


def reveal_end(dispute: Dispute, rules: Rules) -> int:
    """When revealing ends."""
    return dispute.reveal_until or dispute.commit_until + rules.reveal_seconds


def may_finish(dispute: Dispute, now: int, rules: Rules) -> bool:
    """Whether `finish` would be taken."""
    if dispute.state is State.CHALLENGED:
        return now >= dispute.draw_until
    if dispute.state is not State.DRAWN:
        return False
    if now >= reveal_end(dispute, rules) or withheld(dispute, now):
        return True
    seats = [m.seat for m in dispute.members]
    return Seat.COMMITTED not in seats and Seat.REVEALED in seats and committing_over(dispute, now)


def withheld(dispute: Dispute, now: int) -> bool:
    """A member missed the evidence and the challenger did not post it in time: nothing can be committed any more."""
    return bool(dispute.missing) and not dispute.posted and now >= dispute.post_until

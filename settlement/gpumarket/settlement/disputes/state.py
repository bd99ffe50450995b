"""A dispute as the chain tells it: one frozen value, changed event by event exactly as Disputes.sol changes it. Pure.

Challenged ──draw──► Drawn ──finish──► Finished
    └───────────────finish────────────────┘
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gpumarket.core.errors import ChainError
from gpumarket.core.terms import Task
from gpumarket.core.units import ZERO_HASH, Address, Hash, parse_address


class State(enum.IntEnum):
    """As in the contract."""

    NONE = 0
    CHALLENGED = 1
    DRAWN = 2
    FINISHED = 3


class Outcome(enum.IntEnum):
    """As in the contract."""

    NONE = 0
    SLASHED = 1
    RESTITUTION = 2
    DISMISSED = 3
    INCONCLUSIVE = 4
    WITHHELD = 5
    NOT_DRAWN = 6
    NO_PANEL = 7


class Seat(enum.IntEnum):
    """Where a member of the panel stands, as in the contract."""

    DRAWN = 0
    MISSING = 1
    COMMITTED = 2
    REVEALED = 3


@dataclass(frozen=True, slots=True)
class Member:
    """One of five. `number` is what it revealed."""

    operator: Address
    seat: Seat = Seat.DRAWN
    commitment: Hash = ZERO_HASH
    number: int = 0


@dataclass(frozen=True, slots=True)
class Dispute:
    """Times in unix seconds of the chain, windows half-open; money in base units; 0 where something is not fixed yet."""

    id: Hash
    provider: Address
    challenger: Address
    model: Hash
    task: Task
    bound: int
    """Largest number that is still in order, from the lease's own profile."""
    amount: int
    """What the attempt could earn."""
    locked: int
    """Of the provider's stake, for this dispute."""
    bond: int
    draw_block: int
    draw_until: int
    slashable: bool
    evidence_hash: Hash
    state: State = State.CHALLENGED
    members: tuple[Member, ...] = ()
    report_until: int = 0
    post_until: int = 0
    commit_until: int = 0
    reveal_until: int = 0
    """0 until the fifth commit opened revealing early; else revealing ends `reveal_seconds` after commit_until."""
    posted: tuple[bytes, ...] = field(default=(), repr=False)
    """Sealed evidence on the chain, oldest first; let go of at the end."""
    outcome: Outcome = Outcome.NONE
    beyond: int = 0
    within: int = 0
    taken: int = 0
    burned: int = 0

    def member(self, operator: Address) -> Member | None:
        """The panel's member with this key, if it sits."""
        return next((m for m in self.members if m.operator == operator), None)

    @property
    def missing(self) -> tuple[Address, ...]:
        """Members who miss the evidence and have not committed since."""
        return tuple(m.operator for m in self.members if m.seat is Seat.MISSING)


def dispute_after(dispute: Dispute | None, name: str, args: Mapping[str, Any]) -> Dispute | None:
    """The dispute after one event of Disputes; None for events that are about no dispute. Raises ChainError for one that was missed."""
    if name == "Challenged":
        return _challenged(args)
    rule = _RULES.get(name)
    if rule is None:
        return None
    if dispute is None:
        raise ChainError(f"{name} of a dispute that was never opened: the address book's deployed_block is too late")
    return rule(dispute, args)


def _challenged(args: Mapping[str, Any]) -> Dispute:
    return Dispute(
        id=Hash(bytes(args["id"])),
        provider=parse_address(args["provider"]),
        challenger=parse_address(args["challenger"]),
        model=Hash(bytes(args["model"])),
        task=Task(args["task"]),
        bound=args["bound"],
        amount=args["amount"],
        locked=args["locked"],
        bond=args["bond"],
        draw_block=args["drawBlock"],
        draw_until=args["drawUntil"],
        slashable=args["slashable"],
        evidence_hash=Hash(bytes(args["evidenceHash"])),
    )


def _drawn(dispute: Dispute, args: Mapping[str, Any]) -> Dispute:
    return replace(
        dispute,
        state=State.DRAWN,
        members=tuple(Member(parse_address(operator)) for operator in args["members"]),
        report_until=args["reportUntil"],
        post_until=args["postUntil"],
        commit_until=args["commitUntil"],
    )


def _member(dispute: Dispute, args: Mapping[str, Any], **changes: Any) -> Dispute:
    who = parse_address(args["member"])
    return replace(dispute, members=tuple(replace(m, **changes) if m.operator == who else m for m in dispute.members))


def _finished(dispute: Dispute, args: Mapping[str, Any]) -> Dispute:
    return replace(
        dispute,
        state=State.FINISHED,
        outcome=Outcome(args["outcome"]),
        beyond=args["beyond"],
        within=args["within"],
        taken=args["taken"],
        burned=args["burned"],
        posted=(),
    )


_RULES: dict[str, Callable[[Dispute, Mapping[str, Any]], Dispute]] = {
    "PanelDrawn": _drawn,
    "EvidenceMissing": lambda d, args: _member(d, args, seat=Seat.MISSING),
    "EvidencePosted": lambda d, args: replace(d, posted=(*d.posted, bytes(args["evidence"]))),
    "Committed": lambda d, args: _member(d, args, seat=Seat.COMMITTED, commitment=Hash(bytes(args["commitment"]))),
    "RevealOpened": lambda d, args: replace(d, reveal_until=args["revealUntil"]),
    "Revealed": lambda d, args: _member(d, args, seat=Seat.REVEALED, number=args["number"]),
    "Finished": _finished,
}

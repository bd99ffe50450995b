"""A dispute as its challenger sees it: what the journal and the chain say of it at one moment."""

from __future__ import annotations

from dataclasses import dataclass

from gpumarket.core.units import Address, Hash, Money
from gpumarket.settlement.disputes import Dispute, State

NOTHING = Money(0)


@dataclass(frozen=True, slots=True)
class PanelSeat:
    """One of five. `number` is what it revealed, or None."""

    operator: Address
    state: str
    number: int | None


@dataclass(frozen=True, slots=True)
class DisputeView:
    """Amounts in base units, times in unix seconds; 0 where nothing is known yet. `outcome` is empty while it runs."""

    job: Hash
    dispute: Hash
    state: str
    """ "opening" (not yet confirmed on chain), "challenged", "drawn" or "finished"."""
    outcome: str
    provider: Address | None = None
    amount: Money = NOTHING
    locked: Money = NOTHING
    bond: Money = NOTHING
    bound: int = 0
    panel: tuple[PanelSeat, ...] = ()
    beyond: int = 0
    within: int = 0
    taken: Money = NOTHING
    burned: Money = NOTHING
    ends_by: int = 0
    """When the phase that runs now is over at the latest."""

    @staticmethod
    def of(job: Hash, key: Hash, outcome: str, dispute: Dispute | None) -> DisputeView:
        """`dispute` is None while the chain shows none; `outcome` is the journal's."""
        if dispute is None:
            return DisputeView(job, key, "opening" if not outcome else "finished", outcome)
        finished = dispute.state is State.FINISHED
        seats = [(m.operator, m.seat) for m in dispute.members]
        numbers = {m.operator: m.number for m in dispute.members}
        return DisputeView(
            job,
            key,
            dispute.state.name.lower(),
            dispute.outcome.name.lower() if finished else "",
            dispute.provider,
            Money(dispute.amount),
            Money(dispute.locked),
            Money(dispute.bond),
            dispute.bound,
            tuple(PanelSeat(who, seat.name.lower(), numbers[who] if seat.name == "REVEALED" else None) for who, seat in seats),
            dispute.beyond,
            dispute.within,
            Money(dispute.taken),
            Money(dispute.burned),
            0 if finished else _ends_by(dispute),
        )


def _ends_by(dispute: Dispute) -> int:
    if dispute.state is State.CHALLENGED:
        return dispute.draw_until
    return dispute.reveal_until or dispute.commit_until

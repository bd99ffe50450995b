"""What a job's money instructions do to its two channels: `lifecycle` says what to move, a channel how it takes that. Pure."""

from __future__ import annotations

from gpumarket.scheduler.lifecycle import Move, Side
from gpumarket.settlement.channel import (
    HoldAmount,
    OweHeld,
    PaidChannel,
    Pay,
    ReceivedChannel,
    Release,
    ReleaseOpen,
    Reserve,
    ReserveOpen,
    ReturnHeld,
    handle,
)

_CLIENT = {
    Side.RELEASE: ReleaseOpen,
    Side.HOLD: HoldAmount,
    Side.OWE: OweHeld,
    Side.RETURN: ReturnHeld,
}


def move_hub(state: ReceivedChannel, move: Move) -> ReceivedChannel:
    """The client's channel after `move`. Raises FundsError where it does not cover it."""
    if move.side is Side.RESERVE:
        return handle(state, ReserveOpen(move.amount, until=move.until))
    return handle(state, _CLIENT[move.side](move.amount))


def move_spoke(state: PaidChannel, move: Move) -> PaidChannel:
    """The provider's channel after `move`. Raises FundsError where it does not cover it."""
    if move.side is Side.SET_ASIDE:
        return handle(state, Reserve(move.amount, until=move.until))
    if move.side is Side.PAY:
        return handle(state, Pay(move.amount))
    return handle(state, Release(move.amount))

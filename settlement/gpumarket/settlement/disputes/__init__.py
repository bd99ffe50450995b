"""Disputes as pure functions, mirroring Disputes.sol: the machine, each party's next step, the draw, the numbers and the payouts."""

from gpumarket.settlement.disputes.draw import DRAW_TRIES_MAX, PANEL_SIZE, draw_panel
from gpumarket.settlement.disputes.numbers import NUMBER_MAX, bound, number
from gpumarket.settlement.disputes.payouts import Payout, Shares, Stakes, disputed_amount, lock_and_bond, settle, withheld
from gpumarket.settlement.disputes.preimages import commitment, nonce_commitment, panel_seed
from gpumarket.settlement.disputes.state import Dispute, Member, Outcome, Seat, State, dispute_after
from gpumarket.settlement.disputes.steps import (
    Mine,
    Rules,
    Step,
    accused_step,
    challenger_step,
    may_finish,
    member_step,
    reveal_end,
    undelivered,
)

__all__ = [
    "DRAW_TRIES_MAX",
    "NUMBER_MAX",
    "PANEL_SIZE",
    "Dispute",
    "Member",
    "Mine",
    "Outcome",
    "Payout",
    "Rules",
    "Seat",
    "Shares",
    "Stakes",
    "State",
    "Step",
    "accused_step",
    "bound",
    "challenger_step",
    "commitment",
    "dispute_after",
    "disputed_amount",
    "draw_panel",
    "lock_and_bond",
    "may_finish",
    "member_step",
    "nonce_commitment",
    "number",
    "panel_seed",
    "reveal_end",
    "settle",
    "undelivered",
    "withheld",
]

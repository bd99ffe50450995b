"""What a deployment of Disputes fixes for ever: every amount, share and duration, with its default and the reason for it.

Invariant: the fields are those of the contract's `Terms`, in its order; the constructor checks them. Amounts are base units of a token with
18 decimals whose unit is worth about as much as a thousand small jobs: whoever deploys on another token rescales them.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Final, Self

_TOKEN: Final = 10**18
_HOUR: Final = 3600
_EPOCHS: Final = 60
"""Epochs of a test network's challenge time; the contract counts at most 96."""


@dataclass(frozen=True)
class DisputeTerms:
    """`Terms` of contracts/src/disputes/DisputeTerms.sol."""

    seat_stake: int = 100 * _TOKEN
    """Base units that a verifier locks. Every seat weighs the same, so capturing a panel costs stake: more seats, more stake."""
    no_show_fee: int = 5 * _TOKEN
    """Base units that a silent member pays: five times what it would have earned, a twentieth of its seat."""
    panel_fee: int = 1 * _TOKEN
    """Base units that a member on the winning side earns at least: commit and reveal cost it gas and one prefill pass."""
    bond_minimum: int = 20 * _TOKEN
    """Base units; four times what a panel's fees are, so that a false challenge costs more than it makes others work."""
    lock_minimum: int = 100 * _TOKEN
    """Base units of free stake that a provider must have to be worth a panel; half of it pays ten times a panel's fees."""
    bond_ppm: int = 50_000
    """5 % of the lock: whoever holds a third of all seats captures 4 of 5 with 4.5 %, which is worth at most 2.3 % of the lock."""
    amount_bond_ppm: int = 250_000
    """And 25 % of the amount: the same third captures just 3 of 5 with 16.5 %, which is worth the amount."""
    burn_ppm: int = 500_000
    """Half of what leaves a stake is burned: less, and slashing oneself could launder the rest."""
    challenger_ppm: int = 500_000
    """Challenger and panel share what fees and victim leave of a slash."""
    slash_multiple: int = 150
    """Measured: at a check rate of 5 % a stake of about 120 prices of an open job deters; the rest is margin for misses."""
    victim_multiple: int = 3
    """A victim is made whole and paid for its trouble; more would make being cheated a business."""
    slash_verifiers_min: int = 20
    """Below this many seasoned seats, holding four of five is too cheap to let it take a whole stake."""
    draw_delay_blocks: int = 4
    """Enough that the draw's block is not yet being built when the challenge is seen."""
    draw_seconds: int = 1800
    """150 blocks of 12 s: within the 256 whose hashes every chain knows."""
    report_seconds: int = 6 * _HOUR
    post_seconds: int = 6 * _HOUR
    """Evidence is handed over within minutes; a night's outage of one side must not lose it a dispute."""
    commit_seconds: int = 12 * _HOUR
    reveal_seconds: int = 12 * _HOUR
    """A daemon that is down gets half a day of its owner's time before it pays for silence."""
    challenge_seconds: int = 7 * 24 * _HOUR
    """From the lease's issue. With the dispute itself it must stay below the unbonding delay."""
    epoch_seconds: int = 6 * _HOUR
    seasoning_epochs: int = 28
    """A week: seats for one dispute cannot be bought when it becomes likely."""

    @classmethod
    def scaled(cls, unbonding_delay_s: int) -> Self:
        """The defaults with durations that fit an unbonding delay, never longer than the default ones.

        From 12 s on they satisfy the constructor: 4/12 to challenge, 7/12 for the dispute, 1/12 to spare.
        """
        twelfth = max(1, unbonding_delay_s // 12)
        default = cls()
        challenge = min(4 * twelfth, default.challenge_seconds)
        return cls(
            draw_seconds=min(twelfth, default.draw_seconds),
            report_seconds=min(twelfth, default.report_seconds),
            post_seconds=min(twelfth, default.post_seconds),
            commit_seconds=min(2 * twelfth, default.commit_seconds),
            reveal_seconds=min(2 * twelfth, default.reveal_seconds),
            challenge_seconds=challenge,
            epoch_seconds=-(-challenge // default.seasoning_epochs),
        )

    @classmethod
    def for_test_network(cls, unbonding_delay_s: int) -> Self:
        """`scaled` for play money: a handful of verifiers is enough to slash, and they are seasoned within moments."""
        fitting = cls.scaled(unbonding_delay_s)
        epoch = -(-fitting.challenge_seconds // _EPOCHS)
        return replace(fitting, draw_delay_blocks=1, slash_verifiers_min=5, epoch_seconds=epoch, seasoning_epochs=1)

    @property
    def dispute_seconds(self) -> int:
        """Longest time from a challenge to the block in which anybody can finish it."""
        return self.draw_seconds + self.report_seconds + self.post_seconds + self.commit_seconds + self.reveal_seconds

    def words(self) -> tuple[int, ...]:
        """The values in the order of the contract's struct."""
        return tuple(astuple(self))

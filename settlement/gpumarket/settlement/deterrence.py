"""What each known way to cheat earns by the figures of a network: the table behind `gpumarket economics`. Pure.

Detection is what was measured, at the lower end of its 95 % confidence (Wilson): forty caught of forty are no proof of always. What a cheat
saves is bounded from above by the bytes of weights that it need not read (decoding is bound by memory), so the table errs in favour of the
cheat. A cheat that is not gross is never slashed: its price is the unpaid job and the jail, and the table says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpumarket.core.terms import Task
from gpumarket.core.units import Money, price_floor
from gpumarket.settlement.economics import caught_within, cheating_gain, panel_capture, required_stake

_Z = 1.645
"""One-sided 95 %."""
PANEL, TO_SLASH = 5, 4
_PPM = 1_000_000


@dataclass(frozen=True, slots=True)
class Cheat:
    """A way to cheat. `caught` of `tried` single jobs were rejected, measured; `saves` is the most it saves, as a share of the price."""

    name: str
    task: Task
    caught: int
    tried: int
    saves: float
    gross: bool
    """Beyond the profile's gross bound in every job that was tried: a dispute slashes it."""

    @property
    def detection(self) -> float:
        """Lower 95 % bound of the chance that one check sees it."""
        return wilson_floor(self.caught, self.tried)


CHEATS = (
    Cheat("another, smaller model", Task.GENERATE, 40, 40, 1.0, True),
    Cheat("int4 weights sold as bf16", Task.GENERATE, 40, 40, 0.75, True),
    Cheat("a changed or shortened prompt", Task.GENERATE, 40, 40, 0.5, True),
    Cheat("fp8 weights sold as bf16", Task.GENERATE, 40, 40, 0.5, False),
    Cheat("int8 weights sold as bf16", Task.GENERATE, 15, 40, 0.5, False),
    Cheat("random rows", Task.EMBED, 64, 64, 1.0, True),
    Cheat("int8 weights sold as fp32", Task.EMBED, 64, 64, 0.75, True),
    Cheat("bf16 weights sold as fp32", Task.EMBED, 64, 64, 0.5, True),
    Cheat("every other row not computed", Task.INFER, 55, 64, 0.5, False),
    Cheat("fp16 weights sold as fp32", Task.INFER, 58, 64, 0.5, False),
)
"""Measured: 40 text jobs of 129 tokens a row on random Llamas, 64 texts on MiniLM, 64 jobs of 24 images of which 3 were recomputed, one
machine, no GPU (verification/profiles.py)."""

NOT_PROMISED = (
    "single jobs below 64 generated tokens: no verdict on one of them, only on many together",
    "tensor jobs: unpaid and jailed when seen, never slashed: no panel judges them",
    "upstream engines: their sampling cannot be replayed, so they are sold as unverified, or not at all",
    "cheats that are not gross (int8, fp8 text): unpaid and jailed when seen, never slashed",
    "providers and checkers of one person under several owner keys: the draw cannot see who is behind a key",
    "other hardware than the measured: detection was measured on one CPU machine and small models",
    "reputation: a jailed or rejected provider loses later jobs as well, which no figure here counts",
)


@dataclass(frozen=True, slots=True)
class Network:
    """The figures that all rows share. `hostile` is the share of panel seats that side with the cheat; the last four are Disputes.terms."""

    probability: float
    hostile: float
    has_disputes: bool
    lock_minimum: int = 0
    slash_multiple: int = 0
    panel_fee: int = 0
    burn_ppm: int = 500_000

    @property
    def quorum(self) -> float:
        """P(quorum): enough honest seats of the panel to slash."""
        return panel_capture(1.0 - self.hostile, members=PANEL, needed=TO_SLASH) if self.has_disputes else 0.0


@dataclass(frozen=True, slots=True)
class Seller:
    """One model of one provider. Prices per 1,000,000 tokens; `slashable` when the model has enough seasoned verifiers; `jobs_at_risk` are
    those that may be unchecked at one time."""

    stake: int
    prompt_price: int
    output_price: int
    task: Task
    slashable: bool
    jobs_at_risk: int


@dataclass(frozen=True, slots=True)
class Row:
    """One cheat of one seller, per job, in base units (floats: expectations). `needed` is the stake behind one job that stops it, infinite
    where a dispute never takes so much."""

    cheat: Cheat
    price: int
    backing: int
    gain: float
    expected: float
    needed: float
    caught_in_100: float

    @property
    def pays(self) -> bool:
        return self.expected >= 0


def row(cheat: Cheat, seller: Seller, network: Network, prompt_units: int, output_units: int) -> Row:
    """p * d * P(quorum) * S + p * d * R against g: the fee is forfeited by the check alone, the stake needs the panel too."""
    price = price_floor(prompt_units, seller.prompt_price)
    if seller.task is Task.GENERATE:
        price = Money(price + price_floor(output_units, seller.output_price))
    backing = stake_lost(cheat, seller, network, price)
    gain, caught = cheat.saves * price, network.probability * cheat.detection
    expected = cheating_gain(network.probability, cheat.detection, network.quorum * backing, price, gain)
    still = max(0.0, gain - caught * price)  # what the unpaid job does not deter
    needed = required_stake(network.probability, cheat.detection, 0.0, still, quorum=network.quorum)
    if needed > most_lost(cheat, seller, network, price):
        needed = math.inf
    return Row(cheat, price, backing, gain, expected, needed, caught_within(100, network.probability, cheat.detection))


def stake_lost(cheat: Cheat, seller: Seller, network: Network, price: int) -> int:
    """What a lost dispute over one such job takes from the stake, in base units: never more than the stake's part behind the job."""
    if seller.stake < network.lock_minimum:
        return 0
    return min(seller.stake // max(1, seller.jobs_at_risk), most_lost(cheat, seller, network, price))


def most_lost(cheat: Cheat, seller: Seller, network: Network, price: int) -> int:
    """What it takes from a stake that is large enough: the dispute's lock.

    A model with too few seasoned verifiers has restitution only: the price and the panel's fees, twice because half is burned. Three of
    five decide that; the table reckons with the four that a slash needs.
    """
    if not network.has_disputes or not cheat.gross:
        return 0
    if seller.slashable:
        return max(network.lock_minimum, network.slash_multiple * price)
    return math.ceil((price + PANEL * network.panel_fee) * _PPM / (_PPM - network.burn_ppm))


def wilson_floor(hits: int, tries: int) -> float:
    """Lower end of the one-sided 95 % Wilson score interval of a share."""
    if tries == 0:
        return 0.0
    share, weight = hits / tries, _Z * _Z / tries
    middle = share + weight / 2
    spread = _Z * math.sqrt(share * (1 - share) / tries + weight / (4 * tries))
    return max(0.0, (middle - spread) / (1 + weight))

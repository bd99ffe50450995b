"""Which faults happen when, as values drawn from a seed. Pure: the same seed gives the same faults, whatever becomes of the run.

Faults go in two lanes, each one fault after another: one breaks providers and the ways to them, the other what all of them stand on. Each
lane goes through a shuffled deck of its kinds and shuffles again, so that a short run meets as many kinds as it has time for. The first
seconds and the last are quiet, so that jobs begin before the first fault and what is broken last can heal.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

QUIET_SECONDS = 6.0
"""At both ends."""
GAP_SECONDS = (2.0, 5.0)
"""Between the planned end of a fault and the next one in its lane."""
HEALING_SECONDS = 8.0
"""Planned for a role to be ready again after it was started; a fault that takes longer delays those after it in its lane."""


class Kind(enum.StrEnum):
    """What is broken. The row of docs/reliability.md that it stands under: `ROW_OF`."""

    PROVIDER_KILLED = "provider-killed"
    """SIGKILL of a provider and its children, started again."""
    PROVIDER_ENDED = "provider-ended"
    """SIGTERM: it drains, ends and is started again."""
    PROVIDER_HUNG = "provider-hung"
    """SIGSTOP, later SIGCONT: its connections stay open and say nothing."""
    ENGINE_HUNG = "engine-hung"
    """SIGSTOP of a provider's engines alone: the daemon answers, no work gets done."""
    LINK_CUT = "link-cut"
    """Every connection to a provider is reset, and new ones are, for a while."""
    LINK_SLOW = "link-slow"
    """200 ms there and back and 1 Mbit/s on the way to a provider."""
    CHAIN_CUT = "chain-cut"
    """A provider's way to the chain swallows everything."""
    SCHEDULER_KILLED = "scheduler-killed"
    """SIGKILL of the scheduler, started again."""
    SCHEDULER_CUT = "scheduler-cut"
    """Partition: the way to the scheduler swallows everything, for providers and clients."""
    P2P_KILLED = "p2p-killed"
    """SIGKILL of a role's p2p process; the role itself starts another."""
    CHAIN_KILLED = "chain-killed"
    """SIGKILL of the chain's node, started again from its state: up to a second of blocks is lost."""
    CLIENT_KILLED = "client-killed"
    """SIGKILL of a client in the midst of its jobs, started again on its journal."""


SELLERS = tuple(Kind)[:7]
MARKET = tuple(Kind)[7:]
LENGTH_SECONDS: dict[Kind, tuple[float, float]] = {
    Kind.PROVIDER_KILLED: (1.0, 4.0),
    Kind.PROVIDER_ENDED: (0.0, 0.0),
    Kind.PROVIDER_HUNG: (8.0, 20.0),
    Kind.ENGINE_HUNG: (8.0, 15.0),
    Kind.LINK_CUT: (2.0, 8.0),
    Kind.LINK_SLOW: (8.0, 15.0),
    Kind.CHAIN_CUT: (5.0, 15.0),
    Kind.SCHEDULER_KILLED: (1.0, 4.0),
    Kind.SCHEDULER_CUT: (3.0, 12.0),
    Kind.P2P_KILLED: (0.0, 0.0),
    Kind.CHAIN_KILLED: (1.0, 8.0),
    Kind.CLIENT_KILLED: (0.0, 2.0),
}
"""Shortest and longest time that something is broken, before it is healed. A restart comes on top."""
RESTARTED = (Kind.PROVIDER_KILLED, Kind.PROVIDER_ENDED, Kind.SCHEDULER_KILLED)
ROW_OF: dict[Kind, str] = {
    Kind.PROVIDER_KILLED: "F01",
    Kind.PROVIDER_ENDED: "F14",
    Kind.PROVIDER_HUNG: "F17",
    Kind.ENGINE_HUNG: "F60",
    Kind.LINK_CUT: "F15",
    Kind.LINK_SLOW: "F16",
    Kind.CHAIN_CUT: "F31",
    Kind.SCHEDULER_KILLED: "F03",
    Kind.SCHEDULER_CUT: "F18",
    Kind.P2P_KILLED: "F01",
    Kind.CHAIN_KILLED: "F31",
    Kind.CLIENT_KILLED: "F03",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` befalls `target` (a role; "" where there is but one) at `at_seconds` after the load began, for `seconds`."""

    at_seconds: float
    kind: Kind
    target: str
    seconds: float


def schedule(seed: int, total_seconds: float, providers: Sequence[str], clients: Sequence[str]) -> tuple[Fault, ...]:
    """The faults of one run, by time. Raises ValueError for a run too short to hold one."""
    if total_seconds < 3 * QUIET_SECONDS:
        raise ValueError(f"{total_seconds:.0f} s are too short: {3 * QUIET_SECONDS:.0f} at least")
    random = Random(seed)  # noqa: S311  a replayable draw
    lanes = [_lane(Random(random.getrandbits(64)), deck, total_seconds, providers, clients) for deck in (SELLERS, MARKET)]  # noqa: S311
    return tuple(sorted((fault for lane in lanes for fault in lane), key=lambda fault: (fault.at_seconds, fault.kind)))


def _lane(random: Random, deck: Sequence[Kind], total: float, providers: Sequence[str], clients: Sequence[str]) -> Iterator[Fault]:
    at = QUIET_SECONDS + random.uniform(0.0, GAP_SECONDS[0])
    while True:
        for kind in random.sample(deck, len(deck)):
            seconds = random.uniform(*LENGTH_SECONDS[kind])
            target = _target(random, kind, providers, clients)
            if at + seconds > total - QUIET_SECONDS:
                return
            yield Fault(round(at, 3), kind, target, round(seconds, 3))
            at += seconds + random.uniform(*GAP_SECONDS) + (HEALING_SECONDS if kind in RESTARTED else 0.0)


def _target(random: Random, kind: Kind, providers: Sequence[str], clients: Sequence[str]) -> str:
    if kind in SELLERS or kind is Kind.P2P_KILLED:
        return random.choice(providers)
    return random.choice(clients) if kind is Kind.CLIENT_KILLED else ""

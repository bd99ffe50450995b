"""Whether a scheduler could take an order now: it hears the chain, its database answers, its p2p process is up."""

from __future__ import annotations

from functools import partial

from gpumarket.p2p.link import Link
from gpumarket.p2p.readings import p2p_trouble
from gpumarket.scheduler.market import Market
from gpumarket.settlement.chain import ChainView
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.readiness import chain_trouble, journal_trouble
from gpumarket.telemetry.readiness import Readiness

CHECK_SECONDS = 3.0
FRESH_SECONDS = 1.0
"""An answer serves everybody who asks within this time."""


def readiness_of(market: Market, view: ChainView, journal: Journal, link: Link) -> Readiness:
    """The checks of a scheduler daemon."""
    return Readiness(
        {
            "scheduler": (partial(_own_trouble, market), CHECK_SECONDS),
            "chain": (partial(chain_trouble, view), CHECK_SECONDS),
            "ledger": (partial(journal_trouble, journal), CHECK_SECONDS),
            "p2p": (partial(p2p_trouble, link), CHECK_SECONDS),
        }
    )


async def _own_trouble(market: Market) -> str:
    if market.ledger.failure is not None:
        return "its ledger can no longer be written"
    return "it is draining and takes no orders" if market.desk.closed else ""

"""Whether a gateway could serve a request now: its ledger and its client's journal answer, a scheduler does, a model of its is on sale."""

from __future__ import annotations

from functools import partial

from gpumarket.core.errors import GpumarketError
from gpumarket.gateway.call import Room
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.readiness import journal_trouble
from gpumarket.telemetry.readiness import Readiness

CHECK_SECONDS = 3.0
FRESH_SECONDS = 5.0
"""An answer serves everybody who asks within this time: each asks a scheduler once."""


def readiness_of(room: Room, journal: Journal) -> Readiness:
    """The checks of a gateway."""
    return Readiness(
        {
            "gateway": (partial(_own_trouble, room), CHECK_SECONDS),
            "ledger": (partial(journal_trouble, journal), CHECK_SECONDS),
            "journal": (partial(journal_trouble, room.counter.client.desk.journal), CHECK_SECONDS),
            "market": (partial(_market_trouble, room), CHECK_SECONDS),
        }
    )


async def _own_trouble(room: Room) -> str:
    if room.counter.draining:
        return "it is draining and takes no requests"
    return "" if room.catalog.models() else "its lock file has no model: gpumarket model add"


async def _market_trouble(room: Room) -> str:
    """A scheduler answers, and somebody sells one of the models."""
    try:
        on_sale = {offer.model for offer in await room.counter.client.offers()}
    except GpumarketError:
        return "no scheduler answers"
    return "" if on_sale & {entry.digest for entry in room.catalog.models()} else "nobody sells a model of its lock file now"

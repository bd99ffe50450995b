"""What a daemon shows of its p2p process. The process parses strangers' bytes: of its counters only those that are listed become series."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from gpumarket.p2p.book import Verdict
from gpumarket.p2p.link import Link
from gpumarket.telemetry.metrics import Reading, counter, gauge

_VERDICTS = (*(verdict.value for verdict in Verdict), "invalid", "oversize")
EVENTS = (
    *(f"{source}_{verdict}" for source in ("own", "gossip", "snapshot") for verdict in _VERDICTS),
    "announced",
    "bad_message",
    "bad_sender_record",
    "dials",
    "dials_failed",
    "handler_errors",
    "misconduct",
    "other_topic",
    "pubsub_errors",
    "rate_limited",
    "snapshots_failed",
    "snapshots_read",
    "snapshots_refused",
    "snapshots_rejected",
    "snapshots_served",
    "streams_broken",
    "streams_refused",
    "validator_failed",
)
P2P_SECONDS, ANSWER_SECONDS = 2.0, 2.0
"""How long an answer serves, and how long the process has for one."""

P2P_METRICS = (
    gauge("p2p_up", "1 while the p2p process answers."),
    counter("p2p_restarts_total", "Deaths of the p2p process that were mended."),
    counter("p2p_offers_dropped_total", "Offers that were read too slowly, and come again with a snapshot."),
    gauge("p2p_peers", "Peers connected."),
    gauge("p2p_mesh_peers", "Peers in the gossip mesh of the offers."),
    gauge("p2p_book_offers", "Providers whose offers the process remembers."),
    gauge("p2p_book_bytes", "Bytes of those offers."),
    gauge("p2p_resident_bytes", "Resident memory of the p2p process."),
    counter("p2p_events_total", "What happened in the p2p process since it started, by kind.", "event", EVENTS),
)
_NUMBERS = ("peers", "mesh_peers", "book_offers", "book_bytes")


async def p2p_readings(link: Link) -> Mapping[str, Reading]:
    """Asks the process; what it cannot say while it is down is left out."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            status = await link.status()
    except TimeoutError:  # it runs and does not answer: the link's watchdog will end it
        status = {"up": 0, "restarts": link.restarts, "offers_dropped": 0}
    found: dict[str, Reading] = {"p2p_up": _number(status["up"])}
    found |= {f"p2p_{name}_total": _number(status[name]) for name in ("restarts", "offers_dropped")}
    if not status["up"]:
        return found
    found |= {f"p2p_{name}": _number(status[name]) for name in _NUMBERS}
    found["p2p_resident_bytes"] = _number(status["rss_bytes"])
    found["p2p_events_total"] = {event: _number(status.get(event, 0)) for event in EVENTS}
    return found


def _number(value: int | str) -> float:
    return float(value) if isinstance(value, int) else 0.0


async def p2p_trouble(link: Link) -> str:
    """For readiness: what is wrong, in words for a stranger."""
    return "" if (await link.status())["up"] else "its process is down; it is being started again"

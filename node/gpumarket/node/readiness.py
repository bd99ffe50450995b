"""Whether a provider could do paid work now: it hears the chain, its journal and p2p process answer, its engines do a canary job."""

from __future__ import annotations

from functools import partial

from gpumarket.core.units import Hash
from gpumarket.node import canary
from gpumarket.node.metrics import model_labels
from gpumarket.node.provider import Provider
from gpumarket.p2p.link import Link
from gpumarket.p2p.readings import p2p_trouble
from gpumarket.settlement.chain import ChainView
from gpumarket.settlement.journal import Journal
from gpumarket.settlement.readiness import chain_trouble, journal_trouble
from gpumarket.telemetry.readiness import Readiness

CHECK_SECONDS = 3.0
FRESH_SECONDS = 5.0
"""An answer serves everybody who asks within this time: at most one canary per engine in it, however often somebody probes."""


def readiness_of(provider: Provider, view: ChainView, journal: Journal, link: Link) -> Readiness:
    """The checks of a provider daemon."""
    labels = model_labels({digest: model.manifest for digest, model in provider.house.models.items()})
    longest = canary.ANSWER_SECONDS + 1.0
    engines = {f"engine {label}": (partial(_engine_trouble, provider, digest), longest) for digest, label in labels.items()}
    return Readiness(
        {
            "provider": (partial(_own_trouble, provider), CHECK_SECONDS),
            "chain": (partial(chain_trouble, view), CHECK_SECONDS),
            "journal": (partial(journal_trouble, journal), CHECK_SECONDS),
            "p2p": (partial(p2p_trouble, link), CHECK_SECONDS),
            **engines,
        }
    )


async def _own_trouble(provider: Provider) -> str:
    return "it is draining and takes nothing more" if provider.service.draining else ""


async def _engine_trouble(provider: Provider, digest: Hash) -> str:
    """Of an engine that runs, or should: one that waits for its first job is left cold."""
    seat = provider.engines.seats[digest]
    if not (seat.warm or digest in provider.kept_warm):
        return ""
    trouble = await canary.trouble_with(seat)
    provider.tally.canaries["failed" if trouble else "ok"] += 1
    return trouble

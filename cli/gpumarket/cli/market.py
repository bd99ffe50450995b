"""`gpumarket market`: what is on offer, and why a job would go where it goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpumarket.cli import buyer
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption, noun, verb
from gpumarket.core.units import PER_MILLION, format_money, hex0x

if TYPE_CHECKING:
    from gpumarket.sdk.results import OfferView
    from gpumarket.v1 import market_pb2

app = noun("What is on offer.")


@verb(app, "ls")
async def ls(
    model: Annotated[str | None, typer.Argument(help="Name in your lock file; everything by default.")] = None,
    config: ConfigOption = None,
) -> None:
    """Every model of every provider that the scheduler knows."""
    async with buyer.market(config) as market:
        offers = await market.offers(model)
    current().emit([_document(offer) for offer in offers], lambda _: current().table([_row(offer) for offer in offers]))


@verb(app, "explain")
async def explain(
    model: Annotated[str, typer.Argument(help="Name in your lock file.")],
    text: Annotated[str, typer.Argument(help="Prompt or text of the job in question.")] = "hello",
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    config: ConfigOption = None,
) -> None:
    """Why a job would go where it goes: scores of the candidates, and what struck the others out. Sends no job."""
    async with buyer.market(config) as market:
        found = await market.explain(model, text, max_tokens=max_tokens)
    document = explanation_document(found)
    current().emit(document, lambda _: _show(document))


def explanation_document(found: market_pb2.Explanation) -> dict[str, Any]:
    """An explanation for programs."""
    return {
        "considered": found.considered,
        "explored": found.explored,
        "candidates": [
            {
                "provider": hex0x(s.provider),
                "score": round(s.total, 4),
                "chosen": s.chosen,
                "parts": {k: round(v, 4) for k, v in sorted(s.parts.items())},
            }
            for s in found.candidates
        ],
        "removed": [{"filter": c.filter, "providers": c.removed, "example": c.example} for c in found.removed],
        "rejected": [{"provider": hex0x(r.provider), "filter": r.filter, "reason": r.reason} for r in found.rejected],
    }


def _show(document: dict[str, Any]) -> None:
    current().table(document["candidates"], title=f"{document['considered']} considered")
    current().table(document["removed"], title="struck out, by filter")
    current().table(document["rejected"], title="some of them")


def _document(offer: OfferView) -> dict[str, Any]:
    return {
        "provider": hex0x(offer.provider),
        "owner": hex0x(offer.owner) if offer.owner else "",
        "stake": offer.stake,
        "endpoint": offer.endpoint,
        "region": offer.region,
        "gpus": list(offer.gpus),
        "measured_mflops": offer.measured_mflops,
        "proven_mflops": offer.proven_mflops,
        "model": hex0x(offer.model),
        "name": offer.name,
        "dtype": offer.dtype,
        "warm": offer.warm,
        "checks": offer.checks,
        "prompt_price_per_mtok": offer.prompt_price_per_mtok,
        "output_price_per_mtok": offer.output_price_per_mtok,
        "reputation": offer.reputation_ppm / PER_MILLION,
    }


def _row(offer: OfferView) -> dict[str, Any]:
    return {
        "provider": hex0x(offer.provider),
        "gpu": ", ".join(offer.gpus),
        "proven GFLOP/s": f"{offer.proven_mflops / 1_000:,.1f}" if offer.proven_mflops else "-",
        "model": offer.name,
        "dtype": offer.dtype,
        "warm": offer.warm,
        "in/Mtok": format_money(offer.prompt_price_per_mtok),
        "out/Mtok": format_money(offer.output_price_per_mtok),
        "stake": format_money(offer.stake),
        "reputation": f"{offer.reputation_ppm / PER_MILLION:.2f}",
    }

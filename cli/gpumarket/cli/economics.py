"""`gpumarket economics`: what cheating would earn at the network's present check rate, detection and stakes, and what is not promised."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpumarket.cli import buyer, settings
from gpumarket.cli.output import current
from gpumarket.cli.verbs import ConfigOption, with_common_options
from gpumarket.core.units import format_money, hex0x

if TYPE_CHECKING:
    from gpumarket.sdk.results import OfferView
    from gpumarket.settlement.deterrence import Network, Row

_SHOWN_DECIMALS = 6
_WHOSE_P = "p is your own setting (check_probability in [client]), not measured: what a cheat meets is what each of its clients has set"


@with_common_options
async def command(
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a job brings.")] = 256,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens that it asks for.")] = 256,
    job_seconds: Annotated[float, typer.Option(min=0.1, help="How long such a job runs.")] = 10.0,
    hostile: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of panel seats that you assume to side with the cheat.")] = 0.1,
    config: ConfigOption = None,
) -> None:
    """What each known way to cheat earns a provider per job: p from your settings, d measured, S from the chain, prices from the market."""
    from gpumarket.sdk.settings import ClientSettings
    from gpumarket.settlement.deterrence import NOT_PROMISED

    async with buyer.market(config) as market:
        offers = await market.offers()
        check_seconds = (await market.desk.hub.info()).check_seconds
        chances = [settings.role(ClientSettings, config).check_probability, hostile]
    network, seasoned = await _disputes(config, offers, *chances)
    busy = 1 + check_seconds / job_seconds
    rows = [entry for offer in offers for entry in _rows(offer, network, seasoned, busy, prompt_tokens, output_tokens)]
    document = {
        "check_probability": network.probability,
        "check_probability_source": _WHOSE_P,
        "check_seconds": check_seconds,
        "hostile_seats": hostile,
        "quorum": network.quorum,
        "disputes": network.has_disputes,
        "formula": "expected = g - p*d*(R + P(quorum)*S)",
        "rows": rows,
        "pays": sum(entry["pays"] for entry in rows),
        "not_promised": list(NOT_PROMISED),
    }
    current().emit(document, lambda _: _show(document))


async def _disputes(config: Path | None, offers: list[OfferView], probability: float, hostile: float) -> tuple[Network, dict[bytes, bool]]:
    """The network's figures, and by model whether its panels may slash. Raises ChainError, Unreachable."""
    from gpumarket.contracts.artifacts import artifact
    from gpumarket.contracts.deploy import ZERO_ADDRESS
    from gpumarket.settlement.chain import connect
    from gpumarket.settlement.chain.connection import reachable
    from gpumarket.settlement.deterrence import Network

    chain_settings = settings.chain(config)
    chain = await connect(chain_settings)
    try:
        if chain.book.disputes == ZERO_ADDRESS:
            return Network(probability, hostile, has_disputes=False), {}
        contract: Any = chain.w3.eth.contract(address=chain.w3.to_checksum_address(chain.book.disputes), abi=artifact("Disputes").abi)
        with reachable(chain_settings.rpc_url):
            terms = _named(contract, await contract.functions.terms().call())
            models = {offer.model for offer in offers}
            seats = {model: await contract.functions.seasonedCount(model, int(time.time())).call() for model in models}
    finally:
        await chain.close()
    network = Network(
        probability,
        hostile,
        has_disputes=True,
        lock_minimum=terms["lockMinimum"],
        slash_multiple=terms["slashMultiple"],
        panel_fee=terms["panelFee"],
        burn_ppm=terms["burnPpm"],
    )
    return network, {model: count >= terms["slashVerifiersMin"] for model, count in seats.items()}


def _named(contract: Any, values: Any) -> dict[str, int]:
    """The struct that `terms()` returns, by the names of its fields."""
    (function,) = [entry for entry in contract.abi if entry.get("name") == "terms"]
    names = [part["name"] for part in function["outputs"][0]["components"]]
    return dict(zip(names, values, strict=True))


def _rows(
    offer: OfferView, network: Network, seasoned: dict[bytes, bool], busy: float, prompt_tokens: int, output_tokens: int
) -> list[dict[str, Any]]:
    from gpumarket.core.errors import ConfigError
    from gpumarket.settlement.deterrence import CHEATS, Seller, row
    from gpumarket.settlement.verification import profile_by_digest

    try:
        task = profile_by_digest(offer.profile).task
    except ConfigError:
        return []  # a profile that this program cannot judge: it takes no such offer either
    at_risk = round(max(1, offer.capacity) * busy)
    slashable = seasoned.get(offer.model, False)
    seller = Seller(offer.stake, offer.prompt_price_per_mtok, offer.output_price_per_mtok, task, slashable, at_risk)
    found = [row(cheat, seller, network, prompt_tokens, output_tokens) for cheat in CHEATS if cheat.task is task]
    return [_document(offer, seller.jobs_at_risk, slashable, entry) for entry in found]


def _document(offer: OfferView, at_risk: int, slashable: bool, entry: Row) -> dict[str, Any]:
    return {
        "provider": hex0x(offer.provider),
        "model": offer.name,
        "cheat": entry.cheat.name,
        "detection": round(entry.cheat.detection, 4),
        "measured": f"{entry.cheat.caught} of {entry.cheat.tried}",
        "price": entry.price,
        "gain": round(entry.gain),
        "stake": offer.stake,
        "jobs_at_risk": at_risk,
        "slashable": slashable and entry.cheat.gross,
        "stake_behind_job": entry.backing,
        "expected": round(entry.expected),
        "pays": entry.pays,
        "stake_needed_per_job": None if entry.needed == float("inf") else round(entry.needed),
        "caught_in_100_jobs": round(entry.caught_in_100, 4),
    }


def _show(document: dict[str, Any]) -> None:
    out = current()
    shown = [
        {
            "provider": entry["provider"][:10],
            "model": entry["model"],
            "cheat": entry["cheat"],
            "d": f"{entry['detection']:.2f} ({entry['measured']})",
            "g": _tokens(entry["gain"]),
            "R": _tokens(entry["price"]),
            "S behind it": _tokens(entry["stake_behind_job"]),
            "earns per job": ("pays " if entry["pays"] else "loses ") + _tokens(abs(entry["expected"])),
            "S needed": "no stake deters" if entry["stake_needed_per_job"] is None else _tokens(entry["stake_needed_per_job"]),
            "caught in 100": f"{100 * entry['caught_in_100_jobs']:.0f} %",
        }
        for entry in document["rows"]
    ]
    p, quorum = document["check_probability"], document["quorum"]
    out.table(shown, title=f"{document['formula']};  p = {p:g}, P(quorum) = {quorum:.3f} at {document['hostile_seats']:g} hostile seats")
    if not document["disputes"]:
        out.text("this network has no Disputes contract: nobody is slashed, S is 0\n")
    out.text(f"\n{_WHOSE_P}\n")
    out.text("\ng is the most that the cheat can save; d the lower 95 % end of what was measured. Not promised:\n")
    for line in document["not_promised"]:
        out.text(f"  - {line}\n")


def _tokens(amount: int) -> str:
    """Tokens with a few digits, never 0 for what is more."""
    exact = format_money(amount)
    short = f"{amount / 10**18:.{_SHOWN_DECIMALS}g}"
    return exact if len(exact) <= len(short) else short

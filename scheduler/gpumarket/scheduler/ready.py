"""Files by which a running scheduler is found and asked: `ready.json`, and `redeemed.json` in answer to SIGUSR1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpumarket.core.errors import GpumarketError
from gpumarket.core.units import format_money, hex0x
from gpumarket.settlement.redeemer import Redeemer, Redemption

READY = "ready.json"
REDEEMED = "redeemed.json"


async def redeem_on_request(redeemer: Redeemer, state: Path) -> None:
    """Redeem everything now and write {redemptions: [...], error} beside the ledger."""
    found: list[Redemption] = []
    failure: dict[str, object] | None = None
    try:
        found = await redeemer.redeem_now()
    except GpumarketError as error:
        failure = error.as_dict()
    write_json(state / REDEEMED, {"redemptions": [_line(r) for r in found], "error": failure})


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(path.suffix + ".new")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)


def _line(redemption: Redemption) -> dict[str, Any]:
    return {
        "channel": hex0x(redemption.channel),
        "payer": hex0x(redemption.payer),
        "payee": hex0x(redemption.payee),
        "amount": format_money(redemption.amount),
        "tx": hex0x(redemption.tx),
        "gas": redemption.gas,
    }

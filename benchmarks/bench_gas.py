"""What the contracts cost in gas, on anvil, beside what peers published or what their code cost on the same chain.

Our figures are measured in this run. The peers' are those of gas_peers.toml, each with its source and its caveat: another promise at
another price is no comparison, so each line says what its gas buys.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from contracts_fixtures import market_chain
from contracts_gas import measure

JOBS = 10_000
PEERS = tomllib.loads(Path(__file__).with_name("gas_peers.toml").read_text())["peer"]
OURS = {
    "gas_redeem": ("redeem", "Raiden OneToN.claim: 103,552"),
    "gas_redeem_batch100_each": (
        "redeem_batch100_each",
        "Raiden bulkClaim of 6: 27,560; Golem packed transfer: 9,859, with no claim to enforce",
    ),
    "gas_push100_each": ("push100_each", "Golem depositTransfer of 100: 9,864, with nothing promised before"),
    "gas_dispute_total": ("dispute_total", "PrimeIntellect slash by a privileged validator: 89,006; ours by a drawn panel of 5"),
}
WHAT = {
    "open": "lock a deposit for a payee: three new slots",
    "redeem": "one signed voucher for any number of jobs, paid out to a payee that holds tokens",
    "redeem_batch1_each": "the same to a credited balance, alone",
    "redeem_batch10_each": "each of 10 channels to one payee",
    "redeem_batch100_each": "each of 100 channels to one payee, compact signatures, every signature checked",
    "push100_each": "each of 100 channels to as many payees, advanced by the signer itself, with an event each",
    "push100_first_each": "the same when each payee is credited for the first time",
    "withdraw": "a credited balance of any number of redemptions, once",
    "cooperative_close": "pay, close and refund at once by the payee's signature",
    "close": "refund after the window",
    "dispute_total": "challenge, draw, five commits, five reveals, finish: no privileged judge",
}


def run() -> list[dict[str, Any]]:
    """name, value, unit, compared_with; the whole table goes to stderr."""
    with market_chain() as chain:
        gas = measure(chain)
    print(_table(gas), file=sys.stderr)
    rows = [_row(name, gas[key], "gas", compared) for name, (key, compared) in OURS.items()]
    per_job = round(gas["redeem"] / JOBS, 3)
    return [
        *rows,
        _row("gas_per_job_10k", per_job, "gas/job", "one redemption settles 10,000 jobs; PrimeIntellect submits each for 226,765"),
    ]


def _row(name: str, value: float, unit: str, compared_with: str) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "compared_with": compared_with}


def _table(gas: dict[str, int]) -> str:
    ours = [(f"gpumarket {name}", f"{gas[name]:,}", what, "this run") for name, what in WHAT.items()]
    theirs = [(peer["what"], peer["gas"], peer["buys"], peer["source"]) for peer in PEERS]
    lines = [f"{name:<36} {figure:>12}  {what} [{source}]" for name, figure, what, source in (*ours, *theirs)]
    return "\n".join(lines)


if __name__ == "__main__":
    for line in run():
        print(line)

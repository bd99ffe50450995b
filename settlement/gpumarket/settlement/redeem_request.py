"""Asking a running daemon to redeem now: SIGUSR1 to the process that `ready.json` names, the answer in `redeemed.json` beside it.

Provider and scheduler answer alike. Each redemption also stands in the daemon's journal, in the table `redemptions`.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from gpumarket.core.daemon import READY, write_json
from gpumarket.core.errors import GpumarketError, Unreachable
from gpumarket.core.units import format_money, hex0x
from gpumarket.settlement.redeemer import Redeemer, Redemption

REDEEMED = "redeemed.json"


def ask_daemon(state: Path, *, seconds: float = 120.0) -> list[dict[str, Any]]:
    """Ask the daemon that holds the state folder's lock to redeem everything; its redemptions {channel, payer, payee, amount, tx, gas}.

    One that is still starting is waited for. Raises Unreachable when it is not ready or does not answer in time, and the daemon's own
    error as Unreachable.
    """
    deadline = time.monotonic() + seconds
    while (pid := _asked(state)) is None:
        if time.monotonic() > deadline:
            raise Unreachable(
                f"the process that works on {state} was not ready within {seconds:.0f} s",
                hint="it may be starting, ending, or redeeming itself: see its log, then run this again",
            )
        time.sleep(0.1)
    while not (state / REDEEMED).exists():
        if time.monotonic() > deadline:
            raise Unreachable(f"process {pid} did not redeem within {seconds:.0f} s", hint=f"see its log; it may still do it: {state}")
        time.sleep(0.1)
    answer: dict[str, Any] = json.loads((state / REDEEMED).read_text())
    if answer["error"]:
        raise Unreachable(f"the daemon could not redeem: {answer['error']['message']}", hint=answer["error"]["hint"])
    found: list[dict[str, Any]] = answer["redemptions"]
    return found


def _asked(state: Path) -> int | None:
    """Signal the daemon that says it is ready; its process id, None when there is none (a file left by a process that is gone counts
    for nothing: the next daemon removes it)."""
    try:
        pid = int(json.loads((state / READY).read_text())["pid"])
        (state / REDEEMED).unlink(missing_ok=True)
        os.kill(pid, signal.SIGUSR1)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return pid


async def redeem_on_request(redeemer: Redeemer, state: Path) -> None:
    """The daemon's answer to `ask_daemon`."""
    found: list[Redemption] = []
    failure: dict[str, object] | None = None
    try:
        found = await redeemer.redeem_now()
    except GpumarketError as error:
        failure = error.as_dict()
    write_json(state / REDEEMED, {"redemptions": [as_line(r) for r in found], "error": failure})


def as_line(redemption: Redemption) -> dict[str, Any]:
    """A redemption for people and programs; money as decimal text."""
    return {
        "channel": hex0x(redemption.channel),
        "payer": hex0x(redemption.payer),
        "payee": hex0x(redemption.payee),
        "amount": format_money(redemption.amount),
        "tx": hex0x(redemption.tx),
        "gas": redemption.gas,
    }

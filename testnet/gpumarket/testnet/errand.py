"""A client's errand on a market that runs already: embed a text, have one written, wait until all is decided, close the channel.

What it buys is what the demo's client buys (`story`), with every result checked. Never: a job left behind that nobody knows the end of.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpumarket.core.errors import GpumarketError
from gpumarket.core.units import Address, Money, format_money, hex0x
from gpumarket.sdk import Client
from gpumarket.sdk.results import JobOutcome
from gpumarket.testnet import passages
from gpumarket.testnet.plan import MINILM, TINY_LLAMA

PROMPT = "Say hello to the market."
TEXT_TOKENS = 40
MAX_COST = "0.001"
PASSAGES = 4
DECIDED_SECONDS = 90.0
"""Longest wait for held claims: the check time is 60 s."""
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Errand:
    """What was bought, and what it came to."""

    outcomes: tuple[JobOutcome, ...]
    text: str
    scheduler: Address
    paid: Money
    """Credited to the scheduler on chain, its fee included; out of it the providers' vouchers are paid."""
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The documented document."""
        jobs = [
            {
                "job": hex0x(o.job),
                "model": o.model,
                "provider": hex0x(o.provider),
                "verdict": o.verdict.state.value,
                "attempts": len(o.attempts),
                "rejected": [hex0x(r.provider) for r in o.rejected],
                "cost": format_money(o.cost),
            }
            for o in self.outcomes
        ]
        return {
            "jobs": jobs,
            "text": self.text,
            "scheduler": hex0x(self.scheduler),
            "paid": format_money(self.paid),
            "settled": True,
            "seconds": round(self.seconds, 1),
        }


async def run(market: Client, say: Callable[[str], None]) -> Errand:
    """Buy, wait, close. Errors of the SDK pass through; raises GpumarketError when a claim is not decided in time."""
    started = time.monotonic()
    texts = passages.paragraphs(passages.read_document(None))[:PASSAGES]
    say("embedding a text and having one written")
    async with asyncio.TaskGroup() as group:
        embedding = group.create_task(market.embed(MINILM, texts, max_cost=MAX_COST))
        writing = group.create_task(_write(market))
    written, text = writing.result()
    say("waiting until every claim is decided")
    await _decided(market)
    account = await market.account()
    await market.close_channel()
    return Errand((embedding.result(), written), text, account.scheduler, account.scheduler_used, time.monotonic() - started)


async def _write(market: Client) -> tuple[JobOutcome, str]:
    stream = market.chat(TINY_LLAMA, PROMPT, stream=True, max_tokens=TEXT_TOKENS, max_cost=MAX_COST)
    text = "".join([piece async for piece in stream])
    return stream.result, text


async def _decided(market: Client) -> None:
    deadline = time.monotonic() + DECIDED_SECONDS
    while (account := await market.account()).held or account.open:
        if time.monotonic() > deadline:
            raise GpumarketError(
                f"after {DECIDED_SECONDS:.0f} s {format_money(Money(account.held + account.open))} is not decided",
                hint="gpumarket job list; the scheduler's log tells what it waits for",
            )
        await asyncio.sleep(_POLL_SECONDS)

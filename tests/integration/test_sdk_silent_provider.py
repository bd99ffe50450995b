"""F42: a provider that takes the lease and falls silent. The client waits as long as its settings say, goes elsewhere, pays what it got."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import sdk_models
from reliability import record
from sdk_market import CLIENT, DOMAIN, FakeProvider, fake_market
from sqlalchemy import select

from gpumarket.core.codec import open_ack, parse
from gpumarket.core.errors import JobFailed
from gpumarket.core.units import PER_MILLION
from gpumarket.sdk import Client, ClientSettings
from gpumarket.sdk.tables import ATTEMPTS
from gpumarket.v1 import terms_pb2 as pb

WINDOW, TOKENS, STALL_SECONDS = 8, 50, 1.0


def client_in(folder: Path, chain: object) -> Client:
    settings = ClientSettings(
        state=folder / "client",
        lock_file=folder / "models.lock",
        check_probability=0.0,
        patience_seconds=3.0,
        failover_seconds=0.5,
        stall_seconds=STALL_SECONDS,
    )
    return Client(settings, key=CLIENT, chain=chain)  # type: ignore[arg-type]


def acked(client: Client, number: int) -> int:
    """Units of the last ack that the client's journal keeps of an attempt."""
    rows = client.desk.journal.read(lambda c: c.execute(select(ATTEMPTS.c.ack).where(ATTEMPTS.c.number == number)).scalars().all())
    (ack,) = rows
    return open_ack(DOMAIN, parse(pb.SignedAck, ack), CLIENT.address).units if ack else 0


@pytest.mark.parametrize("items", [0, 1, WINDOW, WINDOW + 1, 21])
async def test_silent_provider_is_left_after_the_stall_and_paid_for_what_it_sent(items: int, tmp_path: Path) -> None:
    silent, heir = FakeProvider("silent", silent_after_items=items), FakeProvider("heir")
    async with fake_market(tmp_path, silent, heir, window=WINDOW) as market, client_in(tmp_path, market.chain) as client:
        await client.add_model("chat", sdk_models.CHAT.digest)
        started = time.monotonic()
        result = await client.chat("chat", "hello", max_tokens=TOKENS)
        took = time.monotonic() - started
        first, second = result.attempts
        assert (first.outcome, second.outcome) == ("lost", "completed")
        assert first.units == acked(client, 1) == items, "all that came, and nothing else, is acked and kept as evidence"
        assert first.units + second.units == TOKENS == len(result.tokens)
        most = -(-items * silent.output_price * (PER_MILLION + 10_000) // PER_MILLION**2)
        assert (first.amount > 0) == (items > 0)
        assert first.amount <= most, "the client's loss is at most one window; here it is nothing"
        assert result.cost == first.amount + second.amount
        assert STALL_SECONDS < took < STALL_SECONDS + 10
    record("F42", 1, f"silent after {items} tokens: left after {STALL_SECONDS:.0f} s without a word, paid beyond what came 0", "1 window")


async def test_silent_providers_only_end_the_job_with_the_reason_and_nothing_paid(tmp_path: Path) -> None:
    silent = FakeProvider("silent", silent_after_items=0)
    async with fake_market(tmp_path, silent, window=WINDOW) as market, client_in(tmp_path, market.chain) as client:
        await client.add_model("chat", sdk_models.CHAT.digest)
        with pytest.raises(JobFailed, match="no sign of life"):
            await client.chat("chat", "hello", max_tokens=TOKENS)
        (job,) = client.jobs()
        assert (job.state, job.cost) == ("failed", 0)
    record("F42", 1, "all are silent: the job ends with the reason, paid 0", "1 window")

"""What a client takes before a panel, and what it does not; what it keeps before the challenge leaves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sdk_models
from sdk_market import CLIENT, TOKEN, FakeMarket, FakeProvider, MemoryChain, fake_market

from gpumarket.core.codec import from_proto
from gpumarket.core.errors import ConfigError, NetworkError, NotDisputable, OutOfFunds, ResultRejected
from gpumarket.core.terms import Lease, keccak256
from gpumarket.core.units import Hash, Money, hex0x
from gpumarket.sdk import Client, ClientSettings, disputes, store
from gpumarket.sdk.dispute_records import StoredDispute, everything
from gpumarket.settlement.disputes import Dispute, Rules, nonce_commitment
from gpumarket.settlement.verification import open_evidence
from gpumarket.v1 import market_pb2 as mpb

BOND = 20 * TOKEN


class Crash(NetworkError):
    """The process ends here."""


@dataclass
class Contract:
    """Disputes as far as opening goes: it takes a challenge, or crashes before or after it."""

    tokens: int = 100 * TOKEN
    time: int = 0
    crash: str = ""
    block: int = 7
    rules: Rules = field(default_factory=lambda: Rules(100, 100, 10**9))
    challenges: list[tuple[Any, ...]] = field(default_factory=list)
    disputes: dict[Hash, Dispute] = field(default_factory=dict)

    @property
    def actions(self) -> Any:
        return self

    @property
    def watch(self) -> Any:
        return self

    async def sync(self) -> None: ...

    async def terms(self) -> Contract:
        return self

    async def head(self) -> Contract:
        return self

    async def quote(self, provider: bytes, amount: int) -> tuple[int, int]:
        assert amount > 0
        return 100 * TOKEN, BOND

    async def funds(self) -> Money:
        return Money(self.tokens)

    async def challenge(self, opening: mpb.Opening, profile: Any, nonce_committed: Hash, evidence_hash: Hash) -> Contract:
        if self.crash == "before":
            raise Crash("before")
        lease = from_proto(Lease, opening.lease.lease)
        assert profile.digest == lease.profile
        self.challenges.append((lease.struct_hash, nonce_committed, evidence_hash))
        facts = (lease.model, lease.task, 1, 1, 1, BOND, 9, 10**10, True, evidence_hash)
        ours = Dispute(lease.struct_hash, lease.provider, CLIENT.address, *facts)
        self.disputes[lease.struct_hash] = ours
        if self.crash == "after":
            raise Crash("after")
        return self


class DisputableChain(MemoryChain):
    """A chain in memory with the contract on it."""

    def __init__(self, contract: Contract) -> None:
        super().__init__()
        self.contract = contract

    def disputes(self, key: Any, journal: Any) -> Contract:
        assert key.address == CLIENT.address
        return self.contract


@asynccontextmanager
async def market_of(folder: Path, contract: Contract | None, *, wrong: float = 1.0) -> AsyncIterator[tuple[FakeMarket, Client]]:
    """A cheater first in line, and two honest ones who check it."""
    providers = FakeProvider("cheater", wrong_numbers=wrong), FakeProvider("b"), FakeProvider("c")
    async with fake_market(folder, *providers) as market:
        chain: MemoryChain = market.chain
        if contract is not None:
            chain = DisputableChain(contract)
            chain.nodes, chain.channels = market.chain.nodes, market.chain.channels
            market.chain = market.scheduler.chain = chain
        async with client_at(folder, chain) as client:
            await client.add_model("mini", sdk_models.EMBED.digest)
            await client.add_model("chat", sdk_models.CHAT.digest)
            yield market, client


def client_at(folder: Path, chain: MemoryChain) -> Client:
    settings = ClientSettings(state=folder / "client", lock_file=folder / "models.lock", check_probability=1.0, failover_seconds=0.5)
    return Client(settings, key=CLIENT, chain=chain)


async def rejected(client: Client) -> Hash:
    result = await client.embed("mini", ["w1 w2", "w3"])
    (wrong,) = result.rejected
    return wrong.job


def stored(client: Client) -> list[StoredDispute]:
    return client.desk.journal.read(everything)


async def test_dispute_of_a_rejected_result_is_written_down_before_it_is_opened(tmp_path: Path) -> None:
    contract = Contract()
    async with market_of(tmp_path, contract) as (_, client):
        job = await rejected(client)
        await disputes.open_dispute(client.desk, job)
        (view,) = await client.disputes()
        (kept,) = stored(client)
        evidence = open_evidence(client.desk.domain, mpb.Opening.FromString(kept.evidence))
        assert (kept.job, kept.dispute, kept.outcome) == (job, evidence.lease.struct_hash, "")
        assert contract.challenges == [(kept.dispute, nonce_commitment(kept.dispute, CLIENT.address, kept.nonce), keccak256(kept.evidence))]
        assert (view.state, view.provider, view.bond) == ("challenged", evidence.lease.provider, BOND)


@pytest.mark.parametrize("crash", ["before", "after"])
async def test_dispute_interrupted_at_its_challenge_goes_on_with_the_same_nonce(tmp_path: Path, crash: str) -> None:
    contract = Contract(crash=crash)
    async with market_of(tmp_path, contract) as (market, client):
        job = await rejected(client)
        with pytest.raises(Crash):
            await client.dispute(hex0x(job))
        (before,) = stored(client)
        await client.__aexit__()
        contract.crash = ""
        async with client_at(tmp_path, market.chain) as again:
            await disputes.open_dispute(again.desk, job)
            assert [view.state for view in await again.disputes()] == ["challenged"]
            assert stored(again) == [before]
        await client.__aenter__()
    assert [(c[0], c[1]) for c in contract.challenges] == [
        (before.dispute, nonce_commitment(before.dispute, CLIENT.address, before.nonce))
    ], "one challenge, whenever the crash came"


async def test_dispute_of_a_job_that_was_not_rejected_refused(tmp_path: Path) -> None:
    contract = Contract()
    async with market_of(tmp_path, contract, wrong=0.0) as (_, client):
        result = await client.embed("mini", ["w1 w2"])
        with pytest.raises(ConfigError, match="was not rejected \\(accepted\\)"):
            await client.dispute(result.job)
        with pytest.raises(ConfigError, match="not in this journal"):
            await client.dispute(Hash(keccak256(b"another")))
        assert not stored(client)
        assert await client.disputes() == []


async def test_dispute_of_a_check_job_refused(tmp_path: Path) -> None:
    """A checker that was outvoted is unpaid; there is no number by which a panel could judge it."""
    async with market_of(tmp_path, Contract()) as (_, client):
        job = await rejected(client)
        (check, *_) = [j.job for j in client.jobs(checks=True) if j.purpose == "check"]
        await client.desk.journal.transact(lambda c: store.set_verdict(c, check, "rejected", {}, state="rejected", ended_at=1, report=b""))
        assert check != job
        with pytest.raises(ConfigError, match="check job"):
            await client.dispute(check)


async def test_dispute_without_the_bond_refused_before_anything_is_written(tmp_path: Path) -> None:
    async with market_of(tmp_path, Contract(tokens=BOND - 1)) as (_, client):
        job = await rejected(client)
        with pytest.raises(OutOfFunds, match="bond of this dispute is 20"):
            await client.dispute(job)
        assert not stored(client)


async def test_dispute_too_late_refused(tmp_path: Path) -> None:
    async with market_of(tmp_path, Contract(time=10**10)) as (_, client):
        job = await rejected(client)
        with pytest.raises(ConfigError, match="too old"):
            await client.dispute(job)
        assert not stored(client)


async def test_dispute_where_there_is_no_contract_refused(tmp_path: Path) -> None:
    async with market_of(tmp_path, None) as (_, client):
        job = await rejected(client)
        with pytest.raises(ConfigError, match="no Disputes contract"):
            await client.dispute(job)


async def test_dispute_of_a_text_needs_two_checks_that_find_it_gross(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with market_of(tmp_path, Contract()) as (_, client):
        result = await client.chat("chat", "w1 w2", max_tokens=80)
        (wrong,) = result.rejected
        monkeypatch.setattr(disputes, "bound", lambda _: 1_000_000)  # a mean that is too high, and no share that is
        with pytest.raises(ResultRejected, match="not grossly"):
            await client.dispute(wrong.job)
        assert not stored(client)
        monkeypatch.undo()
        assert (await disputes.open_dispute(client.desk, wrong.job)).outcome == ""


async def test_dispute_of_a_text_drawn_from_the_clients_own_seed_refused_though_it_goes_unpaid(tmp_path: Path) -> None:
    async with market_of(tmp_path, Contract()) as (market, client):
        result = await client.chat("chat", "w1 w2", max_tokens=80, seed=11)
        (wrong,) = result.rejected
        assert wrong.cost == 0
        with pytest.raises(NotDisputable, match="client_seed"):
            await client.dispute(wrong.job)
        assert not stored(client)
        assert [r.verdict for r in market.scheduler.reports if r.job == wrong.job] == [mpb.VERDICT_REJECTED]
